"""ORU^R01 messages as laboratory messages: types, times, escapes, and every fault named without naming a patient."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta, timezone
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clinical_orchestration.transforms.hl7 import looks_like_hl7, read_oru, read_time
from clinical_orchestration.transforms.messages import validate_message

PATIENT = "SUBJ-0042"


def message(*segments: str, stamp: str = "20240102080000+0100", charset: str = "UNICODE UTF-8") -> str:
    head = f"MSH|^~\\&|LIS|LAB7|EDC|CTMS|{stamp}||ORU^R01^ORU_R01|M1|P|2.5.1||||||{charset}"
    return "\r".join([head, f"PID|1||{PATIENT}^^^STUDY^PI||Doe^Jane", "OBR|1|||PANEL|||20240101101500+0100", *segments])


def test_a_numeric_result_has_every_field_of_the_contract() -> None:
    report = read_oru(
        message("OBX|1|NM|2823-3^Potassium^LN||4.1|mmol/L^^UCUM|3.5-5.1|N|||F|||20240101101500+0100|CENTRAL^Lab")
    )
    assert report.reasons == []
    assert report.messages == [
        {
            "patient_id": PATIENT,
            "timestamp": "2024-01-01T09:15:00Z",
            "test_name": "Potassium",
            "value": 4.1,
            "unit": "mmol/L",
            "reference_range": "3.5-5.1",
            "lab_id": "CENTRAL",
            "result_status": "F",
            "test_code": "2823-3",
            "coding_system": "LN",
        }
    ]
    assert validate_message("lab_results", report.messages[0]) == []


@pytest.mark.parametrize(
    ("kind", "field", "value"),
    [
        ("NM", "140", 140),
        ("NM", "+5.20", 5.2),
        ("NM", ".5", 0.5),
        ("NM", "<0.01", "<0.01"),
        ("SN", "<^3.42", "<3.42"),
        ("SN", ">=^60", ">=60"),
        ("SN", "^7.5", 7.5),
        ("SN", "=^7", 7),
        ("ST", "4.4", 4.4),
        ("ST", "> 90", ">90"),
        ("ST", "Negative", "Negative"),
        ("CE", "260385009^Negative^SCT", "Negative"),
        ("CWE", "POS", "POS"),
        ("TX", "Detected", "Detected"),
    ],
)
def test_value_types(kind: str, field: str, value: float | str) -> None:
    report = read_oru(message(f"OBX|1|{kind}|GLUC^Glucose||{field}|mmol/L|||||F"))
    assert report.reasons == []
    assert report.messages[0]["value"] == value
    assert type(report.messages[0]["value"]) is type(value)


def test_the_time_falls_back_to_obr_7_and_its_zone_to_msh_7_and_then_to_the_callers() -> None:
    def time(obr: str, stamp: str) -> str:
        text = message("OBX|1|NM|K||4|mmol/L|||||F", stamp=stamp).replace("20240101101500+0100", obr)
        report = read_oru(text, zone=ZoneInfo("Europe/Berlin"))
        assert report.reasons == []
        return str(report.messages[0]["timestamp"])

    assert time("202407011015-0500", "20240102080000+0100") == "2024-07-01T15:15:00Z"
    assert time("202407011015", "20240102080000-0500") == "2024-07-01T15:15:00Z"
    assert time("202407011015", "20240102080000") == "2024-07-01T08:15:00Z"  # summer time in Berlin
    assert time("20240701101530.25", "20240102080000+0000") == "2024-07-01T10:15:30.250000Z"


def test_escapes_repetitions_and_other_separators() -> None:
    report = read_oru(
        message("OBX|1|ST|X^Beta \\T\\ \\H\\gamma\\N\\ \\X47\\\\F\\||Negative|10\\S\\9/L|a\\R\\b\\E\\||||F").replace(
            f"{PATIENT}^^^STUDY^PI", f"111^^^H^MR~{PATIENT}^^^STUDY^PI"
        ),
        identifier_types={"PI"},
    )
    assert report.reasons == []
    (found,) = report.messages
    assert found["patient_id"] == PATIENT
    assert found["test_name"] == "Beta & gamma G|"
    assert found["unit"] == "10^9/L"
    assert found["reference_range"] == "a~b\\"
    other = "MSH$*~!%$LIS$L$$$20240101$$ORU*R01$1$P$2.3\nPID$1$$P1\nOBR$1$$$$$$202401010800\nOBX$1$NM$K*Kalium$$4.0\n"
    assert read_oru(other).messages[0]["test_name"] == "K"


def test_charsets_of_bytes() -> None:
    text = message("OBX|1|NM|X^Kreatinin µ||4|µmol/L|||||F")
    for charset, codec in (("UNICODE UTF-8", "utf-8"), ("8859/1", "latin-1"), ("", "utf-8")):
        raw = text.replace("UNICODE UTF-8", charset).encode(codec)
        assert read_oru(raw).messages[0]["unit"] == "µmol/L", charset
    assert read_oru(b"\x0b" + text.encode() + b"\x1c\r").messages[0]["unit"] == "µmol/L"
    wrong = read_oru(text.encode("latin-1"))
    assert [reason.partition(":")[0] for reason in wrong.reasons] == ["not_decodable"]
    unknown = read_oru(text.replace("UNICODE UTF-8", "GB 18030-2000").encode())
    assert [reason.partition(":")[0] for reason in unknown.reasons] == ["unsupported_charset"]


def test_only_final_results_are_passed_on_and_the_others_counted() -> None:
    segments = [f"OBX|{i}|NM|K{i}||{i}|||||| {status}" for i, status in enumerate("FCPXUI", 1)]
    report = read_oru(message(*(segment.replace("| ", "|") for segment in segments)))
    assert [item["result_status"] for item in report.messages] == ["F", "C", "U"]
    assert dict(report.withheld) == {"P": 1, "X": 1, "I": 1}


def test_a_withdrawal_refuses_the_message() -> None:
    report = read_oru(message("OBX|1|NM|K||4||||||F", "OBX|2|NM|NA||140||||||W"))
    assert report.messages == []
    assert report.reasons == ["withdrawal: OBX 2 asks to withdraw an earlier result (status W)"]


def test_all_faults_are_named_and_no_patient() -> None:
    broken = "\r".join(
        [
            "MSH|^~\\&|LIS|LAB7|||20240101||ORU^R01|1|P|2.5",
            "PID|1||^^^STUDY||Doe^Jane",
            "OBR|1|||PANEL|||20240101",
            f"OBX|1|NM|K||{PATIENT}||||||F",
            "OBX|2|NM|||4||||||F|||202413010800",
            "OBX|3|ED|IMG||xyz||||||F",
            "OBX|4|NM|NA||1~2||||||F",
            "OBX|5|NM|CL||||||||F",
            "OBX|6|SN|CL||^1^:^128||||||F",
            "OBX|7|NM|CL||3||||||?",
        ]
    )
    report = read_oru(broken)
    assert report.messages == []
    text = "\n".join(report.reasons)
    for expected in (
        "missing_field: PID-3 of PID 1 has no identifier",
        "invalid_number: OBX-5 of OBX 1",
        "invalid_time: OBR-7 of OBX 1 lacks its hours and minutes",
        "missing_field: OBX-3 of OBX 2",
        "invalid_time: OBX-14 of OBX 2 is no time of the calendar",
        "unsupported_type: OBX-2 of OBX 3 is ED",
        "repeated_value: OBX-5 of OBX 4",
        "missing_field: OBX-5 of OBX 5",
        "unsupported_value: OBX-5 of OBX 6",
        "unknown_status: OBX-11 of OBX 7",
    ):
        assert expected in text
    assert PATIENT not in text
    assert "Jane" not in text


@pytest.mark.parametrize(
    ("payload", "rule"),
    [
        ("", "invalid_hl7"),
        ("PID|1||X", "invalid_hl7"),
        ("MSH", "invalid_hl7"),
        ("MSH|^~\\&|A", "unsupported_message"),
        ("MSH|^~\\&|A|B|||20240101||ADT^A01|1|P|2.5\rPID|1||X", "unsupported_message"),
        ("MSH|^~\\&|A|B|||20240101||ORU^R01|1|P|2.5", "missing_field"),
        ("MSH|^~\\&|A|B|||20240101||ORU^R01|1|P|2.5\rPID|1||X", "no_result"),
        ("MSH|^~\\&|A|B|||20240101||ORU^R01|1|P|2.5\rMSH|^~\\&|A\rPID|1||X", "several_messages"),
    ],
)
def test_what_is_no_result_message(payload: str, rule: str) -> None:
    report = read_oru(payload)
    assert report.messages == []
    assert rule in {reason.partition(":")[0] for reason in report.reasons}


def test_two_patients_in_one_message_keep_their_results_apart() -> None:
    text = message("OBX|1|NM|K||4||||||F") + "\rPID|2||OTHER\rOBR|1||||||202401020900\rOBX|1|NM|K||5||||||F"
    found = read_oru(text).messages
    assert [(item["patient_id"], item["value"]) for item in found] == [(PATIENT, 4), ("OTHER", 5)]
    assert found[1]["timestamp"] == "2024-01-02T08:00:00Z"


def test_hl7_is_recognised() -> None:
    assert looks_like_hl7("MSH|^~\\&|")
    assert looks_like_hl7(b"\x0bMSH|^~\\&|")
    assert looks_like_hl7(b"\xef\xbb\xbfMSH|")
    assert not looks_like_hl7('{"MSH": 1}')


@given(st.one_of(st.text(), st.binary(), st.text(alphabet="MSHPIDOBRX|^~\\&\r1230F")))
def test_no_payload_is_an_error(payload: str | bytes) -> None:
    report = read_oru(payload)
    assert bool(report.reasons) != bool(report.messages) or report.withheld


@given(st.lists(st.text(alphabet="MSHPIDOBRX|^~\\&1230F", max_size=40), max_size=6))
def test_no_segments_are_an_error(segments: list[str]) -> None:
    report = read_oru(message(*segments))
    assert bool(report.reasons) != bool(report.messages) or report.withheld


@given(st.integers(-600_000_000, 4_000_000_000), st.integers(-12 * 60, 14 * 60))
def test_time_stamps_keep_their_moment(seconds: int, minutes: int) -> None:
    moment = datetime.fromtimestamp(seconds, tz=timezone(timedelta(minutes=minutes)))
    sign, size = ("-" if minutes < 0 else "+"), abs(minutes)
    text = f"{moment:%Y%m%d%H%M%S}{sign}{size // 60:02}{size % 60:02}"
    assert read_time(text, UTC) == (moment.astimezone(UTC), "")
