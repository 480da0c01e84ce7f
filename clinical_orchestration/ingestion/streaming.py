"""Kafka to silver in micro-batches by Spark Structured Streaming: ``python -m ...streaming [run|start|status|stop]``.

An option beside the pipeline's own ingestion, with the same tables. Spark reads the topics and calls
:class:`.stream_batch.BronzeWriter` on its server for each micro-batch; this process starts the query, refines bronze
to silver after each micro-batch with the same function as the pipeline, and says how it is doing. The query's
checkpoint in S3 is progress only: what is in bronze is decided by the offsets in Delta, so that this job and the
pipeline may take turns, work side by side, or be killed, at any moment.

A query whose client was killed goes on filling bronze on the server; the next start takes it over, because a query of
the same checkpoint replaces the one before.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clinical_orchestration.ingestion.kafka import ingest_topics, offset_app
from clinical_orchestration.ingestion.status_file import StatusFile, read_status
from clinical_orchestration.ingestion.stream_batch import BronzeWriter
from clinical_orchestration.ingestion.worker_alerts import WorkerAlerts
from clinical_orchestration.tables import DOMAINS, DUPLICATES, QUARANTINE, bronze, silver

if TYPE_CHECKING:
    from clinical_orchestration.ingestion.silver import RefineReport
    from clinical_orchestration.settings import ClientSettings, Variables
    from clinical_orchestration.stores.kafka import TopicReader
    from clinical_orchestration.stores.spark import SparkSessions
    from clinical_orchestration.stores.tables import TableStore
    from clinical_orchestration.trials import TrialProfile

NAME = "streaming"
TITLE = "streaming job"
WHERE = "run/streaming.json and logs/streaming.log in the home of the stack"
BACK_OFF = (1.0, 2.0, 5.0, 10.0, 30.0, 60.0)
"""Seconds before the first, second ... new start of a query that failed; the last holds for all further ones."""

ONCE_TRIES = 3
"""Queries begun with `once`. After a kill the first one repeats a micro-batch; Spark 4.1 may fail once that is done,
because it does not know the newest offsets yet (``KafkaMicroBatchStream.metrics``)."""

WATCH_SECONDS = 0.5
TOPICS_SECONDS = 60.0
"""How often new topics are looked for."""

MAINTAIN_SECONDS = 900.0
"""How often the small files that micro-batches leave are merged."""

REFINE_RETRY_SECONDS = 10.0

_log = logging.getLogger(__name__)


class StreamFailedError(RuntimeError):
    """The query ended by itself; the message says why."""


@dataclass
class Progress:
    """What the query and the refining have done since this process began. Rows are Kafka offsets."""

    batch_id: int | None = None
    batches: int = 0
    rows: int = 0
    rows_per_second: float | None = None
    lag: int | None = None
    last_batch_at: float | None = None
    batch_seconds: float | None = None
    accepted: int = 0
    duplicates: int = 0
    quarantined: int = 0
    refined_at: float | None = None
    restarts: int = 0
    errors: int = 0
    last_error: str | None = None
    last_error_at: float | None = None
    topics: list[str] = field(default_factory=list)


class StreamingJob:
    """Runs the query and refines after it until it is stopped.

    Args:
        settings: addresses of Kafka, Spark and the lake.
        topics: bronze domain -> topic.
        default_trial: trial of messages without a label.
        profiles: profile by trial name, for refining.
        tables: the lakehouse.
        reader: makes a reader of the topics.
        interval: seconds between micro-batches.
        max_offsets: Kafka offsets in one micro-batch at most, of all topics together.
        once: end when everything that was there at the start is in silver.
        status: where the job says how it is doing.
        alerts: whom it tells that it cannot work.
    """

    def __init__(
        self,
        settings: ClientSettings,
        topics: Mapping[str, str],
        *,
        default_trial: str,
        profiles: Callable[[], Mapping[str, TrialProfile]],
        tables: TableStore,
        reader: Callable[[], TopicReader],
        interval: float = 30.0,
        max_offsets: int = 20_000,
        once: bool = False,
        status: StatusFile | None = None,
        alerts: WorkerAlerts | None = None,
    ) -> None:
        from clinical_orchestration.settings import lake_root
        from clinical_orchestration.stores.spark import SparkSessions

        self.stopping = threading.Event()
        self.state = "starting"
        self.progress = Progress()
        self._settings = settings
        self._topics = dict(topics)
        self._trial = default_trial
        self._profiles = profiles
        self._tables = tables
        self._reader = reader
        self._interval = interval
        self._max_offsets = max_offsets
        self._once = once
        self._status = status
        self._alerts = alerts or WorkerAlerts(None, NAME, TITLE, WHERE)
        self._root = lake_root(settings)
        self._sessions: SparkSessions = SparkSessions(settings)
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="refine")
        self._refining: Future[RefineReport] | None = None
        # when silver is to be brought up to bronze; at the start for what an earlier process left there
        self._due: float | None = 0.0
        self._seen: tuple[str, int, str] | None = None
        self._begun = 0
        self._maintained = time.monotonic()
        self._started_at = time.time()

    @property
    def checkpoint(self) -> str:
        """Where the query keeps its progress: beside the tables."""
        return f"{self._root}/checkpoints/streaming"

    # --- life

    def run(self) -> int:
        """Work until :attr:`stopping` is set, or, with `once`, until all is done; return the exit status.

        A query that fails is started anew, ever more slowly; with `once`, the third that fails is the end.
        """
        failures = 0
        try:
            while not self.stopping.is_set():
                began = time.monotonic()
                try:
                    self._stream()
                    if self._once:
                        self.progress.last_error = None  # of a try before
                        break
                except Exception as error:  # of Spark, Kafka, the lake: all of them come back
                    self._failed(error)
                    if self._once and failures + 1 >= ONCE_TRIES:
                        return 1
                    failures = 0 if time.monotonic() - began > 300 else failures
                    self._pause(BACK_OFF[min(failures, len(BACK_OFF) - 1)])
                    failures += 1
                    self.progress.restarts += 1
            self._show("stopped")
            return 0
        finally:
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._sessions.close()

    def _stream(self) -> None:
        """Run one query until it fails, the topics change, or the job is stopped."""
        self._show("starting")
        topics = self._present()
        while not topics and not self._once:
            self._show("waiting for topics")
            if self.stopping.wait(min(TOPICS_SECONDS, 5.0)):
                return
            topics = self._present()
        self.progress.topics = sorted(topics.values())
        if self.progress.restarts:
            self._take_in_what_is_left(topics)
        query = self._start(topics) if topics else None
        looked = time.monotonic()
        try:
            while not self.stopping.is_set():
                active = query is not None and query.isActive
                if query is not None:
                    self._note_progress(query)
                if not active:
                    self._raise_if_failed(query)
                    if self._once:
                        self._take_in_what_is_left(topics)
                        self._refine_to_the_end()
                        return
                    raise StreamFailedError("the query ended, maybe because another start took it over")
                self._refine_when_due()
                self._show("running")
                if self._seen is not None:  # a micro-batch of this query has ended well
                    self._alerts.working()
                if time.monotonic() - looked > TOPICS_SECONDS:
                    looked = time.monotonic()
                    if self._present() != topics:
                        return
                self.stopping.wait(WATCH_SECONDS)
        finally:
            self._end(query)

    def _present(self) -> dict[str, str]:
        """Return the topics that exist: Spark does not start with one that does not."""
        reader = self._reader()
        try:
            existing = set(reader.topics())
        finally:
            reader.close()
        return {domain: topic for domain, topic in self._topics.items() if topic in existing}

    def _start(self, topics: Mapping[str, str]) -> Any:
        self._seen = None
        for domain in topics:
            self._tables.ensure(bronze(domain))
        session = self._sessions.get()
        # a batch that its own session does not end is replaced by the next start
        session.conf.set("spark.sql.streaming.stopActiveRunOnRestart", "true")
        stream = (
            session.readStream.format("kafka")
            .option("kafka.bootstrap.servers", self._settings.kafka_bootstrap_servers)
            .option("subscribe", ",".join(topics.values()))
            .option("startingOffsets", json.dumps(self._starting_offsets(topics)))
            .option("maxOffsetsPerTrigger", self._max_offsets)
            .option("includeHeaders", "true")
            .option("kafka.isolation.level", "read_committed")
            # a loss is found by the offsets in Delta, which know what was ingested before it
            .option("failOnDataLoss", "false")
            .options(**java_options(self._settings.kafka_options))
            .load()
            .selectExpr(
                "topic", "partition", "offset", "unix_millis(timestamp) AS timestamp_ms", "key", "value", "headers"
            )
        )
        options = dict(self._settings.kafka_options)
        writer = BronzeWriter(self._settings.kafka_bootstrap_servers, self._root, dict(topics), self._trial, options)
        path = self.checkpoint
        sink = (
            stream.writeStream.queryName(f"{NAME}-{os.getpid()}")
            .foreachBatch(_as_function(writer))
            .option("checkpointLocation", f"s3a://{path[5:]}" if path.startswith("s3://") else path)
        )
        query = (
            sink.trigger(availableNow=True)
            if self._once
            else sink.trigger(processingTime=f"{self._interval:g} seconds")
        ).start()
        _log.info("query %s reads %s every %g s", query.runId, ", ".join(topics.values()), self._interval)
        return query

    def _take_in_what_is_left(self, topics: Mapping[str, str]) -> None:
        """Bring into bronze, as the pipeline does, what a query left in the topics; the offsets in Delta decide.

        A query that began with a repeated micro-batch may end, and fail, before it has read the newest records.
        """
        reader = self._reader()
        try:
            report = ingest_topics(
                self._tables, reader, topics, default_trial=self._trial, max_batch_rows=self._max_offsets
            )
        finally:
            reader.close()
        if report.rows:
            _log.info("%d records that a query had left are in bronze", report.rows)
            self.progress.rows += report.rows
            self._due = 0.0

    def _starting_offsets(self, topics: Mapping[str, str]) -> dict[str, dict[str, int]]:
        """Return where a query without a checkpoint begins: where the offsets in Delta end."""
        reader = self._reader()
        try:
            starts: dict[str, dict[str, int]] = {}
            self._begun = 0
            for domain, topic in topics.items():
                table = bronze(domain)
                for partition, bounds in reader.offsets(topic).items():
                    recorded = self._tables.transaction_version(table, offset_app(topic, partition))
                    start = bounds.begin if recorded is None else min(max(recorded, bounds.begin), bounds.end)
                    starts.setdefault(topic, {})[str(partition)] = start
                    self._begun += start
            return starts
        finally:
            reader.close()

    def _raise_if_failed(self, query: Any) -> None:
        error = query.exception() if query is not None else None
        if error is not None:
            raise StreamFailedError(_cause(str(error)))

    def _end(self, query: Any) -> None:
        """Stop the query and wait for a refining that is at work."""
        if query is not None:
            try:
                query.stop()
            except Exception as error:  # a server that is gone has stopped it
                _log.warning("the query could not be stopped: %s", _cause(str(error)))
        self._wait_for_refining()
        self._collect()
        if self.stopping.is_set() and self._due is not None:
            self._due = None
            self._refining = self._pool.submit(self._refine)
            self._wait_for_refining()
            self._collect()

    def _wait_for_refining(self) -> None:
        while self._refining is not None and not self._refining.done():
            self._show("finishing")
            time.sleep(0.2)

    # --- silver

    def _refine_when_due(self) -> None:
        if self._refining is not None:
            if not self._refining.done():
                return
            self._collect()
        if self._due is not None and time.monotonic() >= self._due:
            self._due = None
            self._refining = self._pool.submit(self._refine)

    def _collect(self) -> None:
        """Take the outcome of a refining; one that failed is tried again after a while."""
        future, self._refining = self._refining, None
        if future is None:
            return
        try:
            report = future.result()
        except Exception as error:
            self._note(error)
            self._due = time.monotonic() + REFINE_RETRY_SECONDS
            return
        progress = self.progress
        progress.accepted += report.total("accepted")
        progress.duplicates += report.total("duplicates")
        progress.quarantined += report.total("quarantined")
        progress.refined_at = time.time()

    def _refine(self) -> RefineReport:
        from clinical_orchestration.ingestion.silver import refine
        from clinical_orchestration.stores.locks import REFINE, exclusive
        from clinical_orchestration.stores.spark import spark_tables

        # a run of the pipeline may be at it: then there is nothing left to do here, or little
        with exclusive(REFINE, self._tables.uri(QUARANTINE), wait=60, settings=self._settings):
            spark = spark_tables(self._tables, self._settings, self._sessions)
            report = refine(spark, self._tables, self._profiles(), now=datetime.now(UTC))
            if time.monotonic() - self._maintained > MAINTAIN_SECONDS:
                self._maintained = time.monotonic()
                for name in (*map(bronze, DOMAINS), *map(silver, DOMAINS), QUARANTINE, DUPLICATES):
                    self._tables.maintain(name)
        return report

    def _refine_to_the_end(self) -> None:
        """Refine what the last micro-batch brought, and let an error be one."""
        self._wait_for_refining()
        self._collect()
        self._due = None
        self._refining = self._pool.submit(self._refine)
        self._wait_for_refining()
        self._refining.result()
        self._collect()

    # --- what others see

    def _note_progress(self, query: Any) -> None:
        told = query.lastProgress
        if told is None:
            return
        values = dict(told)
        progress = self.progress
        begun, ended, latest = (_offsets(values, name) for name in ("startOffset", "endOffset", "latestOffset"))
        if ended is None:
            return
        progress.lag = max(0, (ended if latest is None else latest) - ended)
        identity = (str(values.get("runId")), int(values["batchId"]), str(values.get("timestamp")))
        if identity == self._seen:
            return
        self._seen = identity
        # the first batch without a checkpoint has no start of its own
        rows = ended - (self._begun if begun is None else begun)
        seconds = float((values.get("durationMs") or {}).get("triggerExecution", 0)) / 1000
        progress.batch_id = int(values["batchId"])
        if rows <= 0:
            progress.rows_per_second = 0.0
            return
        progress.batches += 1
        progress.rows += rows
        progress.batch_seconds = round(seconds, 3)
        progress.rows_per_second = round(rows / seconds, 1) if seconds else None
        progress.last_batch_at = time.time()
        self._due = 0.0

    def report(self) -> dict[str, Any]:
        """Return the state as JSON types."""
        return {
            "state": self.state,
            "interval_seconds": self._interval,
            "checkpoint": self.checkpoint,
            **vars(self.progress),
            "running_since": self._started_at,
        }

    def _show(self, state: str) -> None:
        changed, self.state = state != self.state, state
        if self._status is not None:
            self._status.write(self.report(), now=changed)

    def _note(self, error: Exception) -> None:
        text = _cause(f"{type(error).__name__}: {error}")
        if text != self.progress.last_error:
            _log.warning("%s", text)
        self.progress.errors += 1
        self.progress.last_error, self.progress.last_error_at = text, time.time()

    def _failed(self, error: Exception) -> None:
        self._note(error)
        self._show("degraded")

    def _pause(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not self.stopping.is_set() and (left := deadline - time.monotonic()) > 0:
            self.stopping.wait(min(left, 2.0))
            self._show(self.state)
            self._alerts.degraded(
                self.progress.last_error or "no reason given",
                "See the job's log; the pipeline takes the topics in meanwhile.",
            )


def java_options(options: Mapping[str, str]) -> dict[str, str]:
    """Return options of librdkafka as those of Spark's source, whose client is the Java one.

    Security is carried over: protocol, SASL with user and password, the CA as a PEM file on the server's machine.
    Others are for the client here only.
    """
    given = {name: str(value) for name, value in options.items()}
    found: dict[str, str] = {}
    if "security.protocol" in given:
        found["kafka.security.protocol"] = given["security.protocol"].upper()
    mechanism = given.get("sasl.mechanisms") or given.get("sasl.mechanism")
    if mechanism:
        found["kafka.sasl.mechanism"] = mechanism
        module = "scram.ScramLoginModule" if mechanism.upper().startswith("SCRAM") else "plain.PlainLoginModule"
        user, password = (
            given.get(name, "").replace("\\", "\\\\").replace('"', '\\"') for name in ("sasl.username", "sasl.password")
        )
        found["kafka.sasl.jaas.config"] = (
            f'org.apache.kafka.common.security.{module} required username="{user}" password="{password}";'
        )
    if "ssl.ca.location" in given:
        found |= {
            "kafka.ssl.truststore.type": "PEM",
            "kafka.ssl.truststore.location": given["ssl.ca.location"],
        }
    if given.get("ssl.endpoint.identification.algorithm") == "none":
        found["kafka.ssl.endpoint.identification.algorithm"] = ""
    return found


def _as_function(writer: BronzeWriter) -> Callable[[Any, int], None]:
    """Return the writer as a plain function, which is what Spark Connect takes."""

    def write(frame: Any, batch_id: int) -> None:
        writer(frame, batch_id)

    return write


def _offsets(progress: Mapping[str, Any], name: str) -> int | None:
    """Return the sum of a progress's offsets over topics and partitions; None where there are none yet."""
    total: int | None = None
    for source in progress.get("sources") or ():
        value = dict(source).get(name)
        if isinstance(value, str):
            try:
                value = json.loads(value)
            except ValueError:
                continue
        if isinstance(value, Mapping):
            total = (total or 0) + sum(int(offset) for partitions in value.values() for offset in partitions.values())
    return total


def _cause(text: str) -> str:
    """Return the line of an error of Spark that says what happened: that of the Python function, or the first."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    named = [line for line in lines if re.match(r"(?:[a-z_]+\.)*[A-Z]\w*(?:Error|Exception): ", line)]
    own = [line for line in named if line.startswith("clinical_orchestration.")]
    return (own or named[:1] or lines[:1] or ["no reason given"])[-1][:500]


def build(
    *, interval: float, max_offsets: int = 20_000, once: bool = False, settings: ClientSettings | None = None
) -> StreamingJob:
    """Return the job of the deployment that the environment describes."""
    from clinical_orchestration.settings import ClientSettings as Settings
    from clinical_orchestration.settings import Variables
    from clinical_orchestration.stores import kafka
    from clinical_orchestration.stores.alerts import build_notifier
    from clinical_orchestration.stores.tables import DeltaTableStore
    from clinical_orchestration.trials import available_trials, load_trial

    settings = settings or Settings()
    chosen = load_trial(settings.trial)

    def profiles() -> dict[str, TrialProfile]:
        # anew for each batch, as the pipeline does: a trial that was added counts at once
        return {**{name: load_trial(name) for name in available_trials()}, chosen.name: chosen}

    variables: Variables = Variables()
    return StreamingJob(
        settings,
        variables.topics(),
        default_trial=chosen.name,
        profiles=profiles,
        tables=DeltaTableStore.from_settings(settings),
        reader=lambda: kafka.topic_reader(settings),
        interval=interval,
        max_offsets=max_offsets,
        once=once,
        status=StatusFile(settings.home, NAME),
        alerts=WorkerAlerts(lambda: build_notifier(settings), NAME, TITLE, WHERE),
    )


def seconds_of(text: str) -> float:
    """Read ``30s``, ``5m``, ``1h`` or a number of seconds.

    Raises:
        argparse.ArgumentTypeError: it is none of these, or not above zero.
    """
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*(s|m|h)?\s*", text)
    value = float(match[1]) * {"s": 1, "m": 60, "h": 3600}[match[2] or "s"] if match else 0.0
    if value <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no time such as 30s or 5m")
    return value


def main(arguments: list[str] | None = None) -> int:
    """Run the job, or start, stop or show it; return the exit status."""
    from clinical_orchestration.settings import ClientSettings

    parser = argparse.ArgumentParser(prog="python -m clinical_orchestration.ingestion.streaming", description=__doc__)
    parser.add_argument("command", nargs="?", choices=("run", "start", "status", "stop"), default="run")
    default = os.environ.get("CLINICAL_STREAMING_INTERVAL", "30s")
    parser.add_argument("--interval", type=seconds_of, default=default, help="between micro-batches (default 30s)")
    parser.add_argument("--max-offsets", type=int, default=20_000, help="Kafka offsets in one micro-batch at most")
    parser.add_argument("--once", action="store_true", help="take in what is there, then end")
    chosen = parser.parse_args(arguments)
    settings = ClientSettings()
    found = read_status(settings.home, NAME)
    running = found is not None and found["running"] and found["pid"] != os.getpid()
    if chosen.command == "status":
        sys.stdout.write(json.dumps(found or {"state": "not running"}, indent=1) + "\n")
        return 0 if running else 1
    if chosen.command == "stop":
        return _stop(settings.home, found if running else None)
    if running and found is not None:
        sys.stderr.write(f"the streaming job runs already (pid {found['pid']}); stop it first\n")
        return 1
    if chosen.command == "start":
        passed = ["--interval", f"{chosen.interval:g}s", "--max-offsets", str(chosen.max_offsets)]
        return _start_detached(settings.home, [*passed, *(["--once"] if chosen.once else [])])
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    job = build(interval=chosen.interval, max_offsets=chosen.max_offsets, once=chosen.once)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: job.stopping.set())
    return job.run()


def _start_detached(home: Path, arguments: list[str], patience: float = 180.0) -> int:
    """Start the job as a process of its own and wait until its query runs."""
    log = home / "logs" / f"{NAME}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as stream:
        process = subprocess.Popen(
            [sys.executable, "-m", "clinical_orchestration.ingestion.streaming", "run", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=stream,
            start_new_session=True,
        )
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline:
        found = read_status(home, NAME)
        if found is not None and found["pid"] == process.pid and found["state"] not in ("starting", "degraded"):
            sys.stdout.write(f"the streaming job runs (pid {process.pid}); its log: {log}\n")
            return 0
        if process.poll() is not None:
            sys.stderr.write(f"the streaming job ended with status {process.returncode}; its log: {log}\n")
            return 0 if process.returncode == 0 else 1
        time.sleep(0.2)
    error = (read_status(home, NAME) or {}).get("last_error")
    sys.stderr.write(f"the query does not run yet: {error or 'no reason given'}; the job tries on. Its log: {log}\n")
    return 1


def _stop(home: Path, found: Mapping[str, Any] | None, patience: float = 120.0) -> int:
    if found is None:
        sys.stdout.write("the streaming job does not run\n")
        return 0
    os.kill(int(found["pid"]), signal.SIGTERM)
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline:
        now = read_status(home, NAME)
        if now is None or not now["running"] or now["pid"] != found["pid"]:
            sys.stdout.write("stopped; the tables have all that its last micro-batch brought\n")
            return 0
        time.sleep(0.2)
    sys.stderr.write(f"it did not end within {patience:.0f} s (pid {found['pid']})\n")
    return 1


if __name__ == "__main__":
    sys.exit(main())
