"""Central statistical monitoring: each check finds the defect it is for, and all are quiet where sites are alike."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clinical_orchestration.quality.anomalies import (
    Anomaly,
    benjamini_hochberg,
    detect,
    outlier_counts,
    prepared,
    significant,
)
from clinical_orchestration.quality.quarantine import rejections, rule_and_field
from clinical_orchestration_tests.quality_frames import simulated_frames

START = datetime(2025, 1, 1, tzinfo=UTC)
SITES, PATIENTS, READINGS = 8, 12, 40
BAD = "S3"
NO_REJECTIONS = rejections(
    pl.DataFrame(schema={"table": pl.String, "source_position": pl.String, "reasons": pl.List(pl.String),
                         "payload": pl.String}),
    pl.DataFrame(schema={"patient_id": pl.String, "site": pl.String}),
)  # fmt: skip
NOTHING_ACCEPTED = pl.DataFrame(schema={"table": pl.String, "site": pl.String, "event_time": pl.Datetime("us", "UTC")})


def readings(seed: int, change: Callable[[dict[str, Any], np.random.Generator], None] | None = None) -> pl.DataFrame:
    """Return blood pressures of alike sites; `change` alters the columns (arrays) of one site."""
    rng = np.random.default_rng(seed)
    count = SITES * PATIENTS * READINGS
    patient = np.repeat(np.arange(SITES * PATIENTS), READINGS)
    site = patient % SITES
    effects = rng.normal(0, 1, SITES)  # sites do differ a little
    level = rng.normal(125, 10, SITES * PATIENTS)
    columns: dict[str, Any] = {
        "site": site,
        "patient": patient,
        "hour": np.tile(np.arange(READINGS), SITES * PATIENTS),
        "value": np.round(level[patient] + effects[site] + rng.normal(0, 6, count)),
    }
    if change is not None:
        mask = site == int(BAD[1:])
        part = {name: column[mask] for name, column in columns.items()}
        change(part, rng)
        columns["value"][mask] = part["value"]
    return pl.DataFrame(
        {
            "patient_id": [f"P{number:03d}" for number in columns["patient"]],
            "site": [f"S{number}" for number in columns["site"]],
            "event_time": [START + timedelta(hours=int(hour)) for hour in columns["hour"]],
            "test_code": ["SYSBP"] * count,
            "value": columns["value"],
            "original_value": [f"{value:g}" for value in columns["value"]],
        },
        schema_overrides={"event_time": pl.Datetime("us", "UTC")},
    )


def found(frame: pl.DataFrame) -> list[Anomaly]:
    return detect(frame, frame.clear(), NO_REJECTIONS, NOTHING_ACCEPTED)


def raised(part: dict[str, Any], rng: np.random.Generator) -> None:
    part["value"] += 45


def flat(part: dict[str, Any], rng: np.random.Generator) -> None:
    part["value"] = np.round(125 + (part["value"] - 125) * 0.15 + (part["patient"] % 7) * 3)


def wild(part: dict[str, Any], rng: np.random.Generator) -> None:
    part["value"] += np.round(rng.normal(0, 15, part["value"].size))


def shifted(part: dict[str, Any], rng: np.random.Generator) -> None:
    part["value"] += np.where(part["hour"] >= READINGS // 2, 20, 0)


def repeated(part: dict[str, Any], rng: np.random.Generator) -> None:
    for number in range(1, part["value"].size):
        if part["patient"][number] == part["patient"][number - 1] and rng.random() < 0.6:
            part["value"][number] = part["value"][number - 1]


def rounded(part: dict[str, Any], rng: np.random.Generator) -> None:
    part["value"] = np.round(part["value"] / 5) * 5


def slipped(part: dict[str, Any], rng: np.random.Generator) -> None:
    part["value"] = np.where(rng.random(part["value"].size) < 0.05, part["value"] * 10, part["value"])


def stuck(part: dict[str, Any], rng: np.random.Generator) -> None:
    chosen = part["patient"] == part["patient"][0]
    part["value"] = np.where(chosen & (part["hour"] > 10), 121, part["value"])


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        (raised, "DQ-AN-01"),
        (flat, "DQ-AN-02"),
        (wild, "DQ-AN-02"),
        (shifted, "DQ-AN-03"),
        (repeated, "DQ-AN-04"),
        (rounded, "DQ-AN-05"),
        (slipped, "DQ-AN-06"),
        (stuck, "DQ-AN-09"),
    ],
)
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_each_check_finds_its_defect_and_only_the_site_that_has_it(
    change: Callable[[dict[str, Any], np.random.Generator], None], rule: str, seed: int
) -> None:
    anomalies = found(readings(seed, change))
    assert rule in {item.rule for item in anomalies}
    assert {item.site for item in anomalies} == {BAD}
    assert all(item.description for item in anomalies)


def test_alike_sites_are_quiet() -> None:
    seeds = range(40)
    alarms = [seed for seed in seeds if found(readings(seed))]
    assert len(alarms) <= 1  # and differences too small to matter do not count


@pytest.mark.parametrize("seed", [11, 12, 13])
def test_a_clean_simulated_trial_is_quiet(seed: int) -> None:
    assert trial_anomalies(simulated_frames(seed=seed, subjects=40, sites=5, days=4.0)) == []


def trial_anomalies(frames: dict[str, pl.DataFrame]) -> list[Anomaly]:
    sites = frames["subjects"].select("patient_id", "site").unique("patient_id")
    located = {
        name: frames[name].drop("site", strict=False).join(sites, on="patient_id", how="left")
        for name in ("patient_vitals", "lab_results")
    }
    accepted = pl.concat(
        rows.unique("source_position").select(pl.lit(name).alias("table"), "site", "event_time")
        for name, rows in located.items()
    )
    return detect(located["patient_vitals"], located["lab_results"], rejections(frames["quarantine"], sites), accepted)


def rejected(counts: dict[str, int], field: str = "temperature", hour: int = 0) -> pl.DataFrame:
    rows = [
        {
            "table": "patient_vitals",
            "source_position": f"{site}-{hour}-{number}",
            "reasons": [f"out_of_range: {field} is 98.6, outside 35 to 42 Cel"],
            "payload": f'{{"patient_id": "P", "trial_site": "{site}", "timestamp": "2025-01-01T{hour:02d}:00:00Z",'
            f' "{field}": 98.6}}',
        }
        for site, count in counts.items()
        for number in range(count)
    ]
    return pl.DataFrame(rows)


def taken(counts: dict[str, int]) -> pl.DataFrame:
    rows = [
        {"table": "patient_vitals", "site": site, "event_time": START + timedelta(minutes=number)}
        for site, count in counts.items()
        for number in range(count)
    ]
    return pl.DataFrame(rows, schema_overrides={"event_time": pl.Datetime("us", "UTC")})


NO_SITES = pl.DataFrame(schema={"patient_id": pl.String, "site": pl.String})


def test_a_site_whose_records_are_rejected_is_found_by_reason() -> None:
    sites = {f"S{number}": 500 for number in range(6)}
    refused = rejections(rejected({**dict.fromkeys(sites, 3), "S2": 120}), NO_SITES)
    anomalies = detect(readings(1).clear(), readings(1).clear(), refused, taken(sites))
    (item,) = [one for one in anomalies if one.rule == "DQ-AN-07"]
    assert (item.site, item.test, item.severity) == ("S2", "out_of_range temperature", "error")


def test_a_site_that_begins_to_be_rejected_is_found_although_all_sites_are() -> None:
    sites = {f"S{number}": 1000 for number in range(4)}  # over the first 16 hours
    late = pl.concat([rejected(dict.fromkeys(sites, 5), hour=1), rejected(dict.fromkeys(sites, 200), hour=16)])
    anomalies = detect(readings(1).clear(), readings(1).clear(), rejections(late, NO_SITES), taken(sites))
    assert {item.rule for item in anomalies} == {"DQ-AN-08"}
    assert {item.site for item in anomalies} == set(sites)


def test_equal_shares_of_rejected_records_are_no_finding() -> None:
    sites = {f"S{number}": 500 for number in range(6)}
    refused = rejections(rejected(dict.fromkeys(sites, 20)), NO_SITES)
    assert detect(readings(1).clear(), readings(1).clear(), refused, taken(sites)) == []


def test_rejections_say_site_test_time_and_field() -> None:
    quarantine = pl.DataFrame(
        {
            "table": ["patient_vitals", "lab_results", "patient_vitals", "adverse_events"],
            "source_position": ["a", "b", "c", "d"],
            "reasons": [
                ["out_of_range: heart_rate is 412, outside 40 to 200 /min"],
                ["wrong_type: value is text, not a number"],
                ["implausible: TEMP is 98.6 C, outside 32 to 43"],
                ["invalid_json: not JSON, at line 1 column 7"],
            ],
            "payload": [
                '{"patient_id": "P1", "heart_rate": 412, "spo2": 97, "timestamp": "2025-01-01T10:00:00Z"}',
                '{"patient_id": "P2", "test_name": "Hemoglobin", "lab_id": "L1", "timestamp": "bad"}',
                '{"USUBJID": "P1", "VSTESTCD": "TEMP", "VSDTC": "2014-01-02"}',
                '{"patient_id": "P1", "ev',
            ],
        }
    )
    sites = pl.DataFrame({"patient_id": ["P1", "P2"], "site": ["S1", "S2"]})
    rows = rejections(quarantine, sites).to_dicts()
    assert [row["site"] for row in rows] == ["S1", "S2", "S1", None]
    assert [row["test_code"] for row in rows] == ["HR", "HGB", "TEMP", None]
    assert [row["tests"] for row in rows] == [["HR", "OXYSAT"], ["HGB"], ["TEMP"], []]
    assert [row["field"] for row in rows] == ["heart_rate", "value", "TEMP", None]
    assert [row["event_time"] is None for row in rows] == [False, True, False, True]


@given(st.text(max_size=80))
def test_any_reason_has_a_rule(reason: str) -> None:
    rule, _ = rule_and_field(reason)
    assert reason.startswith(rule)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=60))
def test_q_values_are_between_the_p_value_and_one_and_keep_the_order(values: list[float]) -> None:
    p_values = np.array(values)
    q_values = benjamini_hochberg(p_values)
    assert (q_values >= p_values - 1e-12).all()
    assert (q_values <= 1).all()
    order = np.argsort(p_values, kind="stable")
    assert (np.diff(q_values[order]) >= -1e-12).all()


def test_the_number_of_comparisons_counts() -> None:
    one = Anomaly("R", "mean", "t", "S", "X", 1, 0, "u", 5, 0.005, description="large")
    assert significant([one])
    small = Anomaly("R", "mean", "t", "S", "X", 1, 0, "u", 5, 0.9)
    assert not significant([one, *[small] * 50])


def test_residuals_are_of_each_patient() -> None:
    rows = prepared(readings(1))
    assert rows.group_by("patient_id").agg(pl.col("residual").median())["residual"].abs().max() == 0
    assert outlier_counts(rows)["outliers"].to_list() == [0]
