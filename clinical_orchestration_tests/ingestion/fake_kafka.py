"""Kafka in memory: reader, producer and admin in one, with retention, gaps and failures on demand."""

from __future__ import annotations

import time
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from clinical_orchestration.stores.kafka import (
    Batch,
    DeliveryError,
    KafkaUnavailableError,
    Message,
    OffsetOutOfRangeError,
    OffsetRange,
    Position,
    Record,
    UnknownTopicError,
)


@dataclass
class _Partition:
    messages: list[Message] = field(default_factory=list)
    begin: int = 0
    end: int = 0


class FakeKafka:
    """Topics in memory. Keys go to partitions by their checksum, records without key to partition 0."""

    def __init__(self) -> None:
        self.logs: dict[str, list[_Partition]] = {}
        self.made: dict[str, int] = {}
        self.committed: dict[str, dict[tuple[str, int], int]] = {}
        self.kept_forever: set[str] = set()
        self.down = False
        self.refuse_after: int | None = None  # so many more records are acknowledged, then none
        self.flushes = 0

    # --- admin ---

    def ensure_topics(self, topics: Iterable[str], *, partitions: int = 3) -> list[str]:
        self._check()
        new = [topic for topic in dict.fromkeys(topics) if topic not in self.logs]
        for topic in new:
            self.logs[topic] = [_Partition() for _ in range(partitions)]
            self.made[topic] = self.made.get(topic, 0) + 1
        return new

    def keep_forever(self, topics: Iterable[str]) -> None:
        self.kept_forever.update(topics)

    def delete_topics(self, topics: Iterable[str]) -> None:
        for topic in topics:
            del self.logs[topic]

    def delete_records(self, topic: str, before: Mapping[int, int]) -> None:
        for number, offset in before.items():
            partition = self.logs[topic][number]
            partition.begin = offset
            partition.messages = [message for message in partition.messages if message.offset >= offset]

    def commit_group(self, group: str, offsets: Mapping[tuple[str, int], int]) -> None:
        self._check()
        self.committed.setdefault(group, {}).update(offsets)

    def groups(self) -> dict[str, str]:
        return dict.fromkeys(self.committed, "empty")

    def group_offsets(self, group: str) -> dict[tuple[str, int], int]:
        return dict(self.committed.get(group, {}))

    def lag(self, group: str, topics: Iterable[str]) -> dict[tuple[str, int], int]:
        known = self.group_offsets(group)
        return {
            (topic, number): bounds.end - max(known.get((topic, number), bounds.begin), bounds.begin)
            for topic in topics
            for number, bounds in self.offsets(topic).items()
        }

    # --- reader ---

    def topics(self) -> list[str]:
        self._check()
        return sorted(self.logs)

    def topic_id(self, topic: str) -> str:
        self._log(topic)
        return f"{topic}#{self.made[topic]}"

    def offsets(self, topic: str) -> dict[int, OffsetRange]:
        return {number: OffsetRange(log.begin, log.end) for number, log in enumerate(self._log(topic))}

    def read(self, topic: str, ranges: Mapping[int, OffsetRange], *, max_messages: int) -> Iterator[Batch]:
        positions = {number: bounds.begin for number, bounds in ranges.items()}
        if all(bounds.end <= bounds.begin for bounds in ranges.values()):
            return
        messages: list[Message] = []
        for number, bounds in ranges.items():
            log = self._log(topic)[number]
            if bounds.end > bounds.begin < log.begin:
                raise OffsetOutOfRangeError(f"topic {topic}, partition {number}: {bounds.begin} is below {log.begin}")
            for message in list(log.messages):
                if bounds.begin <= message.offset < bounds.end:
                    messages.append(message)
                    positions[number] = message.offset + 1
                    if len(messages) == max_messages:
                        yield Batch(messages, dict(positions))
                        messages = []
            positions[number] = max(bounds)
        yield Batch(messages, dict(positions))

    # --- producer ---

    def send(self, records: Sequence[Record], *, timeout: float = 30.0) -> list[Position]:
        delivered: dict[int, Position] = {}
        failed: dict[int, str] = {}
        for index, record in enumerate(records):
            if self.down or self.refuse_after == 0:
                failed[index] = "Local: Message timed out"
                continue
            if self.refuse_after is not None:
                self.refuse_after -= 1
            log = self._log(record.topic)
            number = zlib.crc32(record.key) % len(log) if record.key is not None else 0
            partition = log[number]
            stamp = round(time.time() * 1000) if record.timestamp_ms is None else record.timestamp_ms
            offset = partition.end
            partition.messages.append(
                Message(record.topic, number, offset, stamp, record.key, record.value, record.headers)
            )
            partition.end = offset + 1
            delivered[index] = Position(record.topic, number, offset)
        self.flushes += 1
        if failed:
            raise DeliveryError(failed, delivered)
        return [delivered[index] for index in range(len(records))]

    def leave_gap(self, topic: str, number: int, offsets: int) -> None:
        """Use up offsets without messages, as the markers of a transaction do."""
        self.logs[topic][number].end += offsets

    def close(self) -> None: ...

    def _check(self) -> None:
        if self.down:
            raise KafkaUnavailableError("no Kafka broker answered at fake; start it")

    def _log(self, topic: str) -> list[_Partition]:
        self._check()
        if topic not in self.logs:
            raise UnknownTopicError(f"there is no topic {topic}")
        return self.logs[topic]
