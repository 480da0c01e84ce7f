"""Topics that grow while they are read, in transactions and without: each committed record is in bronze once."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable

import pytest

from clinical_orchestration.ingestion.kafka import append_messages, ingest_topics, offset_app
from clinical_orchestration.stores.kafka import (
    ConfluentProducer,
    ConfluentTopicAdmin,
    ConfluentTopicReader,
    ConfluentTransactions,
    Record,
)
from clinical_orchestration.tables import bronze
from clinical_orchestration_tests.fakes import InMemoryTableStore

pytestmark = pytest.mark.integration
DOMAIN = "lab_results"


def by_runs(tables: InMemoryTableStore, reader: ConfluentTopicReader, topic: str) -> None:
    ingest_topics(tables, reader, {DOMAIN: topic}, default_trial="x", max_batch_rows=50)


def by_micro_batches(tables: InMemoryTableStore, reader: ConfluentTopicReader, topic: str) -> None:
    """As a query does: it knows only the messages it got, which begin behind the markers of transactions."""
    for batch in reader.read(topic, reader.offsets(topic), max_messages=37):
        append_messages(tables, reader, DOMAIN, topic, batch.messages, default_trial="x")


@pytest.mark.parametrize("ingest", [by_runs, by_micro_batches])
def test_records_that_come_while_a_topic_is_read_are_in_bronze_once(
    kafka_env: dict[str, str], ingest: Callable[[InMemoryTableStore, ConfluentTopicReader, str], None]
) -> None:
    servers, topic = kafka_env["KAFKA_BOOTSTRAP_SERVERS"], f"growing-{uuid.uuid4().hex[:8]}"
    admin, reader, tables = ConfluentTopicAdmin(servers), ConfluentTopicReader(servers), InMemoryTableStore()
    admin.ensure_topics([topic], partitions=2)
    done, failures = threading.Event(), list[Exception]()

    def follow() -> None:
        try:
            while not done.is_set():
                ingest(tables, reader, topic)
        except Exception as error:
            failures.append(error)

    follower = threading.Thread(target=follow)
    follower.start()
    producer, transactions = ConfluentProducer(servers), ConfluentTransactions(servers, topic)
    sent: list[str] = []

    def records(count: int, key: bytes) -> list[Record]:
        made = [f"{len(sent) + number}" for number in range(count)]
        sent.extend(made)
        return [Record(topic, value.encode(), key) for value in made]

    try:
        for turn in range(3):
            producer.send(records(20, b"a") + records(20, b"b"))
            transactions.start()
            for _ in range(4):
                transactions.commit(records(7, b"a"))
            transactions._client.begin_transaction()
            transactions._client.produce(topic, value=b"given up", key=b"a")
            transactions._client.flush(10)
            producer.send(records(10, f"c{turn}".encode()))
            transactions._client.abort_transaction(10)
            producer.send(records(20, b"a"))
    finally:
        done.set()
        follower.join(60)
    assert failures == []
    by_runs(tables, reader, topic)
    assert sorted(map(int, tables.read(bronze(DOMAIN)).column("payload").to_pylist())) == list(range(len(sent)))
    ends = {number: bounds.end for number, bounds in reader.offsets(topic).items()}
    assert {number: tables.transaction_version(bronze(DOMAIN), offset_app(topic, number)) for number in ends} == ends
    transactions.close()
    producer.close()
    admin.delete_topics([topic])
