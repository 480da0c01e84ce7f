"""Consumer lag by group, and messages against the contract."""

from __future__ import annotations

import json
from datetime import timedelta
from pathlib import Path

import pytest

from clinical_orchestration.ingestion.kafka_tools import (
    consumer_lag,
    domain_of,
    validate_file,
    validate_messages,
)
from clinical_orchestration.stores.kafka import (
    ConfluentTopicAdmin,
    KafkaUnavailableError,
    Record,
    open_producer,
    topic_admin,
)
from clinical_orchestration_tests.factories import NOW, vitals_message
from clinical_orchestration_tests.ingestion.fake_kafka import FakeKafka


def test_lag_of_every_group_on_its_topics_largest_first() -> None:
    kafka = FakeKafka()
    kafka.ensure_topics(["patient-vitals", "lab-results"], partitions=2)
    kafka.send([Record("patient-vitals", b"{}", key=bytes([number])) for number in range(10)])
    ends = {number: bounds.end for number, bounds in kafka.offsets("patient-vitals").items()}
    kafka.commit_group("slow", {("patient-vitals", 0): 0, ("patient-vitals", 1): 0})
    kafka.commit_group("fast", {("patient-vitals", number): end for number, end in ends.items()})
    found = consumer_lag(kafka)
    assert [(item.group, item.topic, item.lag) for item in found] == [
        ("slow", "patient-vitals", 10),
        ("fast", "patient-vitals", 0),
    ]
    assert found[0].partitions == ends
    assert consumer_lag(kafka, groups=["fast"], topics=["lab-results"]) == []
    with pytest.raises(LookupError, match="no consumer group missing"):
        consumer_lag(kafka, groups=["missing"])


def test_messages_are_counted_by_rule_and_described_without_their_content() -> None:
    good = json.dumps(vitals_message(1))
    bad = json.dumps(vitals_message(2, heart_rate=999, patient_id="SECRET-7"))
    report = validate_messages("patient_vitals", [good, bad, "{broken", good], now=NOW)
    assert (report.checked, report.valid, report.invalid) == (4, 2, 2)
    assert [place for place, _ in report.faults] == [2, 3]
    assert sum(report.reasons.values()) == 2
    assert "SECRET-7" not in json.dumps(report.as_dict())
    with pytest.raises(LookupError, match="there is no domain"):
        validate_messages("x", [])


def test_a_message_of_the_future_is_invalid_only_until_then() -> None:
    later = [vitals_message(1, timestamp=(NOW + timedelta(days=10)).isoformat())]
    assert validate_messages("patient_vitals", later, now=NOW).invalid == 1
    assert validate_messages("patient_vitals", later, now=NOW + timedelta(days=11)).invalid == 0


def test_files_hold_lines_or_one_array(tmp_path: Path) -> None:
    messages = [vitals_message(1), vitals_message(2, spo2="high")]
    lines = tmp_path / "patient-vitals.jsonl"
    lines.write_text("\n".join(json.dumps(message) for message in messages) + "\n\n")
    array = tmp_path / "some.json"
    array.write_text(json.dumps(messages))
    for report in (validate_file(lines, now=NOW), validate_file(array, "patient-vitals", now=NOW)):
        assert (report.checked, report.invalid, report.faults[0][0]) == (2, 1, 2)
    with pytest.raises(LookupError, match="tells no domain"):
        validate_file(array)
    array.write_text("[1, 2")
    assert validate_file(array, "patient_vitals").invalid == 1
    array.write_text("[1, 2]")
    assert validate_file(array, "patient_vitals").invalid == 2


@pytest.mark.parametrize(
    ("name", "domain"),
    [("lab-results", "lab_results"), ("adverse-events.ndjson", "adverse_events"), ("subjects", "subjects")],
)
def test_names_tell_their_domain(name: str, domain: str) -> None:
    assert domain_of(name) == domain


def test_groups_of_a_broker_that_is_away_are_an_error_and_not_none() -> None:
    with pytest.raises(KafkaUnavailableError, match=r"127\.0\.0\.1:9"):
        consumer_lag(ConfluentTopicAdmin("127.0.0.1:9", timeout=1.0))


@pytest.mark.integration
def test_lag_on_a_real_broker(kafka_env: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KAFKA_BOOTSTRAP_SERVERS", kafka_env["KAFKA_BOOTSTRAP_SERVERS"])
    admin, topic, group = topic_admin(), "lag-of-groups", "tools-test"
    admin.ensure_topics([topic], partitions=2)
    with open_producer() as producer:
        producer.send([Record(topic, b"{}", key=str(number).encode()) for number in range(20)])
    admin.commit_group(group, {(topic, 0): 1})
    assert admin.groups()[group] == "empty"
    (found,) = consumer_lag(admin, groups=[group])
    assert (found.group, found.topic, found.lag) == (group, topic, 19)
