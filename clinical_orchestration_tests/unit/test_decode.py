from __future__ import annotations

import base64
import json
from datetime import UTC, datetime, timedelta
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clinical_orchestration.tables import BRONZE_COLUMNS, DOMAINS, SILVER_COLUMNS, arrow_schema
from clinical_orchestration.transforms.decode import decode, decode_arrow, decode_batch, decoded_columns
from clinical_orchestration.transforms.messages import RULES
from clinical_orchestration.transforms.sdtm import DOMAIN_TABLES
from clinical_orchestration.trials import load_trial
from clinical_orchestration_tests.unit.test_messages import VALID
from clinical_orchestration_tests.unit.test_sdtm import BASE

RECEIVED = datetime(2025, 3, 1, 12, tzinfo=UTC)
INGESTED = datetime(2025, 3, 1, 13, tzinfo=UTC)
TRIAL = load_trial("simulated")
PROFILES = {TRIAL.name: TRIAL}


def record(payload: object, **changes: object) -> dict[str, object]:
    return {
        "source": "kafka:t", "source_position": "t-0-1", "ingested_at": INGESTED, "received_at": RECEIVED,
        "trial": TRIAL.name, "record_format": "message", "payload": payload, "payload_encoding": "utf-8", **changes,
    }  # fmt: skip


def rows_of(domain: str, changes: dict[str, Any] | None = None, **columns: object) -> list[dict[str, Any]]:
    decoded = decode(domain, record(json.dumps({**VALID[domain], **(changes or {})}), **columns), TRIAL)
    assert decoded.reasons == []
    for row in decoded.rows:
        assert set(row) == set(SILVER_COLUMNS[domain])
    return decoded.rows


@pytest.mark.parametrize("domain", DOMAINS)
def test_a_valid_message_becomes_silver_rows_that_arrow_takes(domain: str) -> None:
    rows = rows_of(domain)
    assert pa.Table.from_pylist(rows, schema=arrow_schema(SILVER_COLUMNS[domain])).num_rows == len(rows)
    for row in rows:
        assert row["patient_id"] == "P-17"
        assert (row["source"], row["source_position"], row["trial"]) == ("kafka:t", "t-0-1", "simulated")
        assert (row["received_at"], row["ingested_at"]) == (RECEIVED, INGESTED)


def test_a_wide_vitals_message_gives_a_row_a_measurement() -> None:
    rows = rows_of("patient_vitals", {"temperature": None})
    assert [(row["test_code"], row["value"], row["unit"]) for row in rows] == [
        ("HR", 72.0, "beats/min"), ("SYSBP", 121.5, "mmHg"), ("DIABP", 80.0, "mmHg"), ("OXYSAT", 98.0, "%"),
    ]  # fmt: skip
    assert {(row["record_key"], row["content_hash"]) for row in rows} == {
        (rows[0]["record_key"], rows[0]["content_hash"])
    }
    assert {(row["site"], row["arm"]) for row in rows} == {("S1", "placebo")}
    assert [row["original_value"] for row in rows] == ["72", "121.5", "80", "98"]


@pytest.mark.parametrize(
    ("changes", "same_key", "same_content"),
    [
        ({"timestamp": "2025-03-01T11:00:00+01:00"}, True, True),
        ({"timestamp": "2025-03-01T10:00:00"}, True, True),
        ({"heart_rate": 72.0, "message_id": "other", "patient_id": " P-17 "}, True, True),
        ({"heart_rate": 73}, True, False),
        ({"spo2": None}, True, False),
        ({"source": "watch"}, False, False),
        ({"timestamp": "2025-03-01T10:00:01Z"}, False, False),
        ({"patient_id": "P-18"}, False, False),
    ],
)
def test_what_makes_a_vitals_record_the_same(changes: dict[str, Any], same_key: bool, same_content: bool) -> None:
    first = rows_of("patient_vitals")[0]
    other = rows_of("patient_vitals", changes, source_position="t-3-99", received_at=RECEIVED + timedelta(hours=1))[0]
    assert (first["record_key"] == other["record_key"]) is same_key
    assert (first["content_hash"] == other["content_hash"]) is same_content


def test_hashes_differ_between_trials_and_never_change() -> None:
    first = rows_of("lab_results")[0]
    assert rows_of("lab_results", trial="another")[0]["record_key"] != first["record_key"]
    # rows written by earlier versions must be found again: these values are fixed
    assert first["record_key"] == "64969326442d64c618959c900d080351"
    assert first["content_hash"] == "6880a9ae22306bf6110c189effa25e19"


def test_laboratory_messages_are_standardised() -> None:
    (row,) = rows_of("lab_results", {"test_name": "Glucose", "value": 90, "unit": "mg/dL", "reference_range": "70-100"})
    assert (row["test_code"], row["unit"]) == ("GLUC", "mmol/L")
    assert row["value"] == pytest.approx(4.9959)
    assert row["reference_low"] == pytest.approx(3.8857)
    assert (row["reference_indicator"], row["original_value"], row["original_unit"]) == ("NORMAL", "90", "mg/dL")
    (limit,) = rows_of("lab_results", {"value": "<3.42"})
    assert (limit["value"], limit["text_value"]) == (None, "<3.42")
    (other,) = rows_of("lab_results", {"test_name": "new marker", "unit": "au"})
    assert (other["test_code"], other["value"], other["unit"]) == ("NEW_MARKER", 31.0, "au")


def test_an_adverse_event_may_know_its_day_only() -> None:
    (row,) = rows_of("adverse_events", {"event_timestamp": "2025-02-27"})
    assert (row["event_time"], row["onset_precision"]) == (datetime(2025, 2, 27, tzinfo=UTC), "day")


def test_without_a_time_of_receipt_the_report_or_the_event_stands_for_it() -> None:
    (event,) = rows_of("adverse_events", received_at=None)
    assert event["received_at"] == datetime(2025, 3, 1, 11, tzinfo=UTC)
    assert rows_of("medications", received_at=None)[0]["received_at"] == datetime(2025, 3, 1, 10, tzinfo=UTC)


def test_the_future_is_seen_from_the_receipt_not_from_today() -> None:
    payload = json.dumps({**VALID["medications"], "timestamp": "2025-03-05T00:00:00Z"})
    assert decode("medications", record(payload), TRIAL).reasons[0].startswith("future_time")
    assert decode("medications", record(payload, received_at=datetime(2025, 3, 6, tzinfo=UTC)), TRIAL).rows


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"payload": base64.b64encode(b"\xff").decode(), "payload_encoding": "base64"}, "not_utf8"),
        ({"payload": None}, "empty"), ({"payload": "{"}, "invalid_json"), ({"payload": "[]"}, "not_an_object"),
        ({"record_format": None}, "unknown_format"), ({"record_format": "hl7"}, "unknown_format"),
        ({"record_format": "sdtm:QS"}, "wrong_table"), ({"record_format": "sdtm:"}, "wrong_table"),
    ],
)  # fmt: skip
def test_records_that_cannot_be_read_at_all(changes: dict[str, object], rule: str) -> None:
    row = {**record(json.dumps(VALID["patient_vitals"])), **changes}
    decoded = decode("patient_vitals", row, TRIAL)
    assert decoded.rows == []
    assert [reason.split(":")[0] for reason in decoded.reasons] == [rule]


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
plausible_values = json_values | st.sampled_from(
    ["2025-03-01T10:00:00Z", "2014-01-02", "2014", "P1", "grade_2", "1.2", "<5", "1-2", "mmHg", "NOT DONE", "Y", "120",
     "TEMP", "SYSBP", "F", 72, 36.6, 98, 1e308, -0.0, "MILD", "YEARS"]
)  # fmt: skip


@st.composite
def bronze(draw: st.DrawFn) -> tuple[str, dict[str, object]]:
    domain = draw(st.sampled_from(DOMAINS))
    sdtm = draw(st.sampled_from([None, *(name for name, table in DOMAIN_TABLES.items() if table == domain)]))
    known = [rule.name for rule in RULES[domain]] if sdtm is None else ["DOMAIN", "USUBJID", *BASE[sdtm], "_broken_row"]
    base = VALID[domain] if sdtm is None else {"DOMAIN": sdtm, "USUBJID": "P", **BASE[sdtm]}
    changes = draw(st.dictionaries(st.sampled_from(known) | st.text(max_size=5), plausible_values, max_size=4))
    payload = draw(
        st.just(json.dumps({**base, **changes})) | json_values.map(json.dumps) | st.text() | st.none()
        | st.binary().map(lambda raw: base64.b64encode(raw).decode())
    )  # fmt: skip
    columns: dict[str, object] = {
        "record_format": draw(st.sampled_from(["message" if sdtm is None else f"sdtm:{sdtm}", "sdtm:X", None])),
        "payload_encoding": draw(st.sampled_from(["utf-8", "base64", None])),
        "received_at": draw(st.sampled_from([RECEIVED, None])),
    }
    return domain, record(payload, **columns)


@settings(max_examples=600, deadline=None)
@given(bronze())
def test_decoding_never_raises_and_gives_rows_or_reasons(case: tuple[str, dict[str, object]]) -> None:
    domain, row = case
    decoded = decode(domain, row, TRIAL)
    assert bool(decoded.rows) != bool(decoded.reasons)
    assert len(set(decoded.reasons)) == len(decoded.reasons)
    assert all(": " in reason and reason.split(":")[0].isidentifier() for reason in decoded.reasons)
    schema = arrow_schema(SILVER_COLUMNS[domain])
    assert pa.Table.from_pylist(decoded.rows, schema=schema).num_rows == len(decoded.rows)
    for silver in decoded.rows:
        assert set(silver) == set(SILVER_COLUMNS[domain])
        assert silver["patient_id"]
        assert silver["event_time"].tzinfo is UTC  # type: ignore[union-attr]
        assert silver["received_at"] is not None
        assert len(str(silver["record_key"])) == len(str(silver["content_hash"])) == 32


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200), st.sampled_from(DOMAINS))
def test_any_bytes_are_judged(raw: bytes, domain: str) -> None:
    decoded = decode(domain, record(raw), TRIAL)
    assert not decoded.rows
    assert decoded.reasons


def batch_of(records: list[dict[str, object]]) -> pa.RecordBatch:
    schema = arrow_schema({**BRONZE_COLUMNS, "bronze_order": "long"})
    return pa.RecordBatch.from_pylist([{**row, "bronze_order": i} for i, row in enumerate(records)], schema=schema)


def test_arrow_batches_keep_order_schema_and_what_is_passed_through() -> None:
    vitals = json.dumps(VALID["patient_vitals"])
    records = [record(vitals), record("{"), record(vitals, trial="unheard of"), record(vitals)]
    extra = {"bronze_order": "long"}
    out = decode_arrow("patient_vitals", batch_of(records), PROFILES, extra)
    assert out.schema == arrow_schema(decoded_columns("patient_vitals", extra))
    assert out.column("bronze_order").to_pylist() == [0] * 5 + [1, 2] + [3] * 5
    reasons = out.column("reasons").to_pylist()
    assert [None if item is None else item[0].split(":")[0] for item in reasons] == (
        [None] * 5 + ["invalid_json", "unknown_trial"] + [None] * 5
    )
    rejected = out.slice(5, 1).to_pylist()[0]
    assert rejected["payload"] == "{"
    assert (rejected["trial"], rejected["source_position"], rejected["ingested_at"]) == ("simulated", "t-0-1", INGESTED)
    assert rejected["patient_id"] is None
    accepted, refused = decode_batch("patient_vitals", records, PROFILES)
    silver = [name for name in SILVER_COLUMNS["patient_vitals"]]  # noqa: C416
    assert out.filter(pa.compute.is_null(out.column("reasons"))).select(silver).to_pylist() == accepted
    assert [row["reasons"] for row in refused] == reasons[5:7]


@pytest.mark.parametrize("domain", DOMAINS)
def test_an_empty_batch_gives_an_empty_batch_of_the_same_schema(domain: str) -> None:
    out = decode_arrow(domain, batch_of([]), PROFILES)
    assert out.num_rows == 0
    assert out.schema == arrow_schema(decoded_columns(domain))


def test_a_table_of_several_chunks_is_taken_too() -> None:
    batch = batch_of([record(json.dumps(VALID["medications"]))])
    assert decode_arrow("medications", pa.Table.from_batches([batch, batch]), PROFILES).num_rows == 2
