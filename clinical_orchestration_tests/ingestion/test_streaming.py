"""The streaming job without Spark: what a micro-batch does to bronze, and what the job says about itself."""

from __future__ import annotations

import argparse
import json
import random
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clinical_orchestration.ingestion import streaming
from clinical_orchestration.ingestion.kafka import OffsetsLostError, append_messages, ingest_topics, offset_app
from clinical_orchestration.ingestion.status_file import StatusFile
from clinical_orchestration.ingestion.stream_batch import COLUMNS, BronzeWriter, messages
from clinical_orchestration.settings import ClientSettings
from clinical_orchestration.stores.kafka import Message, Record
from clinical_orchestration.stores.locks import REFINE, LockedError, exclusive
from clinical_orchestration.tables import bronze
from clinical_orchestration_tests.fakes import InMemoryTableStore
from clinical_orchestration_tests.ingestion.fake_kafka import FakeKafka

TOPIC, DOMAIN = "lab-results", "lab_results"


def send(kafka: FakeKafka, count: int, start: int = 0) -> None:
    kafka.send([Record(TOPIC, f"{n}".encode(), f"k{n}".encode()) for n in range(start, start + count)])


def read(kafka: FakeKafka, frm: dict[int, int]) -> list[Message]:
    return [
        message
        for number, log in enumerate(kafka.logs[TOPIC])
        for message in log.messages
        if message.offset >= frm.get(number, 0)
    ]


def append(tables: Any, kafka: FakeKafka, batch: list[Message]) -> Any:
    return append_messages(tables, kafka, DOMAIN, TOPIC, batch, default_trial="simulated")


def payloads(tables: InMemoryTableStore) -> list[int]:
    return sorted(int(value) for value in tables.read(bronze(DOMAIN)).column("payload").to_pylist())


@pytest.fixture
def kafka() -> FakeKafka:
    fake = FakeKafka()
    fake.ensure_topics([TOPIC], partitions=3)
    return fake


def test_a_batch_that_comes_again_changes_nothing(kafka: FakeKafka) -> None:
    tables = InMemoryTableStore()
    send(kafka, 20)
    batch = read(kafka, {})
    assert append(tables, kafka, batch).rows == 20
    assert append(tables, kafka, batch).rows == 0
    assert payloads(tables) == list(range(20))


def test_what_the_pipeline_took_in_is_left_out_and_what_the_query_skipped_is_read(kafka: FakeKafka) -> None:
    tables = InMemoryTableStore()
    send(kafka, 10)
    ingest_topics(tables, kafka, {DOMAIN: TOPIC}, default_trial="simulated")
    send(kafka, 10, 10)
    kafka.leave_gap(TOPIC, 1, 2)  # the markers of a transaction
    send(kafka, 10, 20)
    everything = read(kafka, {})
    # a checkpoint that is behind in one partition and ahead of Delta in another
    ahead = max(message.offset for message in everything if message.partition == 0)
    batch = [message for message in everything if message.partition or message.offset == ahead]
    append(tables, kafka, batch)
    append(tables, kafka, [message for message in everything if message.partition == 2])
    assert payloads(tables) == list(range(30))


@pytest.mark.parametrize("left_out", [range(1, 2), range(2, 6), range(1, 9)])
def test_what_a_query_leaves_out_on_its_way_is_read(kafka: FakeKafka, left_out: range) -> None:
    tables = InMemoryTableStore()
    send(kafka, 40)
    batch = [message for message in read(kafka, {}) if message.offset not in left_out]
    append(tables, kafka, batch)
    assert payloads(tables) == list(range(40))
    assert append(tables, kafka, batch).rows == 0


def test_lost_messages_and_topics_made_anew_are_errors(kafka: FakeKafka) -> None:
    tables = InMemoryTableStore()
    send(kafka, 30)
    first = [message for message in read(kafka, {}) if message.offset < 3]
    append(tables, kafka, first)
    kafka.delete_records(TOPIC, {0: 5})
    with pytest.raises(OffsetsLostError, match="removed by retention"):
        append(tables, kafka, read(kafka, {}))
    kafka.delete_topics([TOPIC])
    kafka.ensure_topics([TOPIC], partitions=3)
    send(kafka, 40)
    with pytest.raises(OffsetsLostError, match="made again"):
        append(tables, kafka, read(kafka, {}))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32))
def test_any_order_of_batches_and_runs_gives_each_message_once(seed: int) -> None:
    rng = random.Random(seed)
    kafka, tables = FakeKafka(), InMemoryTableStore()
    kafka.ensure_topics([TOPIC], partitions=2)
    sent, checkpoint = 0, dict[int, int]()
    for _ in range(rng.randint(1, 12)):
        act = rng.random()
        if act < 0.4:
            count = rng.randint(1, 6)
            send(kafka, count, sent)
            sent += count
            if rng.random() < 0.3:
                kafka.leave_gap(TOPIC, rng.randint(0, 1), rng.randint(1, 3))
        elif act < 0.6:
            ingest_topics(tables, kafka, {DOMAIN: TOPIC}, default_trial="x", max_batch_rows=rng.randint(1, 5))
        elif act < 0.9:
            batch = read(kafka, checkpoint)
            batch = [message for message in batch if message.offset < checkpoint.get(message.partition, 0) + 4]
            append(tables, kafka, batch)
            if rng.random() < 0.6:  # else it was killed before the checkpoint
                for message in batch:
                    checkpoint[message.partition] = message.offset + 1
        elif rng.random() < 0.5:  # the checkpoint is lost, or of somewhere else
            checkpoint = {number: rng.randint(0, log.end) for number, log in enumerate(kafka.logs[TOPIC])}
    ingest_topics(tables, kafka, {DOMAIN: TOPIC}, default_trial="x")
    if sent:
        assert payloads(tables) == list(range(sent))


def test_a_batch_and_a_run_at_the_same_time_share_the_work(kafka: FakeKafka, tmp_path: Path) -> None:
    from clinical_orchestration.stores.tables import DeltaTableStore

    tables = DeltaTableStore(str(tmp_path))
    send(kafka, 300)
    batch = read(kafka, {})

    def by_batches() -> None:
        for end in range(10, 130, 10):
            append(tables, kafka, [message for message in batch if end - 10 <= message.offset < end])

    workers = [threading.Thread(target=by_batches) for _ in range(2)]
    for worker in workers:
        worker.start()
    ingest_topics(tables, kafka, {DOMAIN: TOPIC}, default_trial="x", max_batch_rows=17)
    for worker in workers:
        worker.join()
    found = sorted(int(value) for value in tables.read(bronze(DOMAIN)).column("payload").to_pylist())
    assert found == list(range(300))
    assert {number: tables.transaction_version(bronze(DOMAIN), offset_app(TOPIC, number)) for number in range(3)} == {
        number: log.end for number, log in enumerate(kafka.logs[TOPIC])
    }


def test_rows_of_a_micro_batch_are_the_messages_that_a_reader_gives(kafka: FakeKafka) -> None:
    kafka.send(
        [
            Record(TOPIC, b"\xff", b"k", (("trial", b"t"),), timestamp_ms=1_700_000_000_123),
            Record(TOPIC, None, None),
        ]
    )
    expected = read(kafka, {})
    headers = pa.list_(pa.struct([("key", pa.string()), ("value", pa.binary())]))
    rows = pa.table(
        {
            name: pa.array(values, type=headers if name == "headers" else None)
            for name, values in zip(
                COLUMNS,
                zip(
                    *[
                        (m.topic, m.partition, m.offset, m.timestamp_ms, m.key, m.value,
                         [{"key": key, "value": value} for key, value in m.headers] or None)
                        for m in expected
                    ],
                    strict=True,
                ),
                strict=True,
            )
        }
    )  # fmt: skip
    assert list(messages(rows)) == expected


def test_what_travels_to_the_server_needs_no_module_of_the_client() -> None:
    import pickletools

    from pyspark import cloudpickle

    writer = BronzeWriter("broker:9092", "s3://lake", {DOMAIN: TOPIC}, "simulated")
    pickled = cloudpickle.dumps(streaming._as_function(writer))
    names = {str(argument) for _, argument, _ in pickletools.genops(pickled)}
    assert any("ingestion.stream_batch" in name for name in names)
    assert not any("pytest" in name or "clinical_orchestration_tests" in name for name in names)


# --- what the job says -----------------------------------------------------------------------------------------------


def job(tmp_path: Path, **more: Any) -> streaming.StreamingJob:
    made = ClientSettings.model_validate({"CLINICAL_LAKE_ROOT": str(tmp_path / "lake")})
    return streaming.StreamingJob(
        made,
        {DOMAIN: TOPIC},
        default_trial="simulated",
        profiles=dict,
        tables=InMemoryTableStore(),
        reader=lambda: FakeKafka(),
        status=StatusFile(tmp_path, "streaming"),
        **more,
    )


def test_progress_gives_rows_rate_and_lag(tmp_path: Path) -> None:
    made = job(tmp_path)
    made._begun = 5
    told: dict[str, Any] = {
        "batchId": 0,
        "runId": "r",
        "timestamp": "t0",
        "durationMs": {"triggerExecution": 2000},
        "sources": [
            {
                "startOffset": None,
                "endOffset": json.dumps({TOPIC: {"0": 15, "1": 10}}),
                "latestOffset": {TOPIC: {"0": 40, "1": 10}},
            }
        ],
    }
    made._note_progress(SimpleNamespace(lastProgress=told))
    made._note_progress(SimpleNamespace(lastProgress=told))
    report = made.report()
    assert (report["batch_id"], report["batches"], report["rows"], report["lag"]) == (0, 1, 20, 25)
    assert report["rows_per_second"] == 10.0
    idle = {**told, "timestamp": "t1", "sources": [{**told["sources"][0], "startOffset": {TOPIC: {"0": 15, "1": 10}}}]}
    made._note_progress(SimpleNamespace(lastProgress=idle))
    assert (made.report()["rows"], made.report()["rows_per_second"]) == (20, 0.0)
    json.dumps(made.report())


def test_the_error_of_the_function_on_the_server_is_told_in_one_line() -> None:
    text = (
        "[session: 1] Found error inside foreachBatch Python process: Traceback (most recent call last):\n"
        '  File "x.py", line 1\n'
        "clinical_orchestration.ingestion.kafka.OffsetsLostError: topic lab-results: offsets are gone\n\n"
        "=== Streaming Query ===\nIdentifier: [id = 1]\n"
    )
    assert streaming._cause(text).endswith("OffsetsLostError: topic lab-results: offsets are gone")
    assert streaming._cause("SparkUnavailableError: no answer\nmore") == "SparkUnavailableError: no answer"


def test_without_spark_the_job_says_so_and_goes_on_trying(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "BACK_OFF", (0.01,))
    monkeypatch.setenv("SPARK_REMOTE", "sc://127.0.0.1:9")
    kafka = FakeKafka()
    kafka.ensure_topics([TOPIC])
    made = job(tmp_path)
    tries: list[int] = []

    def reader() -> FakeKafka:
        tries.append(1)
        if len(tries) > 6:
            made.stopping.set()
        return kafka

    made._reader = reader
    assert made.run() == 0
    report = made.report()
    assert report["errors"] >= 2
    assert "Spark Connect does not answer" in report["last_error"]
    once = job(tmp_path, once=True)
    once._reader = lambda: kafka
    assert once.run() == 1


@pytest.mark.parametrize(("failures", "status"), [(0, 0), (2, 0), (3, 1)])
def test_once_begins_a_failed_query_again_but_not_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failures: int, status: int
) -> None:
    monkeypatch.setattr(streaming, "BACK_OFF", (0.0,))
    made = job(tmp_path, once=True)
    tries: list[int] = []

    def stream() -> None:
        tries.append(1)
        if len(tries) <= failures:
            raise streaming.StreamFailedError("NullPointerException")

    monkeypatch.setattr(made, "_stream", stream)
    assert made.run() == status
    assert len(tries) == min(failures + 1, 3)
    assert (made.report()["last_error"] is None) == (status == 0)


def test_security_options_of_the_client_are_given_to_spark_too() -> None:
    assert streaming.java_options({}) == {}
    given = {
        "security.protocol": "sasl_ssl",
        "sasl.mechanisms": "SCRAM-SHA-512",
        "sasl.username": "reader",
        "sasl.password": 'pa"ss',
        "ssl.ca.location": "/etc/ca.pem",
        "socket.timeout.ms": "1000",
    }
    assert streaming.java_options(given) == {
        "kafka.security.protocol": "SASL_SSL",
        "kafka.sasl.mechanism": "SCRAM-SHA-512",
        "kafka.sasl.jaas.config": "org.apache.kafka.common.security.scram.ScramLoginModule required "
        'username="reader" password="pa\\"ss";',
        "kafka.ssl.truststore.type": "PEM",
        "kafka.ssl.truststore.location": "/etc/ca.pem",
    }
    assert "pa" not in repr(BronzeWriter("b", "r", {}, "t", given)).replace("patient", "")


@pytest.mark.parametrize(("text", "seconds"), [("30s", 30), ("5m", 300), ("1h", 3600), ("2.5", 2.5), (" 10 s ", 10)])
def test_intervals(text: str, seconds: float) -> None:
    assert streaming.seconds_of(text) == seconds


@pytest.mark.parametrize("text", ["", "0", "-1", "5 days", "s"])
def test_what_is_no_interval(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError):
        streaming.seconds_of(text)


def test_status_and_stop_of_a_job_that_does_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CLINICAL_HOME", str(tmp_path))
    assert streaming.main(["status"]) == 1
    assert json.loads(capsys.readouterr().out) == {"state": "not running"}
    assert streaming.main(["stop"]) == 0


def test_one_process_at_a_time_refines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with exclusive(REFINE, "s3://lake", wait=0):
        with pytest.raises(LockedError, match="refine"), exclusive(REFINE, "s3://lake", wait=0.3):
            pass
        with exclusive(REFINE, "s3://other", wait=0):
            pass
    with exclusive(REFINE, "s3://lake", wait=0):
        pass


@pytest.mark.integration
def test_one_process_at_a_time_refines_by_postgresql(postgres_env: dict[str, str]) -> None:
    made = ClientSettings.model_validate(postgres_env)
    with exclusive(REFINE, "s3://lake", wait=0, settings=made):
        with (
            pytest.raises(LockedError, match="refine"),
            exclusive(REFINE, "s3://lake", wait=0.3, settings=made),
        ):
            pass
        with exclusive(REFINE, "s3://other", wait=0, settings=made):
            pass
    with exclusive(REFINE, "s3://lake", wait=0, settings=made):
        pass
