"""One behaviour suite for Kafka clients: the fake in memory, and a real broker."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
from confluent_kafka import KafkaError

from clinical_orchestration.stores.kafka import (
    ConfluentProducer,
    ConfluentTopicAdmin,
    ConfluentTopicReader,
    DeliveryError,
    KafkaUnavailableError,
    OffsetOutOfRangeError,
    OffsetRange,
    Record,
    UnknownTopicError,
)
from clinical_orchestration_tests.ingestion.fake_kafka import FakeKafka


@dataclass
class Clients:
    reader: Any
    producer: Any
    admin: Any
    topic: str

    def fill(self, count: int) -> list[Any]:
        records = [
            Record(
                self.topic,
                f"value {i}".encode(),
                key=f"k{i % 7}".encode(),
                headers=(("trial", b"simulated"),),
                timestamp_ms=1_735_689_600_000 + i,
            )
            for i in range(count)
        ]
        return list(self.producer.send(records))

    def all(self, max_messages: int = 1000) -> list[Any]:
        ranges = self.reader.offsets(self.topic)
        return [m for batch in self.reader.read(self.topic, ranges, max_messages=max_messages) for m in batch.messages]


@pytest.fixture(params=["fake", pytest.param("real", marks=pytest.mark.integration)])
def clients(request: pytest.FixtureRequest) -> Iterator[Clients]:
    topic = f"contract-{uuid.uuid4().hex[:8]}"
    with ExitStack() as stack:
        if request.param == "fake":
            fake = FakeKafka()
            made = Clients(fake, fake, fake, topic)
        else:
            servers = request.getfixturevalue("kafka_env")["KAFKA_BOOTSTRAP_SERVERS"]
            made = Clients(
                ConfluentTopicReader(servers), ConfluentProducer(servers), ConfluentTopicAdmin(servers), topic
            )
            stack.callback(made.producer.close)
        made.admin.ensure_topics([topic], partitions=3)
        yield made
        if topic in made.reader.topics():
            made.admin.delete_topics([topic])


def test_ensuring_a_topic_twice_makes_it_once(clients: Clients) -> None:
    other = f"{clients.topic}-other"
    assert clients.admin.ensure_topics([clients.topic, other, other], partitions=2) == [other]
    assert clients.admin.ensure_topics([clients.topic, other]) == []
    assert {clients.topic, other} <= set(clients.reader.topics())
    assert len(clients.reader.offsets(other)) == 2
    clients.admin.delete_topics([other])


def test_positions_are_in_the_order_of_the_records_and_read_back_as_sent(clients: Clients) -> None:
    positions = clients.fill(50)
    by_position = {message.position: message for message in clients.all()}
    assert len(by_position) == 50
    for index, position in enumerate(positions):
        message = by_position[str(position)]
        assert message.value == f"value {index}".encode()
        assert message.key == f"k{index % 7}".encode()
        assert message.timestamp_ms == 1_735_689_600_000 + index
        assert message.header("trial") == "simulated"
        assert message.header("other") is None


def test_one_key_goes_to_one_partition_in_order(clients: Clients) -> None:
    clients.fill(70)
    by_key: dict[bytes, list[Any]] = {}
    for message in clients.all():
        by_key.setdefault(message.key, []).append(message)
    for messages in by_key.values():
        assert len({message.partition for message in messages}) == 1
        stamps = [message.timestamp_ms for message in sorted(messages, key=lambda m: m.offset)]
        assert stamps == sorted(stamps)


def test_batches_are_bounded_and_their_positions_lead_on(clients: Clients) -> None:
    clients.fill(100)
    ranges = clients.reader.offsets(clients.topic)
    batches = list(clients.reader.read(clients.topic, ranges, max_messages=17))
    assert all(len(batch.messages) <= 17 for batch in batches)
    assert sum(len(batch.messages) for batch in batches) == 100
    assert batches[-1].positions == {partition: bounds.end for partition, bounds in ranges.items()}
    # going on from any batch's positions gives exactly the rest
    rest = {p: OffsetRange(batches[2].positions[p], bounds.end) for p, bounds in ranges.items()}
    again = {m.position for b in clients.reader.read(clients.topic, rest, max_messages=1000) for m in b.messages}
    before = {m.position for b in batches[:3] for m in b.messages}
    assert len(again) == 100 - len(before)
    assert not again & before


def test_reading_stops_at_the_given_ends(clients: Clients) -> None:
    clients.fill(30)
    ranges = clients.reader.offsets(clients.topic)
    clients.fill(30)
    batches = list(clients.reader.read(clients.topic, ranges, max_messages=1000))
    assert sum(len(batch.messages) for batch in batches) == 30
    assert batches[-1].positions == {partition: bounds.end for partition, bounds in ranges.items()}


class ScriptedConsumer:
    """Gives what librdkafka gives where a partition has grown since its end was asked for."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.events: list[tuple[int, int, KafkaError | None]] = [
            *((0, offset, None) for offset in range(5)),
            (0, 5, KafkaError(KafkaError._PARTITION_EOF)),
            *((1, offset, None) for offset in range(2)),
            (1, 4, KafkaError(KafkaError._PARTITION_EOF)),  # behind the markers of a transaction
        ]

    def consume(self, most: int, timeout: float) -> list[Any]:
        given, self.events = self.events[:most], self.events[most:]
        return [
            SimpleNamespace(
                partition=lambda number=number: number,
                offset=lambda offset=offset: offset,
                error=lambda error=error: error,
                timestamp=lambda: (1, 0),
                headers=list,
                key=lambda: None,
                value=lambda: b"v",
            )
            for number, offset, error in given
        ]

    def assign(self, _: object) -> None: ...

    def incremental_unassign(self, _: object) -> None: ...

    def close(self) -> None: ...


@pytest.mark.parametrize("most", [1, 2, 3, 1000])
def test_positions_stay_at_the_given_ends_where_the_topic_grows(monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    monkeypatch.setattr("confluent_kafka.Consumer", ScriptedConsumer)
    ranges = {0: OffsetRange(0, 3), 1: OffsetRange(0, 4), 2: OffsetRange(7, 7)}
    batches = list(ConfluentTopicReader("127.0.0.1:1").read("any", ranges, max_messages=most))
    read = [(message.partition, message.offset) for batch in batches for message in batch.messages]
    assert read == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]
    assert all(batch.positions[0] <= 3 for batch in batches)
    assert batches[-1].positions == {0: 3, 1: 4, 2: 7}


def test_an_empty_topic_gives_nothing(clients: Clients) -> None:
    assert clients.all() == []


def test_a_message_may_have_no_key_no_value_and_any_bytes(clients: Clients) -> None:
    clients.producer.send([Record(clients.topic, None, b"k"), Record(clients.topic, b"\xff\xfe\x00", None)])
    found = {(message.key, message.value) for message in clients.all()}
    assert found == {(b"k", None), (None, b"\xff\xfe\x00")}


def test_an_unknown_topic_is_named(clients: Clients) -> None:
    with pytest.raises(UnknownTopicError, match="no-such-topic"):
        clients.reader.offsets("no-such-topic")


def test_removed_offsets_are_an_error_and_not_a_jump(clients: Clients) -> None:
    clients.fill(60)
    ranges = clients.reader.offsets(clients.topic)
    partition = max(ranges, key=lambda p: ranges[p].end)
    clients.admin.delete_records(clients.topic, {partition: 5})
    assert clients.reader.offsets(clients.topic)[partition].begin == 5
    with pytest.raises(OffsetOutOfRangeError, match=clients.topic):
        list(clients.reader.read(clients.topic, ranges, max_messages=1000))


def test_a_topic_made_again_has_another_identity(clients: Clients) -> None:
    before = clients.reader.topic_id(clients.topic)
    assert clients.reader.topic_id(clients.topic) == before
    clients.admin.delete_topics([clients.topic])
    _eventually(lambda: clients.topic not in clients.reader.topics())
    clients.admin.ensure_topics([clients.topic])
    assert clients.reader.topic_id(clients.topic) != before


def test_published_group_offsets_show_the_lag(clients: Clients) -> None:
    clients.fill(40)
    ends = {(clients.topic, p): bounds.end for p, bounds in clients.reader.offsets(clients.topic).items()}
    group = f"group-{clients.topic}"
    behind = max(ends, key=lambda key: ends[key])
    clients.admin.commit_group(group, {**ends, behind: ends[behind] - 3})
    lag = clients.admin.lag(group, [clients.topic])
    assert sum(lag.values()) == lag[behind] == 3


def _eventually(condition: Callable[[], bool]) -> None:
    import time

    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.integration
def test_old_timestamps_survive_in_a_topic_that_keeps_forever(kafka_env: dict[str, str]) -> None:
    from confluent_kafka.admin import ConfigResource, ResourceType

    admin = ConfluentTopicAdmin(kafka_env["KAFKA_BOOTSTRAP_SERVERS"])
    topic = f"forever-{uuid.uuid4().hex[:8]}"
    admin.ensure_topics([topic])
    admin.keep_forever([topic])
    (future,) = admin._client.describe_configs([ConfigResource(ResourceType.TOPIC, topic)]).values()
    assert future.result(10)["retention.ms"].value == "-1"
    admin.delete_topics([topic])


@pytest.mark.integration
def test_a_client_that_broke_for_good_is_replaced(kafka_env: dict[str, str]) -> None:
    from confluent_kafka import KafkaError, KafkaException

    class Broken:
        def produce(self, *_: Any, **__: Any) -> None:
            raise KafkaException(KafkaError(KafkaError._FATAL, "out of order sequence"))

        def poll(self, _: float) -> None: ...

        def flush(self, _: float) -> None: ...

    servers = kafka_env["KAFKA_BOOTSTRAP_SERVERS"]
    topic = f"fatal-{uuid.uuid4().hex[:8]}"
    admin = ConfluentTopicAdmin(servers)
    admin.ensure_topics([topic])
    producer = ConfluentProducer(servers)
    producer._client = Broken()
    assert len(producer.send([Record(topic, b"a"), Record(topic, b"b")])) == 2
    producer.close()
    admin.delete_topics([topic])


def test_without_a_broker_the_error_says_where_and_what_to_do() -> None:
    servers = "127.0.0.1:1"
    reader = ConfluentTopicReader(servers, timeout=0.5)
    with pytest.raises(KafkaUnavailableError, match=r"127\.0\.0\.1:1.*KAFKA_BOOTSTRAP_SERVERS"):
        reader.offsets("any")


def test_without_a_broker_delivery_fails_within_the_limit_and_says_which() -> None:
    producer = ConfluentProducer("127.0.0.1:1", delivery_timeout=0.5)
    with pytest.raises(DeliveryError, match="2 of 2 records") as failure:
        producer.send([Record("t", b"a"), Record("t", b"b")])
    assert set(failure.value.failed) == {0, 1}
    assert failure.value.delivered == {}
    producer.close()
