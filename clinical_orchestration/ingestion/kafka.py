"""Kafka topics into bronze tables exactly once, and a look at the topics' state.

The next offset of every partition is a Delta app transaction (``kafka:<topic>:<partition>``) in the same commit as the
rows before it. An ingest that is killed repeats nothing and loses nothing; of two that run at once, one moves a
position and the other notices before it commits. The identity of the topic is recorded too
(``kafka-topic:<topic>``), because offsets of a topic that was deleted and made again mean other messages.
"""

from __future__ import annotations

import base64
import hashlib
import logging
import random
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from clinical_orchestration.stores.kafka import (
    Message,
    OffsetOutOfRangeError,
    OffsetRange,
    TopicAdmin,
    TopicReader,
    UnknownTopicError,
)
from clinical_orchestration.stores.tables import TableStore, TransactionMovedError
from clinical_orchestration.tables import BRONZE_COLUMNS, arrow_schema, bronze

if TYPE_CHECKING:
    import pyarrow as pa

GROUP = "clinical-ingestion"
TRIAL_HEADER = "trial"
_RACES = 20  # attempts of one topic while other ingesters move its positions

_log = logging.getLogger(__name__)


class OffsetsLostError(RuntimeError):
    """Messages that were never ingested are gone, or a topic is not the one ingested before.

    Everything else was ingested.

    Attributes:
        problems: one sentence a partition or topic: what happened and what to do.
        report: what was ingested all the same.
    """

    def __init__(self, problems: Sequence[str], report: TopicIngestReport) -> None:
        self.problems = list(problems)
        self.report = report
        super().__init__("; ".join(self.problems))


@dataclass(slots=True)
class TopicIngest:
    """What one call ingested from one topic. Offsets are by partition; `after` is the next one to read."""

    domain: str
    topic: str
    rows: int = 0
    commits: int = 0
    before: dict[int, int] = field(default_factory=dict)
    after: dict[int, int] = field(default_factory=dict)
    lost: dict[int, int] = field(default_factory=dict)  # accepted losses: offsets skipped by partition
    races: int = 0  # times another ingester was faster


@dataclass(slots=True)
class TopicIngestReport:
    """What one call of :func:`ingest_topics` did."""

    topics: dict[str, TopicIngest] = field(default_factory=dict)  # by domain
    missing: list[str] = field(default_factory=list)  # topics that do not exist and never were ingested
    warnings: list[str] = field(default_factory=list)

    @property
    def rows(self) -> int:
        """Number of bronze rows written."""
        return sum(topic.rows for topic in self.topics.values())

    def as_metadata(self) -> dict[str, Any]:
        """Return counts for a run's metadata."""
        return {
            "rows": self.rows,
            "rows_by_table": {domain: topic.rows for domain, topic in self.topics.items()},
            "commits": sum(topic.commits for topic in self.topics.values()),
            "offsets": {topic.topic: {str(p): o for p, o in topic.after.items()} for topic in self.topics.values()},
            "missing_topics": self.missing,
            "warnings": self.warnings,
        }


def offset_app(topic: str, partition: int) -> str:
    """Return the app id whose Delta transaction version is the partition's next offset."""
    return f"kafka:{topic}:{partition}"


def identity_app(topic: str) -> str:
    """Return the app id whose Delta transaction version says which incarnation of a topic a bronze table holds."""
    return f"kafka-topic:{topic}"


def identity_version(topic_id: str) -> int:
    """Return a positive 62-bit number of a topic's identity: transaction versions are integers."""
    return int.from_bytes(hashlib.sha256(topic_id.encode()).digest()[:8], "big") >> 2


def ingest_topics(
    tables: TableStore,
    reader: TopicReader,
    topics: Mapping[str, str],
    *,
    default_trial: str,
    now: datetime | None = None,
    max_batch_rows: int = 20_000,
    admin: TopicAdmin | None = None,
    group: str = GROUP,
    accept_loss: bool = False,
) -> TopicIngestReport:
    """Append what is new in each topic, up to the ends seen at the start, to its bronze table.

    Args:
        tables: the lakehouse.
        reader: the topics.
        topics: bronze domain -> topic.
        default_trial: trial of messages without a ``trial`` header.
        now: UTC time of ingestion of all rows; default the time of each commit.
        max_batch_rows: most rows in one commit, and in memory.
        admin: where given, the new offsets are also published as those of `group`, so that Kafka's own tools show the
            lag. Nothing reads them back; a failure is a warning.
        group: the consumer group for that.
        accept_loss: go on behind messages that retention removed before they were ingested, instead of failing.

    Raises:
        OffsetsLostError: after everything else was ingested: messages were lost, or a topic was made anew.
        KafkaUnavailableError: no broker answers.
    """
    report = TopicIngestReport()
    problems: list[str] = []
    for domain, topic in topics.items():
        result = TopicIngest(domain, topic)
        try:
            _ingest_topic(tables, reader, result, problems, default_trial, now, max_batch_rows, accept_loss)
        except UnknownTopicError:
            report.missing.append(topic)
            if tables.transaction_version(bronze(domain), identity_app(topic)) is not None:
                problems.append(
                    f"topic {topic} was ingested before and no longer exists: restore it, or give "
                    f"the variable kafka_{domain}_topic the name of the topic that replaces it"
                )
            continue
        report.topics[domain] = result
        if admin is not None and result.after:
            _publish(admin, group, result, report)
    if problems:
        raise OffsetsLostError(problems, report)
    return report


def _ingest_topic(
    tables: TableStore,
    reader: TopicReader,
    result: TopicIngest,
    problems: list[str],
    default_trial: str,
    now: datetime | None,
    max_batch_rows: int,
    accept_loss: bool,
) -> None:
    topic, table = result.topic, bronze(result.domain)
    kept = reader.offsets(topic)
    identity = identity_version(reader.topic_id(topic))
    for attempt in range(_RACES):
        committed = {partition: tables.transaction_version(table, offset_app(topic, partition)) for partition in kept}
        known = tables.transaction_version(table, identity_app(topic))
        if known not in (None, identity):
            problems.append(_made_again(topic, result.domain))
            return
        ranges, found = _ranges(result, kept, committed, accept_loss)
        if not attempt:
            problems.extend(found)
            result.before = {partition: bounds.begin for partition, bounds in ranges.items()}
        result.after = {partition: max(bounds) for partition, bounds in ranges.items()}
        try:
            _append(tables, reader, result, ranges, committed, identity if known is None else None, default_trial, now,
                    max_batch_rows)  # fmt: skip
        except TransactionMovedError:
            result.races += 1
            time.sleep(random.uniform(0.01, 0.1))
        except OffsetOutOfRangeError:
            kept = {partition: OffsetRange(bounds.begin, kept[partition].end)
                    for partition, bounds in reader.offsets(topic).items() if partition in kept}  # fmt: skip
        else:
            return
    raise TransactionMovedError(f"other ingesters of topic {topic} moved its positions {_RACES} times; try again later")


def _ranges(
    result: TopicIngest, kept: Mapping[int, OffsetRange], committed: Mapping[int, int | None], accept_loss: bool
) -> tuple[dict[int, OffsetRange], list[str]]:
    """Return what is to be read of each partition, and what is wrong with the others."""
    ranges: dict[int, OffsetRange] = {}
    problems: list[str] = []
    for partition, bounds in kept.items():
        start = committed[partition]
        where = f"topic {result.topic}, partition {partition}"
        if start is None:
            start = bounds.begin
        elif bounds.end < start:
            problems.append(
                f"{where}: the log ends at offset {bounds.end}, before the ingested offset {start}; the log was "
                "truncated or restored from an older copy, and nothing was read from it. Restore the newer copy, or "
                f"send the messages to a topic of a new name and set the variable kafka_{result.domain}_topic to it"
            )
            continue
        elif bounds.begin > start:
            if not accept_loss:
                problems.append(
                    f"{where}: offsets {start} to {bounds.begin - 1} were removed by retention before they were "
                    "ingested; nothing was read from it. Have the senders send them again and run with "
                    '--conf {"accept_loss": true} to go on behind the gap; lengthen retention.ms or ingest more often'
                )
                continue
            result.lost[partition] = bounds.begin - start
            start = bounds.begin
        ranges[partition] = OffsetRange(start, bounds.end)
    return ranges, problems


def _append(
    tables: TableStore,
    reader: TopicReader,
    result: TopicIngest,
    ranges: Mapping[int, OffsetRange],
    committed: Mapping[int, int | None],
    identity: int | None,
    default_trial: str,
    now: datetime | None,
    max_batch_rows: int,
) -> None:
    """Commit batch by batch: rows, next offsets and, with the first, the topic's identity."""
    table = bronze(result.domain)
    recorded = dict(committed)
    for batch in reader.read(result.topic, ranges, max_messages=max_batch_rows):
        moved = {
            partition: offset
            for partition, offset in batch.positions.items()
            if partition in ranges and offset > ranges[partition].begin and offset != recorded[partition]
        }
        if not moved:
            continue
        transactions = {offset_app(result.topic, partition): offset for partition, offset in moved.items()}
        expected = {offset_app(result.topic, partition): recorded[partition] for partition in moved}
        if identity is not None:
            transactions[identity_app(result.topic)] = identity
            expected[identity_app(result.topic)] = None
        rows = bronze_rows(batch.messages, default_trial, now or datetime.now(UTC))
        if tables.append(table, rows, transactions=transactions, expected=expected) is not None:
            result.rows += rows.num_rows
            result.commits += 1
        recorded.update(moved)
        identity = None


def append_messages(
    tables: TableStore,
    reader: TopicReader,
    domain: str,
    topic: str,
    messages: Sequence[Message],
    *,
    default_trial: str,
    now: datetime | None = None,
    max_batch_rows: int = 20_000,
) -> TopicIngest:
    """Append messages of one topic that another consumer read, such as a micro-batch of Spark.

    The offsets in Delta decide, not the consumer's: messages that are in bronze are left out, and where the consumer
    began behind the recorded offset, or left out offsets on its way, what is there is read from the topic first: most
    often the markers of transactions, but a consumer may pass over records too. So this and :func:`ingest_topics`
    may take turns, or work at the same time.

    Args:
        tables: the lakehouse.
        reader: the topics, for their bounds and identity and for what the consumer skipped.
        domain: bronze domain of the topic.
        topic: the topic.
        messages: committed messages of the topic.
        default_trial: trial of messages without a ``trial`` header.
        now: UTC time of ingestion; default the time of each commit.
        max_batch_rows: most rows in one commit of what the consumer skipped.

    Raises:
        OffsetsLostError: messages between the recorded offset and the first of these are gone, or the topic is not
            the one ingested before.
    """
    table, result = bronze(domain), TopicIngest(domain, topic)
    received: dict[int, list[Message]] = {}
    for message in sorted(messages, key=lambda item: (item.partition, item.offset)):
        received.setdefault(message.partition, []).append(message)
    ends = {partition: own[-1].offset + 1 for partition, own in received.items()}
    unbroken = {partition: _unbroken_since(own) for partition, own in received.items()}
    kept = {partition: bounds for partition, bounds in reader.offsets(topic).items() if partition in received}
    identity = identity_version(reader.topic_id(topic))
    report = TopicIngestReport({domain: result})
    for _ in range(_RACES):
        committed = {partition: tables.transaction_version(table, offset_app(topic, partition)) for partition in kept}
        known = tables.transaction_version(table, identity_app(topic))
        if known not in (None, identity):
            raise OffsetsLostError([_made_again(topic, domain)], report)
        ranges, problems = _ranges(result, kept, committed, accept_loss=False)
        if problems:
            raise OffsetsLostError(problems, report)
        result.before = result.before or {partition: bounds.begin for partition, bounds in ranges.items()}
        result.after = {partition: max(ranges[partition].begin, end) for partition, end in ends.items()}
        wanted = {partition: end for partition, end in ends.items() if end > ranges[partition].begin}
        if not wanted:
            return result
        skipped = {
            partition: OffsetRange(ranges[partition].begin, unbroken[partition])
            for partition in wanted
            if ranges[partition].begin < unbroken[partition]
        }
        try:
            if skipped:  # the markers of transactions, or what the other consumer passed over
                _append(tables, reader, result, skipped, committed, identity if known is None else None, default_trial,
                        now, max_batch_rows)  # fmt: skip
                committed |= {partition: bounds.end for partition, bounds in skipped.items()}
                known = identity
            rows = bronze_rows(
                [
                    item
                    for partition in wanted
                    for item in received[partition]
                    if item.offset >= max(ranges[partition].begin, unbroken[partition])
                ],
                default_trial,
                now or datetime.now(UTC),
            )
            transactions = {offset_app(topic, partition): end for partition, end in wanted.items()}
            expected = {offset_app(topic, partition): committed[partition] for partition in wanted}
            if known is None:
                transactions[identity_app(topic)] = identity
                expected[identity_app(topic)] = None
            if tables.append(table, rows, transactions=transactions, expected=expected) is not None:
                result.rows += rows.num_rows
                result.commits += 1
            return result
        except TransactionMovedError:
            result.races += 1
            time.sleep(random.uniform(0.01, 0.1))
        except OffsetOutOfRangeError:  # retention removed it meanwhile: the next look says so
            kept = {partition: bounds for partition, bounds in reader.offsets(topic).items() if partition in received}
    raise TransactionMovedError(f"other ingesters of topic {topic} moved its positions {_RACES} times; try again later")


def _unbroken_since(messages: Sequence[Message]) -> int:
    """Return the offset from which on the messages of a partition, in their order, have no gap."""
    since = messages[-1].offset
    for message in reversed(messages[:-1]):
        if message.offset != since - 1:
            break
        since = message.offset
    return since


def _made_again(topic: str, domain: str) -> str:
    return (
        f"topic {topic} was deleted and made again after it was ingested, so its offsets name other messages; "
        "nothing was read from it. Send its messages to a topic of a new name and set the variable "
        f"kafka_{domain}_topic to that name"
    )


def bronze_rows(messages: Sequence[Message], default_trial: str, now: datetime) -> pa.Table:
    """Return the bronze rows of messages, in their order.

    A value that is no UTF-8 is kept as base64; a message without value has a null payload. A message without a time
    counts as received when it is ingested.
    """
    import pyarrow as pa

    payloads: list[str | None] = []
    encodings: list[str] = []
    for message in messages:
        payload, encoding = _payload(message.value)
        payloads.append(payload)
        encodings.append(encoding)
    now_us = int(now.timestamp() * 1_000_000)
    count = len(messages)
    columns = {
        "source": [f"kafka:{message.topic}" for message in messages],
        "source_position": [message.position for message in messages],
        "ingested_at": [now_us] * count,
        "received_at": [message.timestamp_ms * 1000 if message.timestamp_ms >= 0 else now_us for message in messages],
        "trial": [(message.header(TRIAL_HEADER) or default_trial) if message.headers else default_trial
                  for message in messages],
        "record_format": ["message"] * count,
        "payload": payloads,
        "payload_encoding": encodings,
    }  # fmt: skip
    schema = arrow_schema(BRONZE_COLUMNS)
    return pa.table([pa.array(columns[item.name], type=item.type) for item in schema], schema=schema)


def _payload(value: bytes | None) -> tuple[str | None, str]:
    if value is None:
        return None, "utf-8"
    try:
        return value.decode("utf-8"), "utf-8"
    except UnicodeDecodeError:
        return base64.b64encode(value).decode("ascii"), "base64"


def _publish(admin: TopicAdmin, group: str, result: TopicIngest, report: TopicIngestReport) -> None:
    try:
        admin.commit_group(group, {(result.topic, partition): offset for partition, offset in result.after.items()})
    except Exception as error:  # shown lag is a convenience; the rows are safe
        warning = f"offsets of topic {result.topic} were not published for group {group}: {error}"
        report.warnings.append(warning)
        _log.warning(warning)


@dataclass(slots=True)
class PartitionState:
    """One partition: kept offsets, next offset to ingest (None before the first ingestion) and lag in offsets."""

    begin: int
    end: int
    committed: int | None
    lag: int


@dataclass(slots=True)
class TopicState:
    """One topic, and how its newest messages look.

    Attributes:
        newest_age_seconds: age of the newest sampled message; None for an empty topic.
        sampled: messages validated.
        invalid: of these, how many the contract rejects.
        reasons: rule -> number of sampled messages that break it.
    """

    domain: str
    topic: str
    exists: bool = True
    partitions: dict[int, PartitionState] = field(default_factory=dict)
    newest_age_seconds: float | None = None
    sampled: int = 0
    invalid: int = 0
    reasons: dict[str, int] = field(default_factory=dict)

    @property
    def lag(self) -> int:
        """Offsets that are not in bronze yet."""
        return sum(partition.lag for partition in self.partitions.values())

    @property
    def messages(self) -> int:
        """Offsets that are kept; with compaction or transactions more than there are messages."""
        return sum(partition.end - partition.begin for partition in self.partitions.values())

    @property
    def invalid_share(self) -> float:
        """Share of the sampled messages that the contract rejects, 0 without a sample."""
        return self.invalid / self.sampled if self.sampled else 0.0


@dataclass(slots=True)
class TopicMonitorReport:
    """The state of all topics."""

    topics: dict[str, TopicState]  # by domain

    @property
    def lag(self) -> int:
        """Offsets of all topics that are not in bronze yet."""
        return sum(topic.lag for topic in self.topics.values())

    def as_metadata(self) -> dict[str, Any]:
        """Return the figures as JSON-ready metadata."""
        return {
            state.topic: {
                "exists": state.exists,
                "partitions": len(state.partitions),
                "messages": state.messages,
                "lag": state.lag,
                "newest_age_seconds": state.newest_age_seconds,
                "sampled": state.sampled,
                "invalid_share": round(state.invalid_share, 4),
                "reasons": state.reasons,
            }
            for state in self.topics.values()
        }

    def as_markdown(self) -> str:
        """Return one table row a topic."""
        lines = ["| topic | partitions | messages | lag | newest | invalid in sample |", "|---|---|---|---|---|---|"]
        for state in self.topics.values():
            age = "" if state.newest_age_seconds is None else f"{state.newest_age_seconds:.0f} s ago"
            share = f"{state.invalid} of {state.sampled}" if state.sampled else ""
            lines.append(
                f"| {state.topic} | {len(state.partitions) if state.exists else 'no such topic'} "
                f"| {state.messages:,} | {state.lag:,} | {age} | {share} |"
            )
        return "\n".join(lines)


def monitor_topics(
    tables: TableStore,
    reader: TopicReader,
    topics: Mapping[str, str],
    *,
    now: datetime | None = None,
    sample: int = 200,
) -> TopicMonitorReport:
    """Return partitions, lag behind bronze, age and validity of the newest messages of each topic.

    Args:
        tables: the lakehouse, for the ingested offsets.
        reader: the topics.
        topics: bronze domain -> topic.
        now: UTC time that ages refer to.
        sample: about how many of the newest messages of a topic are validated; 0 for none.

    Raises:
        KafkaUnavailableError: no broker answers.
    """
    now = now or datetime.now(UTC)
    return TopicMonitorReport(
        {domain: _topic_state(tables, reader, domain, topic, now, sample) for domain, topic in topics.items()}
    )


def _topic_state(
    tables: TableStore, reader: TopicReader, domain: str, topic: str, now: datetime, sample: int
) -> TopicState:
    from clinical_orchestration.transforms.messages import validate_message

    state = TopicState(domain, topic)
    try:
        kept = reader.offsets(topic)
    except UnknownTopicError:
        state.exists = False
        return state
    for partition, bounds in kept.items():
        committed = tables.transaction_version(bronze(domain), offset_app(topic, partition))
        start = bounds.begin if committed is None else committed
        state.partitions[partition] = PartitionState(bounds.begin, bounds.end, committed, max(0, bounds.end - start))
    if sample <= 0:
        return state
    each = max(1, sample // max(1, len(kept)))
    ranges = {p: OffsetRange(max(bounds.begin, bounds.end - each), bounds.end) for p, bounds in kept.items()}
    newest = -1
    reasons: Counter[str] = Counter()
    try:
        for batch in reader.read(topic, ranges, max_messages=max(1, sample)):
            for message in batch.messages:
                newest = max(newest, message.timestamp_ms)
                state.sampled += 1
                found = validate_message(domain, message.value or b"")
                state.invalid += bool(found)
                reasons.update({reason.partition(":")[0] for reason in found})
    except OffsetOutOfRangeError:
        pass  # retention moved on while the sample was read: what was seen until then is the sample
    if newest >= 0:
        state.newest_age_seconds = max(0.0, now.timestamp() - newest / 1000)
    state.reasons = dict(reasons.most_common())
    return state
