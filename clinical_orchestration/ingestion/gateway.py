"""The ingestion gateway: records over HTTP, validated and produced to Kafka before they are answered.

Run it with ``python -m clinical_orchestration.ingestion.gateway --host 127.0.0.1 --port 8081``; everything else comes
from the environment, see :class:`clinical_orchestration.settings.ClientSettings`.

An answer of 200 means that every replica in sync has the records, at the positions given. A request that failed, or
that was never answered, may be repeated as it is: the silver step recognises records that arrive twice.
"""

from __future__ import annotations

import argparse
import logging
import threading
import time
from collections import Counter as Tally
from collections.abc import AsyncIterator, Callable, Collection, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Annotated, Any, Protocol

import orjson
from fastapi import FastAPI, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.process_collector import ProcessCollector
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException

from clinical_orchestration.ingestion.kafka import TRIAL_HEADER
from clinical_orchestration.stores.kafka import DeliveryError, KafkaUnavailableError, Producer, Record
from clinical_orchestration.transforms.messages import message_schema, validate_message

MAX_BODY_BYTES = 16 * 1024 * 1024
MAX_RECORDS = 10_000
MAX_RECORD_BYTES = 900_000  # below the broker's default limit of 1 MiB a message, headers included
_STATE_SECONDS = 2.0  # how long the answer to "does Kafka answer" is believed

_log = logging.getLogger(__name__)

_START_KAFKA = "Start Kafka (./pipeline-manager.sh --start --level 0) or check KAFKA_BOOTSTRAP_SERVERS, and send again."
_INSTALL_KAFKA = (
    "Kafka is not installed in this deployment: give it access to Maven Central or a mirror of it and start it again "
    "(./pipeline-manager.sh --start --level 1). Records can be ingested from files meanwhile (--source FOLDER)."
)


class TopicProbe(Protocol):
    """What the gateway needs of a Kafka admin client."""

    def ensure_topics(self, topics: Collection[str], *, partitions: int = 3) -> list[str]:
        """Make absent topics."""

    def topics(self) -> list[str]:
        """Return the topics' names; raises KafkaUnavailableError."""


class _ProblemError(Exception):
    """A request that ends with an error answer."""

    def __init__(self, status: int, error: str, detail: str, what_to_do: str, **more: object) -> None:
        self.status = status
        self.body: dict[str, object] = {"error": error, "detail": detail, "what_to_do": what_to_do, **more}
        super().__init__(error)


class _Metrics:
    """Counters of the gateway; no label carries anything from a record."""

    def __init__(self, topics: Collection[str]) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self.requests = Counter(
            "clinical_gateway_requests", "Requests for records answered.", ["topic", "status"], registry=self.registry
        )
        self.records = Counter(
            "clinical_gateway_records", "Records by outcome.", ["topic", "outcome"], registry=self.registry
        )
        self.reasons = Counter(
            "clinical_gateway_invalid_reasons", "Broken rules of invalid records.", ["topic", "rule"],
            registry=self.registry,
        )  # fmt: skip
        self.seconds = Histogram(
            "clinical_gateway_request_seconds", "Time to answer.", ["topic"], registry=self.registry,
            buckets=(0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10),
        )  # fmt: skip
        self.kafka_up = Gauge("clinical_gateway_kafka_up", "1 when Kafka answered last.", registry=self.registry)
        for topic in topics:
            for outcome in ("accepted", "invalid", "undelivered"):
                self.records.labels(topic, outcome)


class _Kafka:
    """The producer and whether Kafka answers; clients are built on first use, so the gateway starts without Kafka."""

    def __init__(
        self,
        make_producer: Callable[[], Producer],
        make_admin: Callable[[], TopicProbe],
        topics: Sequence[str],
        enabled: bool,
        up: Gauge,
    ) -> None:
        self.enabled = enabled
        self._make_producer, self._make_admin, self._topics, self._up = make_producer, make_admin, topics, up
        self._lock = threading.Lock()
        self._producer: Producer | None = None
        self._admin: TopicProbe | None = None
        self._ensured = False
        self._checked_at = float("-inf")
        self.error: str | None = None

    def answers(self) -> bool:
        """Return whether Kafka answers, as asked within the last seconds, and make absent topics once it does."""
        if not self.enabled:
            return False
        with self._lock:
            if time.monotonic() - self._checked_at < _STATE_SECONDS:
                return self.error is None
            try:
                if self._admin is None:
                    self._admin = self._make_admin()
                if self._ensured:
                    self._admin.topics()
                else:
                    self._admin.ensure_topics(self._topics)
                    self._ensured = True
                self.error = None
            except Exception as error:  # whatever the client raises means that it cannot be used now
                self.error = str(error)
            self._checked_at = time.monotonic()
            self._up.set(self.error is None)
            return self.error is None

    def failed(self) -> None:
        """Note that a delivery failed: the next request asks whether Kafka answers before it waits for it."""
        with self._lock:
            self._checked_at = float("-inf")
            self.error = "a delivery failed"
            self._up.set(0)

    def ready(self) -> bool:
        """Return whether it is worth producing: without asking while everything works."""
        return self.enabled and ((self._ensured and self.error is None) or self.answers())

    def producer(self) -> Producer:
        """Return the shared producer."""
        with self._lock:
            if self._producer is None:
                self._producer = self._make_producer()
            return self._producer

    def close(self) -> None:
        """Send what is queued and release connections."""
        if self._producer is not None:
            self._producer.close()


@dataclass(slots=True)
class _Request:
    """The records of one request; a record is kept as the bytes that will be produced."""

    values: list[bytes] = field(default_factory=list)
    parsed: list[Any] = field(default_factory=list)
    faults: dict[int, list[str]] = field(default_factory=dict)


def read_records(body: bytes, content_type: str) -> tuple[list[bytes], list[Any], dict[int, list[str]]]:
    """Split a request body into records.

    One JSON object is one record and a JSON array several; with a content type of NDJSON each line that is not blank
    is one. Lines and single objects are produced as they were sent, elements of an array as compact JSON.

    Returns:
        The bytes of each record, what was read from them (None where nothing could be), and reasons by index for
        those that are no JSON.

    Raises:
        ValueError: the body as a whole is no JSON; the text says where.
    """
    request = _Request()
    if "ndjson" in content_type or "jsonl" in content_type or "json-seq" in content_type:
        for line in body.splitlines():
            line = line.strip(b"\x1e \t\r")
            if not line:
                continue
            request.values.append(line)
            try:
                request.parsed.append(orjson.loads(line))
            except orjson.JSONDecodeError:
                request.parsed.append(None)
                request.faults[len(request.values) - 1] = ["invalid_json: the line is not JSON"]
        return request.values, request.parsed, request.faults
    try:
        parsed = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise ValueError(f"the body is not JSON, at line {error.lineno} column {error.colno}") from error
    if isinstance(parsed, list):
        return [orjson.dumps(item) for item in parsed], parsed, {}
    return [body.strip()], [parsed], {}


def create_app(
    *,
    producer: Callable[[], Producer],
    admin: Callable[[], TopicProbe],
    topics: Mapping[str, str],
    trials: Collection[str],
    kafka_enabled: bool = True,
    max_body_bytes: int = MAX_BODY_BYTES,
    now: Callable[[], datetime] = lambda: datetime.now(UTC),
) -> FastAPI:
    """Return the gateway.

    Args:
        producer: builds the producer, on first use.
        admin: builds the admin client, on first use.
        topics: domain -> topic; requests may name either.
        trials: names that the query parameter ``trial`` may have.
        kafka_enabled: False where no broker is installed: records get 503, and health stays 200, degraded.
        max_body_bytes: largest request body.
        now: the clock.
    """
    metrics = _Metrics(list(topics.values()))
    kafka = _Kafka(producer, admin, list(topics.values()), kafka_enabled, metrics.kafka_up)
    domains = {**{topic: domain for domain, topic in topics.items()}, **{domain: domain for domain in topics}}

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await run_in_threadpool(kafka.close)

    app = FastAPI(
        title="Ingestion gateway",
        description="Validates clinical records and produces them to Kafka. An answer of 200 means they are stored.",
        lifespan=lifespan,
    )

    @app.exception_handler(_ProblemError)
    async def problem(_: Request, error: _ProblemError) -> Response:
        headers = {"Retry-After": "5"} if error.status == 503 else None
        return _json(error.body, error.status, headers)

    @app.exception_handler(HTTPException)
    async def http_problem(_: Request, error: HTTPException) -> Response:
        body = {"error": "http_error", "detail": str(error.detail), "what_to_do": "See /docs for what there is."}
        return _json(body, error.status_code, dict(error.headers or {}))

    @app.exception_handler(RequestValidationError)
    async def invalid_parameters(_: Request, error: RequestValidationError) -> Response:
        # names and rules only: an input is not repeated
        detail = "; ".join(f"{'.'.join(str(part) for part in item['loc'])}: {item['msg']}" for item in error.errors())
        return _json({"error": "invalid_request", "detail": detail, "what_to_do": "See /docs."}, 422)

    def domain_of(topic: str) -> str:
        domain = domains.get(topic)
        if domain is None:
            raise _ProblemError(
                404,
                "unknown_topic",
                "There is no such topic.",
                f"Send to one of: {', '.join(topics.values())}.",
                topics=list(topics.values()),
            )
        return domain

    @app.post("/records/{topic}")
    async def records(
        topic: str,
        request: Request,
        partial: Annotated[
            bool, Query(description="Produce the valid records of a batch although others are not")
        ] = False,
        trial: Annotated[str | None, Query(description="Trial of the records; default: the deployment's")] = None,
    ) -> Response:
        """Validate one record (a JSON object) or a batch (a JSON array, or NDJSON) and produce it.

        A batch is all or nothing: when a record is invalid nothing is produced and the answer, 422, has the reasons
        by index. With `partial=true` the valid ones are produced and the answer is 200 with the reasons of the others.
        """
        started = time.perf_counter()
        label = topics[domains[topic]] if topic in domains else "unknown"
        status = 500
        try:
            domain = domain_of(topic)
            _refuse_foreign_pages(request)
            if trial is not None and trial not in trials:
                raise _ProblemError(
                    422, "unknown_trial", "There is no such trial.", f"Use one of: {', '.join(sorted(trials))}."
                )
            body = await _read_body(request, max_body_bytes)
            content_type = request.headers.get("content-type", "").lower()
            answer = await run_in_threadpool(accept, domain, body, content_type, partial, trial)
            status = 200
            return _json(answer, 200)
        except _ProblemError as error:
            status = error.status
            raise
        finally:
            metrics.requests.labels(label, str(status)).inc()
            metrics.seconds.labels(label).observe(time.perf_counter() - started)

    def accept(domain: str, body: bytes, content_type: str, partial: bool, trial: str | None) -> dict[str, object]:
        topic = topics[domain]
        try:
            values, parsed, faults = read_records(body, content_type)
        except ValueError as error:
            metrics.records.labels(topic, "invalid").inc()
            metrics.reasons.labels(topic, "invalid_json").inc()
            raise _ProblemError(
                422, "invalid_json", str(error), "Send a JSON object, a JSON array, or NDJSON with its content type."
            ) from error
        if not values:
            raise _ProblemError(422, "no_records", "The request has no record.", "Send at least one record.")
        if len(values) > MAX_RECORDS:
            raise _ProblemError(
                413,
                "too_many_records",
                f"The batch has {len(values):,} records.",
                f"Send at most {MAX_RECORDS:,} at once.",
            )
        moment = now()
        for index, (value, record) in enumerate(zip(values, parsed, strict=True)):
            if index in faults:
                continue
            found = validate_message(domain, value if not isinstance(record, dict) else record, now=moment)
            if len(value) > MAX_RECORD_BYTES:
                found.append(f"too_large: the record has more than {MAX_RECORD_BYTES:,} bytes")
            if found:
                faults[index] = found
        errors = [{"index": index, "reasons": reasons} for index, reasons in sorted(faults.items())]
        if faults:
            metrics.records.labels(topic, "invalid").inc(len(faults))
            rules = Tally(
                rule for reasons in faults.values() for rule in {reason.partition(":")[0] for reason in reasons}
            )
            for rule, count in rules.items():
                metrics.reasons.labels(topic, rule).inc(count)
        valid = [index for index in range(len(values)) if index not in faults]
        if faults and (not partial or not valid):
            raise _ProblemError(
                422,
                "invalid_records",
                f"{len(faults)} of {len(values)} records are invalid; nothing was produced.",
                f"Correct them (GET /schemas/{topic} has the schema), or send ?partial=true to produce the others.",
                topic=topic,
                accepted=0,
                invalid=len(faults),
                errors=errors,
            )
        headers = ((TRIAL_HEADER, trial.encode()),) if trial else ()
        positions = produce(
            topic, [Record(topic, values[i], str(parsed[i]["patient_id"]).strip().encode(), headers) for i in valid]
        )
        metrics.records.labels(topic, "accepted").inc(len(positions))
        return {
            "topic": topic,
            "accepted": len(positions),
            "invalid": len(faults),
            "positions": positions,
            "errors": errors,
        }

    def produce(topic: str, batch: list[Record]) -> list[str]:
        if not kafka.ready():
            what_to_do = _START_KAFKA if kafka.enabled else _INSTALL_KAFKA
            metrics.records.labels(topic, "undelivered").inc(len(batch))
            raise _ProblemError(
                503,
                "kafka_unavailable",
                "Kafka does not answer; nothing was produced.",
                what_to_do,
                topic=topic,
                accepted=0,
            )
        try:
            return [str(position) for position in kafka.producer().send(batch)]
        except DeliveryError as error:
            kafka.failed()
            metrics.records.labels(topic, "accepted").inc(len(error.delivered))
            metrics.records.labels(topic, "undelivered").inc(len(error.failed))
            _log.warning("topic %s: %s", topic, error)
            raise _ProblemError(
                503,
                "not_delivered",
                f"Kafka did not acknowledge {len(error.failed)} of {len(batch)} records.",
                "Send the same request again: records that arrive twice are recognised. " + _START_KAFKA,
                topic=topic,
                accepted=len(error.delivered),
                positions=[str(position) for _, position in sorted(error.delivered.items())],
            ) from error
        except KafkaUnavailableError as error:
            kafka.failed()
            raise _ProblemError(
                503, "kafka_unavailable", "Kafka does not answer.", _START_KAFKA, topic=topic
            ) from error

    @app.get("/health")
    def health() -> Response:
        """Return 200 while the gateway itself works; `status` is `degraded` while Kafka does not answer."""
        up = kafka.answers()
        state: dict[str, object] = {"status": "up" if up else "down" if kafka.enabled else "not_installed"}
        if not up:
            state["error"] = kafka.error
            state["what_to_do"] = _START_KAFKA if kafka.enabled else _INSTALL_KAFKA
        return _json({"status": "healthy" if up else "degraded", "kafka": state, "topics": list(topics.values())}, 200)

    @app.get("/schemas/{topic}")
    def schema(topic: str) -> Response:
        """Return the JSON Schema of a topic's records."""
        return Response(orjson.dumps(message_schema(domain_of(topic))), media_type="application/schema+json")

    @app.get("/metrics")
    def prometheus() -> Response:
        """Return counters for Prometheus."""
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    return app


def _json(body: object, status: int, headers: Mapping[str, str] | None = None) -> Response:
    return Response(orjson.dumps(body), status, dict(headers or {}), media_type="application/json")


def _refuse_foreign_pages(request: Request) -> None:
    """Refuse what a browser sends on behalf of another web site: the gateway has no login that would stop it."""
    origin = request.headers.get("origin")
    foreign = origin is not None and origin.partition("://")[2] != request.headers.get("host")
    if foreign or request.headers.get("sec-fetch-site", "none") not in ("none", "same-origin"):
        raise _ProblemError(
            403, "foreign_site", "Another web site's page sent this request.", "Send records from a program."
        )


async def _read_body(request: Request, limit: int) -> bytes:
    """Read the body, at most `limit` bytes of it whatever the sender announces."""
    too_large = _ProblemError(
        413, "too_large", f"The request has more than {limit:,} bytes.", "Send the records in smaller batches."
    )
    announced = request.headers.get("content-length", "")
    if announced.isdigit() and int(announced) > limit:
        raise too_large
    parts: list[bytes] = []
    size = 0
    async for part in request.stream():
        size += len(part)
        if size > limit:
            raise too_large
        parts.append(part)
    return b"".join(parts)


def build() -> FastAPI:
    """Build the gateway from the environment."""
    from clinical_orchestration.settings import ClientSettings, Variables
    from clinical_orchestration.stores import kafka
    from clinical_orchestration.trials import available_trials, load_trial

    settings = ClientSettings()
    servers, options = settings.kafka_bootstrap_servers, settings.kafka_options
    return create_app(
        producer=lambda: kafka.ConfluentProducer(servers, delivery_timeout=10.0, options=options),
        admin=lambda: kafka.ConfluentTopicAdmin(servers, timeout=2.0, options=options),
        topics=Variables().topics(),
        trials={*available_trials(), load_trial(settings.trial).name},
        kafka_enabled=settings.kafka_enabled,
    )


def main(arguments: list[str] | None = None) -> None:
    """Parse the command line and serve until a signal ends it."""
    import uvicorn

    parser = argparse.ArgumentParser(prog="python -m clinical_orchestration.ingestion.gateway", description=__doc__)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8081)
    chosen = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    uvicorn.run(
        build(),
        host=chosen.host,
        port=chosen.port,
        access_log=False,  # requests are counted in /metrics
        log_config=None,
        timeout_graceful_shutdown=10,
    )


if __name__ == "__main__":
    main()
