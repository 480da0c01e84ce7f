from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import polars as pl
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clinical_orchestration.quality.accounting import account
from clinical_orchestration.quality.rules import TableQuality, check_table
from clinical_orchestration.tables import DOMAINS, SILVER_COLUMNS, arrow_schema

NOW = datetime(2025, 6, 1, tzinfo=UTC)


def test_balanced_accounts_count_a_wide_message_once() -> None:
    report = account("patient_vitals", ["a", "b", "c", "d"], ["a", "a", "a", "b"], ["c"], ["d"])
    assert report.balanced
    assert report.metadata() == {
        "bronze": 4, "accepted": 2, "duplicates": 1, "quarantined": 1, "acceptance_rate": 0.75,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("bronze", "accepted", "duplicates", "quarantined", "kinds"),
    [
        (["a", "b"], ["a"], [], [], {"missing": ("b",)}),
        (["a"], ["a"], ["a"], [], {"double_counted": ("a",)}),
        (["a"], [], ["a", "a"], [], {"double_counted": ("a",)}),
        (["a"], [], [], ["a", "a"], {"double_counted": ("a",)}),
        (["a"], ["a", "x"], [], [], {"unknown": ("x",)}),
        (["a", "a"], ["a"], [], [], {"repeated_in_bronze": ("a",)}),
        # counts agree, positions do not: a subtraction would find nothing
        (["a", "b"], ["a", "x"], [], [], {"missing": ("b",), "unknown": ("x",)}),
        (["a", "b"], ["a"], ["a"], [], {"missing": ("b",), "double_counted": ("a",)}),
        (["a", None], ["a"], [], [], {"missing": ("(no position)",)}),
        ([], [], [], [], {}),
    ],
)
def test_each_way_of_not_balancing_is_named(
    bronze: list[Any], accepted: list[Any], duplicates: list[Any], quarantined: list[Any], kinds: dict[str, Any]
) -> None:
    report = account("x", bronze, accepted, duplicates, quarantined)
    assert {violation.kind: violation.positions for violation in report.violations} == kinds
    assert report.balanced is (not kinds)


def test_positions_of_two_trials_are_kept_apart() -> None:
    def frame(*rows: tuple[str, str]) -> pl.DataFrame:
        return pl.DataFrame(rows, schema={"trial": pl.String, "source_position": pl.String}, orient="row")

    bronze = frame(("one", "f#0"), ("two", "f#0"))
    assert account("x", bronze, frame(("one", "f#0")), frame(), frame(("two", "f#0"))).balanced
    report = account("x", bronze, frame(("one", "f#0")), frame(), frame(("one", "f#0")))
    assert {violation.kind for violation in report.violations} == {"missing", "double_counted"}


def test_positions_come_in_any_form() -> None:
    frame = pl.DataFrame({"source_position": ["a"]})
    for form in (["a"], {"a"}, iter(["a"]), frame, frame.lazy(), frame["source_position"], frame.to_arrow(),
                 pa.array(["a"]), pa.chunked_array([["a"]])):  # fmt: skip
        assert account("x", form, ["a"], [], []).balanced
    with pytest.raises(ValueError, match="source_position"):
        account("x", pl.DataFrame({"position": ["a"]}), [], [], [])


@given(st.lists(st.sampled_from("adq"), max_size=40), st.data())
def test_moving_dropping_or_doubling_one_position_is_always_found(fates: list[str], data: st.DataObject) -> None:
    tables: dict[str, list[str]] = {fate: [] for fate in "adq"}
    bronze = [f"t-0-{i}" for i in range(len(fates))]
    for position, fate in zip(bronze, fates, strict=True):
        tables[fate].append(position)
    assert account("x", bronze, *tables.values()).balanced
    if not bronze:
        return
    victim = data.draw(st.integers(0, len(bronze) - 1))
    if data.draw(st.booleans()):
        tables[fates[victim]].remove(bronze[victim])
        kind = "missing"
    else:
        other = data.draw(st.sampled_from([fate for fate in "adq" if fate != fates[victim]]))
        tables[other].append(bronze[victim])
        kind = "double_counted"
    report = account("x", bronze, *tables.values())
    assert [(violation.kind, violation.positions) for violation in report.violations] == [(kind, (bronze[victim],))]


# --- table rules -----------------------------------------------------------------------------------------------------

_VALUES: dict[str, dict[str, Any]] = {
    "patient_vitals": {"test_code": "SYSBP", "value": 120.0, "unit": "mmHg", "original_value": "120",
                       "original_unit": "mmHg"},
    "lab_results": {"test_code": "ALT", "value": 20.0, "unit": "U/L", "original_value": "20", "test_name": "ALT"},
    "medications": {"drug_name": "ASPIRIN", "start_precision": "day", "dose": 1.0, "dose_unit": "mg", "route": "ORAL",
                    "frequency": "QD"},
    "adverse_events": {"event_type": "RASH", "severity": "grade_1", "onset_precision": "day"},
    "subjects": {"age_years": 60.0, "sex": "F", "site": "S", "arm": "A", "screen_failure": False, "study_id": "X"},
}  # fmt: skip


def table(domain: str, *changes: dict[str, Any]) -> pl.DataFrame:
    moment = NOW - timedelta(days=1)
    rows = []
    for i, change in enumerate(changes or ({},)):
        common = {
            "trial": "t", "patient_id": f"P{i}", "event_time": moment, "received_at": moment, "source": "s",
            "source_position": f"t-0-{i}", "ingested_at": NOW, "record_key": f"k{i}", "content_hash": f"c{i}",
        }  # fmt: skip
        rows.append({**dict.fromkeys(SILVER_COLUMNS[domain]), **common, **_VALUES[domain], **change})
    frame = pl.from_arrow(pa.Table.from_pylist(rows, schema=arrow_schema(SILVER_COLUMNS[domain])))
    assert isinstance(frame, pl.DataFrame)
    return frame


def failures(quality: TableQuality) -> dict[str, int]:
    return {result.name: result.failed for result in quality.failures}


@pytest.mark.parametrize("domain", DOMAINS)
def test_good_tables_and_empty_tables_pass_with_full_score(domain: str) -> None:
    for frame in (table(domain), table(domain).clear()):
        quality = check_table(domain, frame, now=NOW)
        assert failures(quality) == {}
        assert quality.passed
        assert quality.score == 1.0


@pytest.mark.parametrize(
    ("domain", "change", "rule"),
    [
        ("patient_vitals", {"event_time": NOW + timedelta(days=2)}, "times_are_not_in_the_future"),
        ("patient_vitals", {"received_at": NOW + timedelta(days=2)}, "times_are_not_in_the_future"),
        ("patient_vitals", {"patient_id": None}, "required_columns_are_filled"),
        ("patient_vitals", {"patient_id": " "}, "required_columns_are_filled"),
        ("patient_vitals", {"unit": "kPa"}, "vitals_have_standard_units"),
        ("patient_vitals", {"value": float("nan")}, "vitals_have_standard_units"),
        ("lab_results", {"value": None}, "lab_results_have_a_result"),
        ("lab_results", {"test_code": ""}, "required_columns_are_filled"),
        ("medications", {"start_time": NOW, "end_time": NOW - timedelta(days=3)}, "periods_end_after_they_start"),
        ("adverse_events", {"end_time": NOW - timedelta(days=3)}, "periods_end_after_they_start"),
        ("adverse_events", {"severity": "MILD"}, "severities_are_grades"),
        ("subjects", {"age_years": 130.0}, "ages_are_possible"),
        ("medications", {"record_key": "k0"}, "records_are_unique"),
    ],
)
def test_each_blocking_rule_fails_for_what_it_forbids(domain: str, change: dict[str, Any], rule: str) -> None:
    quality = check_table(domain, table(domain, {}, change), now=NOW)
    assert failures(quality) == {rule: 1}
    assert not quality.passed
    assert 0.0 < quality.score < 1.0


def test_warnings_do_not_block() -> None:
    pressures = table("patient_vitals", {"value": 70.0}, {"test_code": "DIABP", "value": 90.0, "patient_id": "P0"})
    quality = check_table("patient_vitals", pressures, now=NOW)
    assert failures(quality) == {"systolic_is_above_diastolic": 1}
    assert quality.passed
    units = ("mystery", "a", "a", "b")
    changes = [{"unit": unit} if unit == "mystery" else {"unit": unit, "test_code": "X"} for unit in units]
    labs = table("lab_results", {}, *changes)
    assert failures(check_table("lab_results", labs, now=NOW)) == {"lab_tests_have_one_unit": 2}
    studies = table("subjects", {}, {"study_id": "Y"})
    assert failures(check_table("subjects", studies, now=NOW)) == {"subjects_have_one_study": 1}


def test_unknown_patients_are_counted_by_patient() -> None:
    subjects = table("subjects", {}, {})
    vitals = table("patient_vitals", {}, {"patient_id": "P0"}, {"patient_id": "P9"}, {"patient_id": "P9"})
    (result,) = check_table("patient_vitals", vitals, now=NOW, subjects=subjects).failures
    assert (result.name, result.checked, result.failed, result.blocking) == ("patients_are_known", 2, 1, False)


def test_the_score_counts_gaps_faults_and_rejections() -> None:
    frame = table("subjects", {}, {"sex": None})
    full = check_table("subjects", table("subjects", {}, {}), now=NOW).score
    gaps = check_table("subjects", frame, now=NOW)
    assert gaps.passed
    assert gaps.completeness["sex"] == 0.5
    assert gaps.score < full
    assert check_table("subjects", frame, now=NOW, acceptance_rate=0.5).score == pytest.approx(gaps.score / 2)


def test_a_table_without_its_columns_is_refused() -> None:
    with pytest.raises(ValueError, match="lacks the columns sex"):
        check_table("subjects", table("subjects").drop("sex"))
