from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clinical_orchestration.tables import DOMAINS
from clinical_orchestration.transforms.messages import (
    MEASUREMENTS,
    RULES,
    message_schema,
    read_reference_range,
    validate_message,
)

NOW = datetime(2025, 3, 1, 12, tzinfo=UTC)

VALID: dict[str, dict[str, Any]] = {
    "patient_vitals": {
        "patient_id": "P-17", "timestamp": "2025-03-01T10:00:00Z", "heart_rate": 72, "blood_pressure_systolic": 121.5,
        "blood_pressure_diastolic": 80, "temperature": 36.6, "spo2": 98, "source": "monitor", "trial_site": "S1",
        "trial_arm": "placebo",
    },
    "lab_results": {
        "patient_id": "P-17", "timestamp": "2025-03-01T10:00:00Z", "test_name": "ALT", "value": 31, "unit": "U/L",
        "reference_range": "7-56", "lab_id": "L-1",
    },
    "medications": {
        "patient_id": "P-17", "timestamp": "2025-03-01T10:00:00Z", "drug_name": "Warfarin", "dosage": 5, "unit": "mg",
        "route": "oral", "frequency": "QD",
    },
    "adverse_events": {
        "patient_id": "P-17", "event_timestamp": "2025-03-01T10:00:00Z", "event_type": "headache",
        "severity": "grade_2", "reported_by": "investigator", "report_timestamp": "2025-03-01T11:00:00Z",
    },
    "subjects": {
        "patient_id": "P-17", "study_id": "S", "age": 64, "sex": "F", "race": "WHITE", "site": "S1", "arm": "placebo",
        "enrolled_at": "2025-01-01",
    },
}  # fmt: skip


def rules_of(reasons: list[str]) -> set[str]:
    return {reason.split(":")[0] for reason in reasons}


@pytest.mark.parametrize("domain", DOMAINS)
def test_a_valid_message_has_no_reasons(domain: str) -> None:
    assert validate_message(domain, VALID[domain], now=NOW) == []
    assert validate_message(domain, json.dumps(VALID[domain]), now=NOW) == []
    assert validate_message(domain, json.dumps(VALID[domain]).encode(), now=NOW) == []


@pytest.mark.parametrize("domain", DOMAINS)
@pytest.mark.parametrize("bad", [None, "", "  "])
def test_each_required_field_is_missed(domain: str, bad: object) -> None:
    for rule in RULES[domain]:
        message = {**VALID[domain], rule.name: bad}
        reasons = validate_message(domain, message, now=NOW)
        assert (f"missing_field: {rule.name} is missing or blank" in reasons) == rule.required


@pytest.mark.parametrize("rule", MEASUREMENTS, ids=lambda rule: rule.name)
def test_measurements_outside_the_contract_are_out_of_range_and_its_bounds_are_inside(rule: Any) -> None:
    for value, expected in (
        (rule.minimum, set()), (rule.maximum, set()), (rule.minimum - 0.1, {"out_of_range"}),
        (rule.maximum + 0.1, {"out_of_range"}), (str(rule.minimum), {"wrong_type"}), (True, {"wrong_type"}),
        ([rule.minimum], {"wrong_type"}), (float("nan"), {"not_finite"}), (float("inf"), {"not_finite"}),
        (10**400, {"not_finite"}),
    ):  # fmt: skip
        reasons = validate_message("patient_vitals", {**VALID["patient_vitals"], rule.name: value}, now=NOW)
        assert rules_of(reasons) == expected, value


def test_all_reasons_of_a_record_are_given() -> None:
    message = {"timestamp": "yesterday", "heart_rate": 300, "spo2": "97", "schema_version": "9", "trial_site": 5}
    assert rules_of(validate_message("patient_vitals", message, now=NOW)) == {
        "missing_field", "invalid_time", "out_of_range", "wrong_type", "unknown_schema_version",
    }  # fmt: skip
    assert len(validate_message("patient_vitals", message, now=NOW)) == 6


@pytest.mark.parametrize(
    ("payload", "rule"),
    [
        (b"\xff\xfe", "not_utf8"), ("", "empty"), ("   ", "empty"), ("{", "invalid_json"), ("[1]", "not_an_object"),
        ("null", "not_an_object"), ('"text"', "not_an_object"), ('{"a": "\\ud800"}', "invalid_json"),
        ("[" * 5000, "invalid_json"), ("NaN" + "[" * 5000, "invalid_json"),
    ],
)  # fmt: skip
def test_what_is_no_json_object_is_refused(payload: str | bytes, rule: str) -> None:
    assert rules_of(validate_message("patient_vitals", payload, now=NOW)) == {rule}


def test_nan_as_a_token_is_named_with_the_other_faults() -> None:
    reasons = validate_message("patient_vitals", '{"heart_rate": NaN, "timestamp": "2025-03-01T10:00:00Z"}', now=NOW)
    assert rules_of(reasons) == {"invalid_json", "not_finite", "missing_field"}


@pytest.mark.parametrize("version", ["1.0", "1.1", "1.2", 1.2, None])
def test_known_schema_versions_are_accepted(version: object) -> None:
    assert validate_message("medications", {**VALID["medications"], "schema_version": version}, now=NOW) == []


@pytest.mark.parametrize("version", ["1.3", "2", "", "1.20", 2, True, [1]])
def test_unknown_schema_versions_are_refused(version: object) -> None:
    reasons = validate_message("medications", {**VALID["medications"], "schema_version": version}, now=NOW)
    assert rules_of(reasons) == (set() if version == "" else {"unknown_schema_version"})


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("2025-03-01T10:00:00", None), ("2025-03-01T10:00", None), ("2025-03-01T10:00:00+05:00", None),
        ("2025-03-02T11:59:00Z", None), ("2025-03-02T12:01:00Z", "future_time"), ("2025-03-01", "incomplete_time"),
        ("2025", "incomplete_time"), ("1800-01-01T00:00Z", "implausible_time"), ("01.03.2025", "invalid_time"),
        (1740823200, "wrong_type"),
    ],
)  # fmt: skip
def test_times_of_measurements(text: object, rule: str | None) -> None:
    reasons = validate_message("patient_vitals", {**VALID["patient_vitals"], "timestamp": text}, now=NOW)
    assert rules_of(reasons) == ({rule} if rule else set())


def test_a_vitals_message_needs_a_measurement() -> None:
    bare = {"patient_id": "P", "timestamp": "2025-03-01T10:00:00Z", "spo2": None}
    assert rules_of(validate_message("patient_vitals", bare, now=NOW)) == {"no_measurement"}
    wrong = {**bare, "spo2": 5}
    assert rules_of(validate_message("patient_vitals", wrong, now=NOW)) == {"out_of_range"}


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        ({"value": "<3.42"}, None), ({"value": ">= 100"}, None), ({"value": "negative"}, None),
        ({"value": "5.4"}, "wrong_type"), ({"value": "about five"}, "wrong_type"), ({"value": False}, "wrong_type"),
        ({"value": -1}, "out_of_range"), ({"value": -1, "test_name": "base excess"}, None),
        ({"reference_range": {"low": 1, "high": 2}}, None), ({"reference_range": "see report"}, None),
    ],
)  # fmt: skip
def test_laboratory_values(change: dict[str, Any], rule: str | None) -> None:
    reasons = validate_message("lab_results", {**VALID["lab_results"], **change}, now=NOW)
    assert rules_of(reasons) == ({rule} if rule else set())


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ("3.5-5.1", (3.5, 5.1)), ("3.5 - 5.1 mmol/L", (3.5, 5.1)), ("70 to 100", (70, 100)), ("-2-2", (-2, 2)),
        ("<5", (None, 5)), (">= 60 mL/min", (60, None)), ("5-3", (None, None)), ("normal", (None, None)),
        ({"low": 1, "high": 2}, (1, 2)), ([1, None], (1, None)), (["a", True], (None, None)), (7, (None, None)),
    ],
)  # fmt: skip
def test_reference_ranges_are_read(raw: object, expected: tuple[float | None, float | None]) -> None:
    assert read_reference_range(raw) == expected


def test_adverse_events_know_the_five_grades_only() -> None:
    for grade in range(1, 6):
        assert (
            validate_message("adverse_events", {**VALID["adverse_events"], "severity": f"Grade_{grade}"}, now=NOW) == []
        )
    for severity in ("grade_0", "grade_6", "severe", 3):
        assert validate_message("adverse_events", {**VALID["adverse_events"], "severity": severity}, now=NOW)


def test_a_report_before_its_event_is_inconsistent() -> None:
    message = {**VALID["adverse_events"], "report_timestamp": "2025-02-26T10:00:00Z"}
    assert rules_of(validate_message("adverse_events", message, now=NOW)) == {"inconsistent_times"}


@given(st.text(min_size=6).filter(str.strip), st.sampled_from(DOMAINS))
def test_no_reason_repeats_a_text_of_the_message(secret: str, domain: str) -> None:
    marked = f"{secret}#7f3a"
    message = {rule.name: marked for rule in RULES[domain]}
    for reason in validate_message(domain, message, now=NOW):
        assert marked not in reason
        assert "#7f3a" not in reason


@pytest.mark.parametrize("domain", DOMAINS)
def test_the_schema_says_what_the_rules_say(domain: str) -> None:
    schema = message_schema(domain)
    assert set(schema["properties"]) == {rule.name for rule in RULES[domain]}
    assert schema["required"] == [rule.name for rule in RULES[domain] if rule.required]
    assert schema["additionalProperties"] is True
    json.dumps(schema)
    for rule in RULES[domain]:
        field = schema["properties"][rule.name]
        assert field.get("minimum") == rule.minimum
        assert field.get("maximum") == rule.maximum
        assert ("null" in field["type"]) == (not rule.required)
