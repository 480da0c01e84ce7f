"""Schemas, completeness, consistency across tables and SDTM rules: each finds its seeded defect, and only that."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import orjson
import polars as pl
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clinical_orchestration.quality import completeness, sdtm
from clinical_orchestration.quality.consistency import check_consistency
from clinical_orchestration.quality.results import RuleResult
from clinical_orchestration.quality.rules import check_table
from clinical_orchestration.quality.schemas import FILLED, TYPED, contract_versions, silver_schema, validate_schema
from clinical_orchestration.tables import DOMAINS, SILVER_COLUMNS, arrow_schema
from clinical_orchestration.transforms.messages import SCHEMA_VERSIONS
from clinical_orchestration_tests.quality_frames import simulated_frames

START = datetime(2025, 1, 10, tzinfo=UTC)
DAY = timedelta(days=1)

_VALUES: dict[str, dict[str, Any]] = {
    "patient_vitals": {"test_code": "SYSBP", "value": 120.0, "unit": "mmHg", "original_value": "120",
                       "original_unit": "mmHg", "site": "S1", "arm": "A", "visit": "BASELINE"},
    "lab_results": {"test_code": "ALT", "value": 20.0, "unit": "U/L", "original_value": "20", "test_name": "ALT",
                    "lab_id": "L1", "visit": "BASELINE"},
    "medications": {"drug_name": "DRUG", "start_precision": "day", "dose": 1.0, "dose_unit": "mg", "route": "ORAL",
                    "frequency": "QD", "start_time": START + DAY, "end_time": START + 2 * DAY, "study_drug": True},
    "adverse_events": {"event_type": "RASH", "severity": "grade_1", "onset_precision": "day"},
    "subjects": {"age_years": 60.0, "sex": "F", "site": "S1", "arm": "A", "screen_failure": False, "study_id": "X",
                 "treatment_start": START, "treatment_end": START + 30 * DAY},
}  # fmt: skip


def rows(domain: str, count: int = 10, *changes: dict[str, Any]) -> pl.DataFrame:
    """Return good rows of ten subjects; the first rows get the changes."""
    made = []
    for number in range(count):
        moment = START if domain == "subjects" else START + DAY
        common = {
            "trial": "t", "patient_id": f"P{number % 10}", "event_time": moment, "received_at": moment,
            "source": "kafka:x", "source_position": f"{domain}-0-{number}", "ingested_at": START + 60 * DAY,
            "record_key": f"k{number}", "content_hash": f"c{number}",
        }  # fmt: skip
        change = changes[number] if number < len(changes) else {}
        made.append({**dict.fromkeys(SILVER_COLUMNS[domain]), **common, **_VALUES[domain], **change})
    return pl.DataFrame(pa.Table.from_pylist(made, schema=arrow_schema(SILVER_COLUMNS[domain])))


def failing(results: list[RuleResult]) -> dict[tuple[str, str], int]:
    return {(result.rule, result.table): result.failed for result in results if not result.passed}


# --- schemas --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("domain", DOMAINS)
def test_good_and_empty_frames_hold_their_schema(domain: str) -> None:
    for frame in (rows(domain), rows(domain).clear()):
        assert [result.failed for result in validate_schema(domain, frame)] == [0] * (3 + (domain == "adverse_events")
                                                                                     )  # fmt: skip
        silver_schema(domain).validate(frame)


@pytest.mark.parametrize(
    ("domain", "change", "rule"),
    [
        ("patient_vitals", {"unit": "kPa"}, "vitals_have_standard_units"),
        ("patient_vitals", {"value": float("nan")}, "vitals_have_standard_units"),
        ("patient_vitals", {"patient_id": None}, FILLED),
        ("patient_vitals", {"patient_id": "  "}, FILLED),
        ("lab_results", {"value": None}, "lab_results_have_a_result"),
        ("medications", {"end_time": START}, "periods_end_after_they_start"),
        ("adverse_events", {"severity": "bad"}, "severities_are_grades"),
        ("adverse_events", {"end_time": START - 9 * DAY}, "periods_end_after_they_start"),
        ("subjects", {"age_years": 150.0}, "ages_are_possible"),
    ],
)
def test_a_bad_row_is_counted_and_its_position_named_by_both_ways_of_checking(
    domain: str, change: dict[str, Any], rule: str
) -> None:
    frame = rows(domain, 5, {}, change)
    (result,) = [item for item in validate_schema(domain, frame) if item.failed]
    assert (result.name, result.failed, result.positions) == (rule, 1, (f"{domain}-0-1",))
    by_polars = {item.name: item.failed for item in check_table(domain, frame, now=START + 90 * DAY).results}
    assert by_polars[rule] == 1


def test_missing_and_mistyped_columns_are_results_and_no_errors() -> None:
    frame = rows("subjects").drop("sex").with_columns(pl.col("age_years").cast(pl.String))
    typed = {item.name: item for item in validate_schema("subjects", frame)}[TYPED]
    assert typed.groups == {"age_years": 1, "sex": 1}
    assert not typed.passed


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_pandera_and_polars_count_the_same_rows(data: st.DataObject) -> None:
    count = data.draw(st.integers(1, 8))
    changes = [
        data.draw(
            st.fixed_dictionaries(
                {},
                optional={
                    "severity": st.sampled_from(["grade_1", "grade_9", None]),
                    "patient_id": st.sampled_from(["P1", "", None]),
                    "end_time": st.sampled_from([START, START + 5 * DAY, None]),
                },
            )
        )
        for _ in range(count)
    ]
    frame = rows("adverse_events", count, *changes)
    by_pandera = {item.name: item.failed for item in validate_schema("adverse_events", frame) if item.name != TYPED}
    by_polars = {item.name: item.failed for item in check_table("adverse_events", frame, now=START + 90 * DAY).results}
    assert by_pandera == {name: by_polars[name] for name in by_pandera}


def test_what_the_decoder_accepts_holds_the_schema() -> None:
    frames = simulated_frames(seed=4, subjects=24, sites=3, days=2.5, broken_rate=0.2)
    for domain in DOMAINS:
        assert frames[domain].height
        assert all(result.passed for result in validate_schema(domain, frames[domain])), domain


def test_messages_of_another_contract_version_are_counted() -> None:
    result = contract_versions({"1.2": 90, "1.1": 8, None: 2}, "1.2", "patient_vitals", SCHEMA_VERSIONS)
    assert (result.checked, result.failed, result.passed, result.groups) == (100, 8, False, {"1.1": 8})
    assert contract_versions({"1.2": 99, "1.1": 1}, "1.2", "patient_vitals", SCHEMA_VERSIONS).passed


# --- completeness ---------------------------------------------------------------------------------------------------


def visits(missing: set[tuple[int, str]] = frozenset()) -> pl.DataFrame:  # type: ignore[assignment]
    made = [
        {"patient_id": f"P{patient}", "site": f"S{patient % 4}", "visit": visit, "test_code": test}
        for patient in range(40)
        for visit in ("BASELINE", "WEEK 2")
        for test in ("ALT", "AST", "K")
        if (patient, test) not in missing
    ]
    return pl.DataFrame(made)


def test_measurements_of_attended_visits_are_expected() -> None:
    full = completeness.visit_coverage(visits())
    assert (full["expected"].sum(), full["received"].sum()) == (240, 240)
    assert all(rule.passed for rule in completeness.coverage_rules("lab_results", full))
    lacking = completeness.visit_coverage(visits({(patient, "K") for patient in range(12)}))
    assert (lacking["expected"].sum(), lacking["received"].sum()) == (240, 216)
    whole, _ = completeness.coverage_rules("lab_results", lacking)
    assert not whole.passed
    assert whole.groups == {"K": 24}


def test_a_visit_that_nobody_attended_is_no_loss() -> None:
    left_early = visits().filter(~((pl.col("visit") == "WEEK 2") & (pl.col("patient_id") > "P2")))
    coverage = completeness.visit_coverage(left_early)
    assert coverage["expected"].sum() == coverage["received"].sum()


def test_a_site_that_delivers_less_than_the_others_is_found() -> None:
    lacking = {(patient, test) for patient in range(0, 40, 4) for test in ("ALT",)}
    _, by_site = completeness.coverage_rules("lab_results", completeness.visit_coverage(visits(lacking)))
    assert by_site.groups == {"S0": 20}


def test_readings_of_monitored_days_are_expected() -> None:
    frames = simulated_frames(seed=6, subjects=20, sites=4, days=4.0)
    sites = frames["subjects"].select("patient_id", "site")
    spans = completeness.spans(frames["patient_vitals"], frames["lab_results"]).join(sites, on="patient_id")
    coverage = completeness.daily_coverage(frames["patient_vitals"], spans)
    share = coverage["received"].sum() / coverage["expected"].sum()
    assert 0.95 < share < 1.0  # 2 % are not taken, some are late or broken
    halved = frames["patient_vitals"].filter(
        ~((pl.col("site") == "SITE-002") & (pl.col("event_time").dt.hour() % 2 == 0))
    )
    _, by_site = completeness.coverage_rules("patient_vitals", completeness.daily_coverage(halved, spans))
    assert set(by_site.groups) == {"SITE-002"}


def test_empty_columns_and_tests_without_values_are_found() -> None:
    assert completeness.filled_rule("t", {"a": 1.0, "b": 0.4}, 10).groups == {"b": 6}
    frame = rows("lab_results", 4, {"value": None}, {"value": None, "test_code": "AST"})
    assert completeness.tests_without_values(frame, "lab_results").groups == {"AST": 1}


# --- across the tables ----------------------------------------------------------------------------------------------


def trial(**changed: list[dict[str, Any]]) -> dict[str, pl.DataFrame]:
    return {domain: rows(domain, 10, *changed.get(domain, [])) for domain in DOMAINS}


def test_a_consistent_trial_breaks_no_rule() -> None:
    assert failing(check_consistency(trial())) == {}


def test_a_trial_without_subjects_cannot_be_compared() -> None:
    assert check_consistency({**trial(), "subjects": rows("subjects").clear()}) == []


@pytest.mark.parametrize(
    ("changed", "broken"),
    [
        ({"lab_results": [{"patient_id": "X"}]}, {("DQ-XD-01", "lab_results")}),
        ({"adverse_events": [{"event_time": START - 3 * DAY, "received_at": START}]}, {("DQ-XD-02", "adverse_events")}),
        ({"patient_vitals": [{"event_time": START - 3 * DAY, "received_at": START}]}, {("DQ-XD-02", "patient_vitals")}),
        (
            {"subjects": [{"death_time": START + DAY / 2}], "lab_results": [{"event_time": START + 9 * DAY,
                                                                              "received_at": START + 9 * DAY}]},
            {("DQ-XD-03", "lab_results"), ("DQ-XD-03", "patient_vitals"), ("DQ-XD-03", "medications"),
             ("DQ-XD-03", "adverse_events")},
        ),
        (
            {"patient_vitals": [{"event_time": START + 200 * DAY, "received_at": START + 200 * DAY}]},
            {("DQ-XD-04", "patient_vitals")},
        ),
        ({"subjects": [{"treatment_end": START - 5 * DAY}]}, {("DQ-XD-05", "subjects"), ("DQ-XD-09", "medications")}),
        ({"lab_results": [{"received_at": START - 9 * DAY}]}, {("DQ-XD-05", "lab_results")}),
        ({"lab_results": [{"unit": "mg/dL"}]}, {("DQ-XD-06", "lab_results")}),
        ({"adverse_events": [{"event_type": "PROSTATITIS"}]}, {("DQ-XD-07", "adverse_events")}),
        ({"lab_results": [{"test_code": "PSA"}]}, {("DQ-XD-07", "lab_results")}),
        ({"subjects": [{"age_years": 0.0}]}, {("DQ-XD-08", "subjects")}),
        ({"medications": [{"start_time": START - 9 * DAY}]}, {("DQ-XD-09", "medications")}),
        ({"subjects": [{"screen_failure": True}]}, {("DQ-XD-10", "medications")}),
        ({"patient_vitals": [{"site": "S9"}]}, {("DQ-XD-11", "patient_vitals")}),
        ({"adverse_events": [{"severity": "grade_5"}]}, {("DQ-XD-12", "adverse_events")}),
        ({"medications": [{"study_drug": False}]}, {("DQ-XD-13", "subjects")}),
    ],
)  # fmt: skip
def test_each_contradiction_is_found_and_nothing_else(
    changed: dict[str, list[dict[str, Any]]], broken: set[tuple[str, str]]
) -> None:
    assert set(failing(check_consistency(trial(**changed)))) == broken


def test_an_onset_known_to_the_month_is_not_before_consent() -> None:
    early = {"event_time": START - 9 * DAY, "received_at": START, "onset_precision": "month"}
    assert failing(check_consistency(trial(adverse_events=[early]))) == {}


@pytest.mark.parametrize("seed", [31, 32])
def test_a_clean_simulated_trial_is_consistent(seed: int) -> None:
    frames = simulated_frames(seed=seed, subjects=24, sites=4, days=3.0)
    assert failing(check_consistency({domain: frames[domain] for domain in DOMAINS})) == {}


# --- SDTM -----------------------------------------------------------------------------------------------------------


def study() -> dict[str, list[dict[str, Any]]]:
    """Return rows of two subjects that break no rule."""
    common = {"STUDYID": "ST", "USUBJID": "ST-1"}
    finding = {
        **common, "VISIT": "BASELINE", "VISITNUM": 3, "--TESTCD": "SYSBP", "--TEST": "Systolic Blood Pressure",
        "--ORRES": "120", "--ORRESU": "mmHg", "--STRESC": "120", "--STRESN": 120, "--STRESU": "mmHg", "--BLFL": "Y",
        "--DTC": "2014-01-02", "--DY": 1,
    }  # fmt: skip

    def of(domain: str, number: int, row: dict[str, Any]) -> dict[str, Any]:
        return {name.replace("--", domain): value for name, value in row.items()} | {
            "DOMAIN": domain, f"{domain}SEQ": number,
        }  # fmt: skip

    subject = {
        **common, "DOMAIN": "DM", "SUBJID": "1", "SITEID": "701", "SEX": "F", "COUNTRY": "USA", "AGE": 63,
        "AGEU": "YEARS", "BRTHDTC": "1950-12-26", "ARMCD": "Pbo", "ARM": "Placebo", "ACTARMCD": "Pbo",
        "RFSTDTC": "2014-01-02", "RFENDTC": "2014-07-02", "DMDTC": "2013-12-26", "DMDY": -7,
    }  # fmt: skip
    return {
        "DM": [subject],
        "VS": [of("VS", 1, finding), of("VS", 2, {**finding, "VISIT": "WEEK 2", "VISITNUM": 4, "--BLFL": None,
                                                 "--DTC": "2014-01-16", "--DY": 15})],
        "LB": [of("LB", 1, {**finding, "--TESTCD": "ALT", "--TEST": "Alanine Aminotransferase", "--ORRESU": "U/L",
                            "--STRESU": "U/L", "--STNRLO": 6, "--STNRHI": 34, "--CAT": "CHEMISTRY"})],
        "AE": [{**common, "DOMAIN": "AE", "AESEQ": 1, "AETERM": "RASH", "AEDECOD": "RASH", "AESER": "N",
                "AEOUT": "RECOVERED/RESOLVED", "AESTDTC": "2014-01-03", "AEENDTC": "2014-01-10", "AEDTC": "2014-01-16",
                "AESTDY": 2, "AEENDY": 9}],
        "EX": [{**common, "DOMAIN": "EX", "EXSEQ": 1, "EXTRT": "PLACEBO", "EXDOSE": 0, "EXDOSU": "mg",
                "EXSTDTC": "2014-01-02", "EXENDTC": "2014-01-16", "EXSTDY": 1, "EXENDY": 15}],
        "CM": [{**common, "DOMAIN": "CM", "CMSEQ": 1, "CMTRT": "ASPIRIN", "CMSTDTC": "2003", "CMDTC": "2013-12-26"}],
    }  # fmt: skip


def conformance(rows_of: dict[str, list[dict[str, Any]]]) -> set[str]:
    parsed = {
        domain: sdtm.parse_rows(
            domain,
            pl.DataFrame(
                {
                    "source_position": [f"{domain}#{number}" for number in range(len(found))],
                    "payload": [orjson.dumps(row).decode() for row in found],
                }
            ),
        )
        for domain, found in rows_of.items()
        if found
    }
    return {f"{item.rule}:{item.table}" for item in sdtm.check_conformance(parsed) if item.failed}


def test_a_conformant_study_breaks_no_rule() -> None:
    assert conformance(study()) == set()


def _set(domain: str, **values: Any) -> Callable[[dict[str, list[dict[str, Any]]]], None]:
    return lambda made: made[domain][0].update(values)


def _add(domain: str, **values: Any) -> Callable[[dict[str, list[dict[str, Any]]]], None]:
    return lambda made: made[domain].append({**made[domain][0], **values})


@pytest.mark.parametrize(
    ("change", "broken"),
    [
        (_set("DM", COUNTRY=None), {"SD0002:DM"}),
        (_set("CM", CMSTDTC="2003-13"), {"SD0003:CM"}),
        (_set("AE", DOMAIN="XX"), {"SD0004:AE"}),
        (_add("EX"), {"SD0005:EX"}),
        (_set("LB", LBBLFL=None), {"SD0006:LB"}),
        (_set("AE", AESER="Y"), {"SD0009:AE"}),
        (_set("AE", AESTDTC="2014-01-12", AESTDY=11), {"SD0012:AE", "SD0013:AE"}),
        (_set("EX", EXDOSE=-1), {"SD0014:EX"}),
        (_set("VS", VSTESTCD="SYS BP"), {"SD0018:VS"}),
        (_set("LB", LBORRESU=None), {"SD0026:LB"}),
        (_set("LB", LBSTNRHI=3), {"SD0028:LB"}),
        (_set("LB", LBSTRESU=None), {"SD0029:LB"}),
        (_set("EX", EXDOSU=None), {"SD0035:EX"}),
        (_set("LB", LBSTRESC=None), {"SD0036:LB"}),
        (_set("LB", LBORRES=None), {"SD0047:LB"}),
        (_set("LB", USUBJID="ST-9"), {"SD0064:LB", "SD0006:LB"}),
        (lambda made: made["EX"].clear(), set()),
        (_add("EX", USUBJID="ST-2"), {"SD0064:EX"}),
        (_add("DM"), {"SD0083:DM"}),
        (_set("DM", RFENDTC=None), {"SD0088:DM"}),
        (_set("DM", RFENDTC="2013-12-30"), {"SD1002:DM"}),
        (_set("AE", AEOUT="FATAL"), {"SD0090:AE"}),
        (_set("AE", AESDTH="Y"), {"SD0091:AE"}),
        (_set("AE", STUDYID="OTHER"), {"SD1005:AE"}),
        (_set("VS", VSDY=2), {"SD1086:VS"}),
        (_set("EX", EXENDY=14), {"SD1094:EX"}),
        (_set("AE", AEDTC="2014-01-02"), {"SD1331:AE"}),
        (_set("AE", AEOUT="NOT RECOVERED/NOT RESOLVED"), {"SD1332:AE"}),
        (_set("AE", AEENDTC=None, AEENDY=None), {"SD1333:AE"}),
        (_set("DM", RFICDTC="2014-02-01"), {"SD1334:DM"}),
        (_set("DM", AGE=40), {"DQ-SDTM-01:DM"}),
        (_set("DM", AGE=0), {"SD0084:DM", "DQ-SDTM-01:DM"}),
        (_set("DM", ARMCD="SCRNFAIL"), {"SD0079:EX"}),
        (lambda made: made["VS"][1].update(VSSTRESU="kPa"), {"SD0007:VS"}),
        (lambda made: made["VS"][1].update(VSTEST="SBP"), {"SD0040:VS"}),
        (lambda made: made["VS"][1].update(VISIT="BASELINE"), {"SD0052:VS"}),
    ],
)
def test_each_rule_finds_its_defect(
    change: Callable[[dict[str, list[dict[str, Any]]]], None], broken: set[str]
) -> None:
    made = study()
    change(made)
    assert conformance(made) == broken


def test_a_treated_subject_without_exposure_is_found() -> None:
    made = study()
    made["DM"].append({**made["DM"][0], "USUBJID": "ST-2", "SUBJID": "2"})
    assert conformance(made) == {"SD0070:DM", "SD0006:VS", "SD0006:LB"}


def test_rule_ids_are_unique_and_say_who_published_them() -> None:
    ids = [rule.rule for rule in sdtm.RULES]
    assert len(ids) == len(set(ids))
    assert all(rule.publisher for rule in sdtm.RULES)
