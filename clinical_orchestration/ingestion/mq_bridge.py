"""Laboratory results from an IBM MQ queue to Kafka, each exactly once: ``python -m ...mq_bridge [run|status]``.

The REST API of MQ has no syncpoint, so a message is browsed, stored in Kafka, and only then removed. Its records and
the fact that it was moved are one Kafka transaction: the fact is a record of the compacted topic
``mq-bridge-progress`` under the message's id. A bridge that is killed at any moment has either stored both or none.
Its successor ends the open transaction, reads the progress, and of a message that is still on the queue although it
was moved it only does the removal. Readers of ``lab-results`` must read committed records; the platform's do.

A message is JSON (one laboratory result of the contract, or an array of these) or an HL7 v2 ORU^R01, which gives a
record for each final result. Whether values are plausible is judged in silver, where everything is accounted for. A
message that cannot be read goes to the backout queue with its reasons, and only then is removed; its id is the
correlation id there, by which a successor sees that it was put. Messages that are no text cannot be touched through
REST: they are counted as stuck, passed over, and tried again from time to time.
"""

from __future__ import annotations

import argparse
import json
import logging
import random
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, tzinfo
from typing import Any, Protocol

import orjson

from clinical_orchestration.alerts.model import Severity
from clinical_orchestration.ingestion.kafka import TRIAL_HEADER
from clinical_orchestration.ingestion.status_file import StatusFile, read_status
from clinical_orchestration.ingestion.worker_alerts import WorkerAlerts
from clinical_orchestration.stores.ibm_mq import (
    MessageQueue,
    MqError,
    MqMessage,
    MqSettings,
    UnreadableMessageError,
)
from clinical_orchestration.stores.kafka import (
    FencedError,
    OffsetRange,
    Record,
    RecordRefusedError,
    TopicReader,
    Transactions,
)
from clinical_orchestration.transforms.hl7 import looks_like_hl7, read_oru
from clinical_orchestration.transforms.messages import parse_object

NAME = "mq_bridge"
TITLE = "IBM MQ bridge"
WHERE = "run/mq_bridge.json and logs/mq_bridge.log in the home of the stack"
MESSAGE_ID_HEADER = "mq-message-id"
MAX_RECORD_BYTES = 900_000
"""Below the largest message that brokers take by default."""

BACK_OFF = (0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
"""Seconds before the first, second ... try after an error; the last holds for all further ones."""

STUCK_SECONDS = 60.0
"""How often a message that is no text is tried again."""

OFF = "off: not configured"
CURE = (
    "Set CLINICAL_MQ_URL (https://host:9443), CLINICAL_MQ_QUEUE_MANAGER, CLINICAL_MQ_QUEUE, CLINICAL_MQ_USER and "
    "CLINICAL_MQ_PASSWORD, or CLINICAL_MQ=true and the connection lab_processor; then stop and start the stack."
)

_log = logging.getLogger(__name__)


class TopicMaker(Protocol):
    """What the bridge needs of a topic admin."""

    def ensure_topics(
        self, topics: Iterable[str], *, partitions: int = 3, config: Mapping[str, str] | None = None
    ) -> list[str]:
        """Make the topics that do not exist."""


@dataclass(frozen=True)
class Decoded:
    """What one MQ message gives: record values, or the reasons why none.

    `withheld` counts results of an HL7 message that are not final.
    """

    values: list[bytes] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)
    withheld: Counter[str] = field(default_factory=Counter)


def decode(body: str, *, zone: tzinfo = UTC, identifier_types: Sequence[str] = ()) -> Decoded:
    """Return the laboratory messages in the body of an MQ message.

    JSON objects are passed on as they came; whether they keep the contract is silver's to say. Reasons never repeat
    text of the body.
    """
    withheld: Counter[str] = Counter()
    if looks_like_hl7(body):
        report = read_oru(body, zone=zone, identifier_types=identifier_types)
        if report.reasons:
            return Decoded(reasons=report.reasons)
        values, withheld = [orjson.dumps(message) for message in report.messages], report.withheld
    elif body.lstrip("\ufeff \t\r\n").startswith("["):
        values, reasons = _array(body)
        if reasons:
            return Decoded(reasons=reasons)
    else:
        parsed, reasons = parse_object(body.lstrip("\ufeff"))
        if parsed is None or reasons:
            return Decoded(reasons=reasons)
        values = [body.strip("\ufeff \t\r\n").encode()]
    if any(len(value) > MAX_RECORD_BYTES for value in values):
        return Decoded(reasons=[f"too_large: a record has more than {MAX_RECORD_BYTES:,} bytes"])
    return Decoded(values, withheld=withheld)


def _array(body: str) -> tuple[list[bytes], list[str]]:
    try:
        items = orjson.loads(body.lstrip("\ufeff"))
    except orjson.JSONDecodeError as error:
        return [], [f"invalid_json: not JSON, at line {error.lineno} column {error.colno}"]
    if not items:
        return [], ["empty: the array has no record"]
    wrong = [index for index, item in enumerate(items) if not isinstance(item, dict)]
    if wrong:
        return [], [f"not_an_object: {len(wrong)} of {len(items)} elements are no objects, the first is {wrong[0]}"]
    return [orjson.dumps(item) for item in items], []


@dataclass
class Counts:
    """What this process has done so far, and what it last saw."""

    moved: int = 0  # messages whose records were committed
    records: int = 0
    suppressed: int = 0  # messages that an earlier process had moved and not removed
    removed: int = 0
    poison: int = 0  # messages put to the backout queue
    withheld: Counter[str] = field(default_factory=Counter)  # results that are not final, by HL7 status
    reasons: Counter[str] = field(default_factory=Counter)  # rule -> messages on the backout queue
    errors: int = 0


@dataclass(slots=True)
class _Moved:
    """A message whose records are in Kafka: since when, and whether it is gone from the queue."""

    at: float
    removed: bool = False


class Bridge:
    """Moves messages until it is stopped.

    Args:
        queue: the queue manager.
        settings: queues, thresholds and pauses.
        transactions: the producer, which has a transactional id of this queue's own.
        reader: makes a reader of committed records; one for each look at the progress.
        topics: makes the progress topic.
        topic: Kafka topic of the results.
        trial: trial that is written on the records.
        status: where the bridge says how it is doing.
        alerts: whom it tells what needs a person.
        now: the clock, in seconds since the epoch.
    """

    def __init__(
        self,
        queue: MessageQueue,
        settings: MqSettings,
        *,
        transactions: Transactions,
        reader: Callable[[], TopicReader],
        topics: TopicMaker,
        topic: str,
        trial: str,
        status: StatusFile | None = None,
        alerts: WorkerAlerts | None = None,
        now: Callable[[], float] = time.time,
    ) -> None:
        from zoneinfo import ZoneInfo

        self.counts = Counts()
        self.stopping = threading.Event()
        self.state = "starting"
        self.depth: int | None = None
        self.last_error: str | None = None
        self._queue = queue
        self._settings = settings
        self._transactions = transactions
        self._reader = reader
        self._topics = topics
        self._topic = topic
        self._trial = trial.encode()
        self._status = status
        self._alerts = alerts or WorkerAlerts(None, NAME, TITLE, WHERE)
        self._now = now
        self._zone: tzinfo = ZoneInfo(settings.time_zone)
        self._types = [item.strip() for item in settings.identifier_types.split(",") if item.strip()]
        self._moved: dict[str, _Moved] = {}
        self._tries: Counter[str] = Counter()
        self._stuck: dict[str, float] = {}
        self._last_error_at: float | None = None
        self._last_moved_at: float | None = None
        self._started_at = now()

    # --- life

    def run(self) -> None:
        """Move messages until :attr:`stopping` is set; after an error connect anew, ever more slowly.

        Raises:
            FencedError: another bridge of the same queue has taken over.
        """
        failures, connected = 0, False
        self._show("connecting")
        while not self.stopping.is_set():
            try:
                if not connected:
                    self.connect()
                    connected = True
                worked = self.cycle()
                failures = 0
                self._show("running")
                self._alerts.working()
                if not worked:
                    self.stopping.wait(self._settings.poll_seconds)
            except FencedError as error:
                self._failed(error)
                raise
            except (RuntimeError, LookupError, OSError) as error:  # of MQ, of Kafka, of a transaction
                # after a failed transaction only Kafka knows what is moved
                connected = connected and isinstance(error, MqError)
                self._failed(error)
                pause = BACK_OFF[min(failures, len(BACK_OFF) - 1)] * random.uniform(0.8, 1.2)
                failures += 1
                self._pause(pause)
        self._show("stopped")

    def connect(self) -> None:
        """Take over from any earlier bridge of this queue and read which messages were moved."""
        self._show("connecting")
        self._topics.ensure_topics([self._settings.progress_topic], partitions=1, config={"cleanup.policy": "compact"})
        self._transactions.start()
        removed = {identifier for identifier, moved in self._moved.items() if moved.removed}
        self._moved = {identifier: _Moved(at, identifier in removed) for identifier, at in self._progress().items()}

    def _progress(self) -> dict[str, float]:
        """Return time moved by message id, as far as it was committed and not forgotten."""
        prefix = f"{self._settings.queue_manager}/{self._settings.queue}/"
        found: dict[str, float] = {}
        reader = self._reader()
        try:
            ranges = {
                partition: OffsetRange(bounds.begin, bounds.end)
                for partition, bounds in reader.offsets(self._settings.progress_topic).items()
            }
            for batch in reader.read(self._settings.progress_topic, ranges, max_messages=10_000):
                self._show("connecting")
                for message in batch.messages:
                    key = (message.key or b"").decode("utf-8", "replace")
                    if not key.startswith(prefix):
                        continue
                    if message.value is None:
                        found.pop(key[len(prefix) :], None)
                    else:
                        found[key[len(prefix) :]] = float(orjson.loads(message.value)["moved_at"])
        finally:
            reader.close()
        return found

    def close(self) -> None:
        """Release connections."""
        self._transactions.close()
        self._queue.close()

    # --- one turn

    def cycle(self) -> bool:
        """Move the messages at the head of the queue; return whether there was anything to do."""
        settings = self._settings
        listed = self._queue.listing(settings.queue, limit=settings.batch + len(self._stuck))
        self.depth = len(listed)
        identifiers = list(dict.fromkeys(item.message_id for item in listed))
        now = self._now()
        self._stuck = {
            identifier: since
            for identifier, since in self._stuck.items()
            if identifier in identifiers and now - since < STUCK_SECONDS
        }
        waiting = [identifier for identifier in identifiers if identifier not in self._stuck]
        batch: list[tuple[str, list[Record]]] = []
        poison: list[tuple[MqMessage, list[str]]] = []
        done: list[str] = []
        for identifier in waiting[: settings.batch]:
            if self.stopping.is_set():
                break
            if identifier in self._moved:
                self.counts.suppressed += not self._moved[identifier].removed
                done.append(identifier)
                continue
            self._show("running")
            message = self._browsed(identifier)
            if message is None:
                continue
            decoded = self._decoded(message)
            if decoded.reasons:
                poison.append((message, decoded.reasons))
            else:
                self.counts.withheld.update(decoded.withheld)
                batch.append((identifier, self._records(identifier, decoded.values)))
        done += self._commit(batch)
        for identifier in done:
            self._show("running")
            self._remove(identifier)
        # last, so that a backout queue that is full holds up nothing but what belongs there
        set_aside = sum([self._set_aside(message, reasons) for message, reasons in poison])
        self._forget()
        # the tries of a message that cannot be read are a pause apart
        return bool(done or set_aside or len(waiting) > settings.batch)

    def _browsed(self, identifier: str) -> MqMessage | None:
        """Return a message; None where it is gone or cannot be got."""
        try:
            return self._queue.browse(self._settings.queue, identifier)
        except UnreadableMessageError as error:
            self._stuck[identifier] = self._now()
            self._note(error)
            return None

    def _decoded(self, message: MqMessage) -> Decoded:
        try:
            return decode(message.body, zone=self._zone, identifier_types=self._types)
        except Exception as error:  # whatever a payload does to the decoder, the others must go on
            return Decoded(reasons=[f"not_decodable: {type(error).__name__}"])

    def _records(self, identifier: str, values: Sequence[bytes]) -> list[Record]:
        headers = ((MESSAGE_ID_HEADER, identifier.encode()), (TRIAL_HEADER, self._trial))
        return [Record(self._topic, value, identifier.encode(), headers) for value in values]

    def _progress_record(self, identifier: str, moved_at: float | None) -> Record:
        key = f"{self._settings.queue_manager}/{self._settings.queue}/{identifier}".encode()
        value = None if moved_at is None else orjson.dumps({"moved_at": moved_at})
        return Record(self._settings.progress_topic, value, key)

    def _commit(self, batch: list[tuple[str, list[Record]]]) -> list[str]:
        """Store the records of messages together with the fact, and return the ids of those that are stored."""
        if not batch:
            return []
        now = self._now()
        records = [record for _, own in batch for record in own]
        facts = [self._progress_record(identifier, now) for identifier, _ in batch]
        try:
            self._transactions.commit([*records, *facts])
        except RecordRefusedError as error:
            if len(batch) > 1:  # one by one, to see whose record it is
                return [identifier for one in batch for identifier in self._commit([one])]
            message = self._browsed(batch[0][0])
            if message is not None:
                names = ", ".join(sorted(set(error.refused.values())))
                self._set_aside(message, [f"too_large: Kafka refused a record ({names})"])
            return []
        for identifier, own in batch:
            self._moved[identifier] = _Moved(now)
            self._tries.pop(identifier, None)
            self.counts.moved += 1
            self.counts.records += len(own)
        self._last_moved_at = now
        return [identifier for identifier, _ in batch]

    def _remove(self, identifier: str) -> None:
        found = self._queue.remove(self._settings.queue, identifier)
        self.counts.removed += found
        self._moved[identifier].removed = True

    def _set_aside(self, message: MqMessage, reasons: Sequence[str]) -> bool:
        """Put a message that cannot be read to the backout queue, once it was tried often enough; return whether."""
        settings, identifier = self._settings, message.message_id
        self._tries[identifier] += 1
        if self._tries[identifier] < settings.backout_threshold:
            return False
        # a process that was killed, or whose answer was lost, may have put it
        if not self._queue.listing(settings.backout_queue, limit=1, correlation_id=identifier):
            properties = {
                "clinical_reasons": " | ".join(reasons),
                "clinical_queue": settings.queue,
                "clinical_at": datetime.fromtimestamp(self._now(), tz=UTC).isoformat(),
            }
            if message.correlation_id:
                properties["clinical_correlation_id"] = message.correlation_id
            self._queue.put(settings.backout_queue, message.body, correlation_id=identifier, properties=properties)
        self._queue.remove(settings.queue, identifier)
        self._tries.pop(identifier, None)
        rules = {reason.partition(":")[0] for reason in reasons}
        self.counts.poison += 1
        self.counts.reasons.update(rules)
        _log.warning("message %s went to %s: %s", identifier, settings.backout_queue, ", ".join(sorted(rules)))
        self._alerts.tell(
            "poison",
            Severity.WARNING,
            "Laboratory messages that cannot be read",
            f"{self.counts.poison} messages went to the queue {settings.backout_queue} since the bridge was started; "
            f"their rules: {', '.join(f'{rule} {count}' for rule, count in self.counts.reasons.most_common())}.",
            "Look at the message property clinical_reasons there, have the sender correct them, and put them back.",
        )
        return True

    def _forget(self) -> None:
        """Forget messages that are gone from the queue for long, in Kafka too."""
        limit = self._now() - self._settings.remember_seconds
        old = [identifier for identifier, moved in self._moved.items() if moved.at <= limit][: self._settings.batch]
        for identifier in old:
            if not self._moved[identifier].removed:
                # of an earlier process, and not at the head of the queue: it may still be further behind
                self._queue.remove(self._settings.queue, identifier)
                self._moved[identifier].removed = True
        if old:
            self._transactions.commit([self._progress_record(identifier, None) for identifier in old])
            for identifier in old:
                del self._moved[identifier]

    # --- what others see

    def report(self) -> dict[str, Any]:
        """Return the state as JSON types; no texts of messages."""
        counts = self.counts
        return {
            "state": self.state,
            "queue": f"{self._settings.queue_manager}/{self._settings.queue}",
            "topic": self._topic,
            "moved": counts.moved,
            "records": counts.records,
            "suppressed": counts.suppressed,
            "removed": counts.removed,
            "poison": counts.poison,
            "poison_reasons": dict(counts.reasons),
            "withheld": dict(counts.withheld),
            "stuck": len(self._stuck),
            "depth": self.depth,
            "depth_is_minimum": self.depth is not None and self.depth >= self._settings.batch + len(self._stuck),
            "remembered": len(self._moved),
            "errors": counts.errors,
            "last_error": self.last_error,
            "last_error_at": self._last_error_at,
            "last_moved_at": self._last_moved_at,
            "running_since": self._started_at,
        }

    def _show(self, state: str) -> None:
        changed, self.state = state != self.state, state
        if self._status is not None:
            self._status.write(self.report(), now=changed)

    def _note(self, error: Exception) -> None:
        self.counts.errors += 1
        text = f"{error}"
        if text != self.last_error:
            _log.warning("%s", text)
        self.last_error, self._last_error_at = text, self._now()

    def _failed(self, error: Exception) -> None:
        self._note(error)
        self._show("degraded")

    def _pause(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not self.stopping.is_set() and (left := deadline - time.monotonic()) > 0:
            self.stopping.wait(min(left, 2.0))
            self._show(self.state)
            self._alerts.degraded(self.last_error or "no reason given", "Follow the advice in the error.")


def transactional_id(settings: MqSettings) -> str:
    """Return the name under which all bridges of one queue write: only one can at a time."""
    return f"mq-bridge-{settings.queue_manager}-{settings.queue}"


def build(settings: MqSettings | None = None) -> Bridge:
    """Return a bridge of the deployment that the environment describes.

    Raises:
        ValueError: the settings are wrong; the text says which.
    """
    from clinical_orchestration.settings import ClientSettings, Variables
    from clinical_orchestration.stores import kafka
    from clinical_orchestration.stores.alerts import build_notifier
    from clinical_orchestration.stores.ibm_mq import RestMessageQueue
    from clinical_orchestration.trials import load_trial

    settings = settings or MqSettings()
    client = ClientSettings()
    servers = client.kafka_bootstrap_servers
    return Bridge(
        RestMessageQueue(settings),
        settings,
        transactions=kafka.ConfluentTransactions(servers, transactional_id(settings), options=client.kafka_options),
        reader=lambda: kafka.topic_reader(client),
        topics=kafka.topic_admin(client),
        topic=Variables().kafka_lab_results_topic,
        trial=settings.trial or load_trial(client.trial).name,
        status=StatusFile(client.home, NAME),
        alerts=WorkerAlerts(lambda: build_notifier(client), NAME, TITLE, WHERE),
    )


def main(arguments: list[str] | None = None) -> int:
    """Run the bridge, or show its status; return the exit status (0 well, 1 failed, 2 not configured)."""
    from pydantic import ValidationError

    from clinical_orchestration.settings import ClientSettings

    parser = argparse.ArgumentParser(prog="python -m clinical_orchestration.ingestion.mq_bridge", description=__doc__)
    parser.add_argument("command", nargs="?", choices=("run", "status"), default="run")
    chosen = parser.parse_args(arguments)
    try:
        settings = MqSettings()
    except ValidationError as error:
        faults = "; ".join(f"CLINICAL_MQ_{str(item['loc'][0]).upper()}: {item['msg']}" for item in error.errors())
        sys.stderr.write(f"the settings of IBM MQ are wrong: {faults}\n")
        return 2
    if chosen.command == "status":
        found = read_status(ClientSettings().home, NAME)
        off = {"state": OFF, "what_to_do": CURE} if not settings.configured else {"state": "not running"}
        sys.stdout.write(json.dumps(found or off, indent=1) + "\n")
        return 0 if (found and found["running"]) or not settings.configured else 1
    if not settings.configured:
        sys.stderr.write(f"{OFF}. {CURE}\n")
        return 2
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)  # it tells of each request
    try:
        bridge = build(settings)
    except (ValueError, OSError, LookupError) as error:
        sys.stderr.write(f"the bridge cannot start: {error}\n")
        return 2
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: bridge.stopping.set())
    try:
        bridge.run()
    except FencedError as error:
        sys.stderr.write(f"{error}: another bridge moves this queue; stop one of them\n")
        return 1
    finally:
        bridge.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
