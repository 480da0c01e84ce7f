"""The simulated trial into Kafka (in memory) and into files: complete, once, and resumable."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import orjson
import pytest

from clinical_orchestration.ingestion.gateway import read_records
from clinical_orchestration.ingestion.kafka import ingest_topics
from clinical_orchestration.ingestion.simulate import (
    MARKER_TOPIC,
    ensure_simulated,
    ensure_simulated_files,
    ingest_record_files,
    stream_to_kafka,
    write_files,
)
from clinical_orchestration.settings import Variables
from clinical_orchestration.simulation import GroundTruth, SimulatedMessage, simulate
from clinical_orchestration.stores.kafka import DeliveryError
from clinical_orchestration.stores.sdtm_files import list_sdtm
from clinical_orchestration.stores.sdtm_files import read_records as read_sdtm
from clinical_orchestration.tables import DOMAINS
from clinical_orchestration.transforms.decode import decode
from clinical_orchestration.trials import TrialProfile, load_trial
from clinical_orchestration_tests.fakes import InMemoryTableStore
from clinical_orchestration_tests.ingestion.fake_kafka import FakeKafka

TOPICS = Variables().topics()
NOW = datetime(2025, 3, 1, tzinfo=UTC)


@pytest.fixture(scope="module")
def profile() -> TrialProfile:
    trial = load_trial("simulated")
    assert trial.sources.simulation is not None
    change = {"subjects": 6, "days": 2, "broken_rate": 0.05, "duplicate_rate": 0.03, "late_rate": 0.03}
    settings = trial.sources.simulation.model_copy(update=change)
    return trial.model_copy(update={"sources": trial.sources.model_copy(update={"simulation": settings})})


@pytest.fixture(scope="module")
def messages(profile: TrialProfile) -> list[SimulatedMessage]:
    assert profile.sources.simulation is not None
    return list(simulate(profile.sources.simulation, profile.study_id))


def values(kafka: FakeKafka) -> list[tuple[str, bytes | None]]:
    return sorted(
        ((m.topic, m.value) for topic in TOPICS.values() for log in kafka.logs[topic] for m in log.messages),
        key=repr,
    )


def expected(messages: Iterable[SimulatedMessage]) -> list[tuple[str, bytes | None]]:
    return sorted(((TOPICS[m.domain], m.value) for m in messages), key=repr)


def test_a_simulation_is_produced_once(profile: TrialProfile, messages: list[SimulatedMessage]) -> None:
    kafka = FakeKafka()
    first = ensure_simulated(kafka, kafka, kafka, profile, TOPICS)
    assert (first.produced, first.present) == (len(messages), 0)
    assert first.truth.total == len(messages)
    assert values(kafka) == expected(messages)
    again = ensure_simulated(kafka, kafka, kafka, profile, TOPICS)
    assert (again.produced, again.present) == (0, len(messages))
    assert values(kafka) == expected(messages)
    assert set(TOPICS.values()) | {MARKER_TOPIC} <= kafka.kept_forever  # simulated times are long ago


def test_a_record_carries_arrival_trial_and_key(profile: TrialProfile, messages: list[SimulatedMessage]) -> None:
    kafka = FakeKafka()
    ensure_simulated(kafka, kafka, kafka, profile, TOPICS)
    by_sequence = {
        int(m.header("sequence") or -1): m for t in TOPICS.values() for log in kafka.logs[t] for m in log.messages
    }
    for sent in messages:
        found = by_sequence[sent.sequence]
        assert (found.timestamp_ms, found.key, found.header("trial")) == (sent.arrival_ms, sent.key, profile.name)


@pytest.mark.parametrize("after", [0, 1, 137, 411])
def test_an_interrupted_simulation_goes_on_where_it_was(
    profile: TrialProfile, messages: list[SimulatedMessage], after: int
) -> None:
    kafka = FakeKafka()
    kafka.refuse_after = after
    with pytest.raises(DeliveryError):
        ensure_simulated(kafka, kafka, kafka, profile, TOPICS)
    kafka.refuse_after = None
    rest = ensure_simulated(kafka, kafka, kafka, profile, TOPICS)
    assert (rest.produced, rest.present) == (len(messages) - after, after)
    assert values(kafka) == expected(messages)


def test_a_topic_that_was_made_anew_gets_its_messages_again(
    profile: TrialProfile, messages: list[SimulatedMessage]
) -> None:
    kafka = FakeKafka()
    ensure_simulated(kafka, kafka, kafka, profile, TOPICS)
    kafka.delete_topics(["lab-results"])
    assert ensure_simulated(kafka, kafka, kafka, profile, TOPICS).produced == sum(
        m.domain == "lab_results" for m in messages
    )
    assert values(kafka) == expected(messages)


def test_a_trial_without_a_simulation_is_refused() -> None:
    kafka = FakeKafka()
    with pytest.raises(ValueError, match="no simulation"):
        ensure_simulated(kafka, kafka, kafka, load_trial("cdisc-pilot"), TOPICS)


def test_the_rate_is_kept(messages: list[SimulatedMessage], monkeypatch: pytest.MonkeyPatch) -> None:
    kafka = FakeKafka()
    kafka.ensure_topics(TOPICS.values())
    clock = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    monkeypatch.setattr("time.sleep", lambda seconds: clock.__setitem__(0, clock[0] + seconds))
    seen: list[int] = []
    sent = stream_to_kafka(
        kafka, itertools.islice(messages, 300), TOPICS, trial="simulated", rate=100, progress=seen.append
    )
    assert (sent, seen[-1]) == (300, 300)
    assert clock[0] == pytest.approx(3.0)
    assert len(seen) == 30  # ten times a second


def test_files_and_kafka_give_the_same_raw_records(
    tmp_path: Path, profile: TrialProfile, messages: list[SimulatedMessage]
) -> None:
    kafka, by_kafka, by_files = FakeKafka(), InMemoryTableStore(), InMemoryTableStore()
    ensure_simulated(kafka, kafka, kafka, profile, TOPICS)
    ingest_topics(by_kafka, kafka, TOPICS, default_trial=profile.name, now=NOW)
    report = ensure_simulated_files(by_files, tmp_path, profile, TOPICS, now=NOW)
    assert report.produced == len(messages)
    columns = ["ingested_at", "received_at", "trial", "record_format", "payload", "payload_encoding"]
    for domain in DOMAINS:
        left, right = (
            sorted(map(repr, store.read(f"bronze/{domain}", columns=columns).to_pylist()))
            for store in (by_kafka, by_files)
        )
        assert left == right
        rows = by_files.read(f"bronze/{domain}").to_pylist()
        assert {row["source"] for row in rows} == {f"file:{TOPICS[domain]}.records.ndjson"}
        assert len({row["source_position"] for row in rows}) == len(rows)
    again = ensure_simulated_files(by_files, tmp_path, profile, TOPICS, now=NOW)
    assert (again.produced, again.present) == (0, len(messages))


def test_an_interrupted_ingestion_of_files_goes_on(
    tmp_path: Path, profile: TrialProfile, messages: list[SimulatedMessage]
) -> None:
    write_files(tmp_path, messages, TOPICS, trial=profile.name)
    tables = InMemoryTableStore()

    class Dying:
        left = 3

        def __getattr__(self, name: str) -> Any:
            return getattr(tables, name)

        def append(self, *args: Any, **more: Any) -> Any:
            if self.left == 0:
                raise KeyboardInterrupt
            self.left -= 1
            return tables.append(*args, **more)

    with pytest.raises(KeyboardInterrupt):
        ingest_record_files(Dying(), tmp_path, TOPICS, default_trial=profile.name, now=NOW, chunk_rows=40)
    rest = ingest_record_files(tables, tmp_path, TOPICS, default_trial=profile.name, now=NOW, chunk_rows=40)
    assert sum(rest.values()) == len(messages) - 120
    assert sum(tables.row_count(f"bronze/{domain}") for domain in DOMAINS) == len(messages)


def test_an_unfinished_file_is_never_seen(tmp_path: Path, messages: list[SimulatedMessage]) -> None:
    def failing() -> Iterable[SimulatedMessage]:
        yield from messages[:50]
        raise RuntimeError("out of disk")

    with pytest.raises(RuntimeError, match="out of disk"):
        write_files(tmp_path, failing(), TOPICS, trial="simulated")
    assert list(tmp_path.iterdir()) == []


def test_lines_are_what_the_gateway_takes(tmp_path: Path, messages: list[SimulatedMessage]) -> None:
    written = write_files(tmp_path, messages, TOPICS, trial="simulated", sdtm=False)
    body = (tmp_path / "patient-vitals.ndjson").read_bytes()
    values_, _, _ = read_records(body, "application/x-ndjson")
    assert values_ == [m.value for m in messages if m.domain == "patient_vitals" and m.value is not None]
    assert written.rows["patient-vitals.ndjson"] == len(values_)


def test_the_sdtm_files_decode_to_what_the_messages_say(
    tmp_path: Path, profile: TrialProfile, messages: list[SimulatedMessage]
) -> None:
    write_files(tmp_path, messages, TOPICS, trial=profile.name)

    def facts(domain: str, rows: list[dict[str, object]]) -> set[tuple[object, ...]]:
        names = {
            "patient_vitals": ("patient_id", "event_time", "test_code", "value", "unit"),
            "lab_results": ("patient_id", "event_time", "test_code", "value", "unit"),
            "medications": ("patient_id", "event_time", "drug_name", "dose", "dose_unit"),
            "adverse_events": ("patient_id", "event_time", "event_type", "severity"),
            "subjects": ("patient_id", "event_time", "age_years", "sex", "arm", "site", "treatment_start"),
        }[domain]
        return {
            tuple(value.upper() if isinstance(value, str) else value for value in (row[name] for name in names))
            for row in rows
        }

    by_files: dict[str, list[dict[str, object]]] = {domain: [] for domain in DOMAINS}
    keys: dict[str, list[object]] = {domain: [] for domain in DOMAINS}
    for file in list_sdtm(tmp_path):
        for chunk in read_sdtm(file):
            for text in chunk:
                record = {
                    "record_format": file.record_format,
                    "payload": text,
                    "trial": profile.name,
                    "ingested_at": NOW,
                }
                decoded = decode(file.table, record, profile)
                assert not decoded.reasons, decoded.reasons
                by_files[file.table] += decoded.rows
                keys[file.table].append(decoded.rows[0]["record_key"])
    truth = GroundTruth()
    for domain in DOMAINS:
        by_messages: list[dict[str, object]] = []
        for message in messages:
            if message.domain == domain and message.record is not None:
                truth.add(message)
                record = {
                    "record_format": "message",
                    "payload": message.value,
                    "trial": profile.name,
                    "ingested_at": NOW,
                }
                by_messages += decode(domain, record, profile).rows
        assert facts(domain, by_files[domain]) == facts(domain, by_messages)
        repeated = len(keys[domain]) - len(set(keys[domain]))
        assert repeated >= truth.of_kind("duplicate", domain=domain)  # a repeated message gives repeated rows


def test_the_command_writes_files_and_says_what_is_in_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from clinical_orchestration.ingestion.simulate import main

    arguments = ["--messages", "500", "--seed", "5", "--broken", "0.1", "--duplicates", "0.05", "--late", "0.05"]
    assert main([*arguments, "--files", str(tmp_path)]) == 0
    summary = orjson.loads(capsys.readouterr().out)
    assert summary["messages"] == sum(summary["kinds"].values()) == 500
    lines = sum(len(path.read_bytes().splitlines()) for path in tmp_path.glob("*.records.ndjson"))
    assert lines == 500


def test_the_command_without_a_broker_fails_and_says_what_to_do(capsys: pytest.CaptureFixture[str]) -> None:
    from clinical_orchestration.ingestion.simulate import main

    assert main(["--messages", "10", "--bootstrap-servers", "127.0.0.1:1"]) == 1
    assert "KAFKA_BOOTSTRAP_SERVERS" in capsys.readouterr().err
