"""Kafka to bronze on the fakes: exactly once, whatever happens in between."""

from __future__ import annotations

import base64
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from clinical_orchestration.ingestion.kafka import (
    GROUP,
    OffsetsLostError,
    ingest_topics,
    monitor_topics,
    offset_app,
)
from clinical_orchestration.stores.kafka import OffsetRange, Record
from clinical_orchestration_tests.fakes import InMemoryTableStore
from clinical_orchestration_tests.ingestion.fake_kafka import FakeKafka

TOPICS = {"patient_vitals": "patient-vitals", "lab_results": "lab-results"}
NOW = datetime(2025, 3, 1, tzinfo=UTC)
VITALS = b'{"patient_id": "p", "timestamp": "2025-02-28T00:00:00Z", "heart_rate": 70}'


class Killed(BaseException):
    """Stands for SIGKILL: nothing catches it."""


@pytest.fixture
def kafka() -> FakeKafka:
    fake = FakeKafka()
    fake.ensure_topics(TOPICS.values())
    return fake


@pytest.fixture
def tables() -> InMemoryTableStore:
    return InMemoryTableStore()


def fill(kafka: FakeKafka, count: int, topic: str = "patient-vitals", start: int = 0) -> set[str]:
    records = [
        Record(topic, VITALS, f"p{i}".encode(), timestamp_ms=1_740_000_000_000 + i) for i in range(start, start + count)
    ]
    return {str(position) for position in kafka.send(records)}


def ingest(tables: Any, kafka: Any, **more: Any) -> Any:
    return ingest_topics(tables, kafka, TOPICS, default_trial="simulated", now=NOW, **more)


def positions(tables: InMemoryTableStore, domain: str = "patient_vitals") -> list[str]:
    return tables.read(f"bronze/{domain}").column("source_position").to_pylist()


def test_every_message_becomes_one_row_and_a_second_run_adds_none(tables: InMemoryTableStore, kafka: FakeKafka) -> None:
    sent = fill(kafka, 100)
    fill(kafka, 10, "lab-results")
    report = ingest(tables, kafka, max_batch_rows=30)
    assert report.rows == 110
    assert sorted(positions(tables)) == sorted(sent)
    assert ingest(tables, kafka).rows == 0
    later = fill(kafka, 7, start=100)
    assert ingest(tables, kafka).rows == 7
    assert sorted(positions(tables)) == sorted(sent | later)


def test_a_row_is_the_message_as_received(tables: InMemoryTableStore, kafka: FakeKafka) -> None:
    headers = (("trial", b"other-trial"),)
    kafka.send(
        [
            Record("patient-vitals", VITALS, b"a", headers, timestamp_ms=1_740_000_000_123),
            Record("patient-vitals", b"\xff\xfe", b"a"),
            Record("patient-vitals", None, b"a"),
        ]
    )
    ingest(tables, kafka)
    good, bytes_, empty = sorted(
        tables.read("bronze/patient_vitals").to_pylist(), key=lambda row: row["source_position"]
    )
    assert good["source"] == "kafka:patient-vitals"
    assert good["trial"] == "other-trial"
    assert good["received_at"] == datetime.fromtimestamp(1_740_000_000.123, tz=UTC)
    assert good["ingested_at"] == NOW
    assert (good["record_format"], good["payload"], good["payload_encoding"]) == ("message", VITALS.decode(), "utf-8")
    assert bytes_["trial"] == "simulated"
    assert (base64.b64decode(bytes_["payload"]), bytes_["payload_encoding"]) == (b"\xff\xfe", "base64")
    assert empty["payload"] is None


def test_a_killed_ingest_repeats_nothing_and_loses_nothing(tables: InMemoryTableStore, kafka: FakeKafka) -> None:
    sent = fill(kafka, 100)

    class Dying:
        """A store that dies with a commit, before it or directly after it."""

        def __init__(self, commits: int, after: bool) -> None:
            self.commits, self.after = commits, after

        def __getattr__(self, name: str) -> Any:
            return getattr(tables, name)

        def append(self, *args: Any, **more: Any) -> Any:
            self.commits -= 1
            if self.commits == 0 and not self.after:
                raise Killed
            written = tables.append(*args, **more)
            if self.commits == 0:
                raise Killed
            return written

    for commits, after in ((1, False), (1, True), (2, False), (2, True)):
        with pytest.raises(Killed):
            ingest(Dying(commits, after), kafka, max_batch_rows=10)
    ingest(tables, kafka, max_batch_rows=10)
    assert sorted(positions(tables)) == sorted(sent)


def test_two_ingesters_at_once_double_nothing(tables: InMemoryTableStore, kafka: FakeKafka) -> None:
    sent = fill(kafka, 100)

    class Some:
        """A reader that sees the first nine messages of each partition."""

        def __getattr__(self, name: str) -> Any:
            return getattr(kafka, name)

        def offsets(self, topic: str) -> dict[int, OffsetRange]:
            return {p: OffsetRange(b.begin, b.begin + 9) for p, b in kafka.offsets(topic).items()}

    class Overtaken:
        """A reader during whose reading another ingester takes some of the messages."""

        done = False

        def __getattr__(self, name: str) -> Any:
            return getattr(kafka, name)

        def read(self, topic: str, ranges: dict[int, OffsetRange], *, max_messages: int) -> Iterator[Any]:
            for batch in kafka.read(topic, ranges, max_messages=max_messages):
                if not self.done:
                    self.done = True
                    ingest_topics(tables, Some(), {"patient_vitals": topic}, default_trial="simulated", now=NOW)
                yield batch

    report = ingest(tables, Overtaken(), max_batch_rows=25)
    assert report.topics["patient_vitals"].races == 1
    assert report.rows == 100 - 27
    assert sorted(positions(tables)) == sorted(sent)


def test_offsets_without_messages_are_passed(tables: InMemoryTableStore, kafka: FakeKafka) -> None:
    fill(kafka, 5)
    kafka.leave_gap("patient-vitals", 1, 4)
    ingest(tables, kafka)
    end = kafka.offsets("patient-vitals")[1].end
    assert tables.transaction_version("bronze/patient_vitals", offset_app("patient-vitals", 1)) == end
    fill(kafka, 5, start=5)
    assert ingest(tables, kafka).rows == 5


def test_messages_removed_before_they_were_ingested_are_an_error_for_their_partition_only(
    tables: InMemoryTableStore, kafka: FakeKafka
) -> None:
    fill(kafka, 30)
    ingest(tables, kafka)
    fill(kafka, 30, start=30)
    fill(kafka, 5, "lab-results")
    ends = kafka.offsets("patient-vitals")
    lost = max(ends, key=lambda p: ends[p].end)
    committed = tables.transaction_version("bronze/patient_vitals", offset_app("patient-vitals", lost))
    assert committed is not None
    kafka.delete_records("patient-vitals", {lost: committed + 2})
    with pytest.raises(
        OffsetsLostError, match=rf"partition {lost}: offsets {committed} to {committed + 1} .*accept_loss"
    ) as failure:
        ingest(tables, kafka)
    report = failure.value.report
    assert report.topics["lab_results"].rows == 5
    assert 0 < report.topics["patient_vitals"].rows < 30
    accepted = ingest(tables, kafka, accept_loss=True)
    assert accepted.topics["patient_vitals"].lost == {lost: 2}
    assert len(positions(tables)) == len(set(positions(tables))) == 58
    assert ingest(tables, kafka).rows == 0


def test_a_topic_that_was_made_anew_is_an_error_even_when_it_is_longer(
    tables: InMemoryTableStore, kafka: FakeKafka
) -> None:
    fill(kafka, 10)
    ingest(tables, kafka)
    kafka.delete_topics(["patient-vitals"])
    kafka.ensure_topics(["patient-vitals"])
    fill(kafka, 50)
    with pytest.raises(OffsetsLostError, match=r"deleted and made again.*kafka_patient_vitals_topic"):
        ingest(tables, kafka)
    assert len(positions(tables)) == 10


def test_a_truncated_topic_is_an_error(tables: InMemoryTableStore, kafka: FakeKafka) -> None:
    fill(kafka, 10)
    ingest(tables, kafka)
    for log in kafka.logs["patient-vitals"]:
        log.end = max(0, log.end - 1)
    with pytest.raises(OffsetsLostError, match="ends at offset"):
        ingest(tables, kafka)


def test_a_deleted_topic_is_an_error_and_one_that_never_was_is_reported(
    tables: InMemoryTableStore, kafka: FakeKafka
) -> None:
    fill(kafka, 3)
    kafka.delete_topics(["lab-results"])
    assert ingest(tables, kafka).missing == ["lab-results"]
    kafka.delete_topics(["patient-vitals"])
    with pytest.raises(OffsetsLostError, match="patient-vitals was ingested before and no longer exists"):
        ingest(tables, kafka)


def test_group_offsets_are_published_and_their_failure_is_a_warning(
    tables: InMemoryTableStore, kafka: FakeKafka
) -> None:
    fill(kafka, 20)
    ingest(tables, kafka, admin=kafka)
    assert sum(kafka.lag(GROUP, ["patient-vitals"]).values()) == 0

    class Refusing:
        def commit_group(self, *_: Any) -> None:
            raise RuntimeError("group has members")

    fill(kafka, 5, start=20)
    report = ingest(tables, kafka, admin=Refusing())
    assert report.rows == 5
    assert "group has members" in report.warnings[0]


def test_the_monitor_shows_lag_age_and_what_is_wrong_with_the_newest(
    tables: InMemoryTableStore, kafka: FakeKafka
) -> None:
    fill(kafka, 30)
    ingest(tables, kafka)
    moment = round(NOW.timestamp() * 1000)
    kafka.send([Record("patient-vitals", VITALS.replace(b"70", b"999"), b"p1", timestamp_ms=moment - 60_000)])
    report = monitor_topics(tables, kafka, {**TOPICS, "subjects": "subjects"}, now=NOW, sample=300)
    vitals = report.topics["patient_vitals"]
    assert (vitals.lag, vitals.messages, vitals.sampled, vitals.invalid) == (1, 31, 31, 1)
    assert vitals.reasons == {"out_of_range": 1}
    assert vitals.newest_age_seconds == 60
    assert report.topics["lab_results"].newest_age_seconds is None
    assert not report.topics["subjects"].exists
    assert "no such topic" in report.as_markdown()
    assert monitor_topics(tables, kafka, TOPICS, now=NOW, sample=6).topics["patient_vitals"].sampled <= 6


def test_two_ingesters_of_one_delta_table_double_nothing(tmp_path: Path, kafka: FakeKafka) -> None:
    from clinical_orchestration.stores.tables import DeltaTableStore

    sent = fill(kafka, 240)
    start = threading.Barrier(2)

    def work() -> int:
        store = DeltaTableStore(str(tmp_path))
        start.wait()
        return int(ingest(store, kafka, max_batch_rows=20).rows)

    with ThreadPoolExecutor(2) as pool:
        written = [future.result() for future in [pool.submit(work), pool.submit(work)]]
    assert sum(written) == 240
    rows = DeltaTableStore(str(tmp_path)).read("bronze/patient_vitals").column("source_position").to_pylist()
    assert sorted(rows) == sorted(sent)
