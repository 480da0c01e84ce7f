"""Cohort assets on in-memory tables: members with reasons, attrition, reproducible definitions."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import dagster as dg
import polars as pl
import pyarrow as pa
import pytest

from clinical_orchestration.cohorts.criteria import load_definition
from clinical_orchestration.defs.cohorts.assets import ADDS_UP, CohortConfig, build_cohorts
from clinical_orchestration.resources import PipelineResource
from clinical_orchestration.stores.cohorts import (
    CohortIncompleteError,
    CohortNotFoundError,
    build_cohort,
    list_cohorts,
    match_trial,
    read_cohort,
)
from clinical_orchestration.tables import (
    COHORT_ATTRITION,
    COHORT_DEFINITIONS,
    COHORT_MEMBERS,
    SILVER_COLUMNS,
    arrow_schema,
    silver,
)
from clinical_orchestration_tests.fakes import InMemoryObjects, InMemoryTableStore

TRIAL = "cdisc-pilot"
START = datetime(2025, 3, 1, tzinfo=UTC)
CRITERIA: dict[str, Any] = {
    "name": "older",
    "title": "Older patients with a known ALT",
    "inclusion": [{"id": "old", "kind": "age", "min": 50}, {"id": "alt", "kind": "lab", "test": "ALT", "max": 40}],
}


def rows(domain: str, *records: dict[str, Any], trial: str = TRIAL) -> pa.Table:
    common = {"trial": trial, "event_time": START, "received_at": START, "source": "test", "ingested_at": START}
    keyed = [
        {**common, "source_position": f"{domain}-{trial}-{number}", **record} for number, record in enumerate(records)
    ]
    return pa.Table.from_pylist(keyed, schema=arrow_schema(SILVER_COLUMNS[domain]))


@pytest.fixture
def tables() -> InMemoryTableStore:
    store = InMemoryTableStore()

    def subject(patient: str, age: float | None, start: datetime | None = START) -> dict[str, Any]:
        return {"patient_id": patient, "age_years": age, "treatment_start": start, "screen_failure": start is None}

    def alt(patient: str, value: float) -> dict[str, Any]:
        measured = START - timedelta(days=1)
        return {"patient_id": patient, "test_code": "ALT", "value": value, "unit": "U/L", "event_time": measured}

    subjects = [subject("P1", 70), subject("P2", 60), subject("P3", 30), subject("P4", 80), subject("P5", 55, None)]
    store.append(silver("subjects"), rows("subjects", *subjects))
    store.append(silver("subjects"), rows("subjects", {"patient_id": "X1", "age_years": 99.0}, trial="other"))
    store.append(silver("lab_results"), rows("lab_results", alt("P1", 20), alt("P2", 200), alt("P3", 20)))
    return store


def materialize(tables: InMemoryTableStore, config: CohortConfig, **options: Any) -> tuple[Any, InMemoryObjects]:
    objects = InMemoryObjects()
    resources = {"pipeline": PipelineResource(trial=TRIAL), "tables": tables, "objects": objects}
    result = dg.materialize(
        [build_cohorts], resources=resources, run_config={"ops": {"build_cohorts": {"config": config.model_dump()}}},
        **options,
    )  # fmt: skip
    return result, objects


def test_cohort_is_stored_with_reasons_counts_and_a_plot(tables: InMemoryTableStore) -> None:
    result, objects = materialize(tables, CohortConfig(definition=CRITERIA))
    assert [check.passed for check in result.get_asset_check_evaluations()] == [True]
    report, members = read_cohort(tables, "older", TRIAL)
    assert (report.screened, report.members) == (5, 1)
    assert report.statuses == {"eligible": 1, "ineligible": 2, "undetermined": 1, "no index": 1}
    flow = [(s.criterion, s.entered, s.removed, s.removed_unknown, s.remaining) for s in report.attrition]
    assert flow == [
        ("screened", 5, 0, 0, 5), ("index", 5, 1, 0, 4), ("old", 4, 1, 0, 3), ("alt", 3, 1, 1, 1),
        ("cohort", 1, 0, 0, 1),
    ]  # fmt: skip
    by_patient = {row["patient_id"]: row for row in members.iter_rows(named=True)}
    assert by_patient["P1"]["member"]
    assert by_patient["P2"]["removed_by"] == "alt"
    assert by_patient["P2"]["reasons"] == [
        "old: met, age 60 years",
        "alt: not met, ALT 200 U/L on 2025-02-28 00:00",
    ]
    assert by_patient["P4"]["reasons"][1] == "alt: unknown, no ALT value up to the index"
    assert by_patient["P5"]["removed_by"] == "index"
    (plot,) = objects.list("reports/cohorts/")
    assert objects.get(plot.key).startswith(b"\x89PNG")
    shown = str(
        [
            event.step_materialization_data.materialization.metadata
            for event in result.get_asset_materialization_events()
        ]
    )
    assert not [patient for patient in by_patient if f"'{patient}'" in shown or f" {patient} " in shown]


def test_the_same_definition_on_the_same_versions_gives_the_same_cohort(tables: InMemoryTableStore) -> None:
    definition = load_definition(CRITERIA)
    first, before = build_cohort(tables, definition, TRIAL)
    again, _ = build_cohort(tables, definition, TRIAL)
    assert (first.definition_hash, first.attrition, first.members) == (
        again.definition_hash,
        again.attrition,
        again.members,
    )
    assert list_cohorts(tables, TRIAL).height == 1
    assert tables.row_count(COHORT_MEMBERS) == 5
    # silver grows: the versions that were read still give what they gave
    more = {"patient_id": "P4", "test_code": "ALT", "value": 10.0, "unit": "U/L", "event_time": START}
    tables.append(silver("lab_results"), rows("lab_results", more))
    assert match_trial(tables, definition, TRIAL, versions=first.silver_versions).members == before.members
    grown, _ = build_cohort(tables, definition, TRIAL)
    assert grown.members == first.members + 1


def test_cohorts_of_other_names_and_trials_stay(tables: InMemoryTableStore) -> None:
    build_cohort(tables, load_definition(CRITERIA), TRIAL)
    build_cohort(tables, load_definition(CRITERIA), "other")
    build_cohort(tables, load_definition({**CRITERIA, "name": "again"}), TRIAL)
    found = list_cohorts(tables)
    assert found.select("cohort", "trial").rows() == [("again", TRIAL), ("older", TRIAL), ("older", "other")]
    with pytest.raises(CohortNotFoundError, match="there are: again, older"):
        read_cohort(tables, "younger", TRIAL)


def test_an_interrupted_build_is_noticed(tables: InMemoryTableStore) -> None:
    build_cohort(tables, load_definition(CRITERIA), TRIAL)
    later = pl.DataFrame(pl.from_arrow(tables.read(COHORT_MEMBERS))).with_columns(built_at=START)
    tables.replace(COHORT_MEMBERS, later.to_arrow())
    with pytest.raises(CohortIncompleteError):
        read_cohort(tables, "older", TRIAL)


def test_without_criteria_those_that_ship_for_the_trial_are_built(tables: InMemoryTableStore) -> None:
    result, objects = materialize(tables, CohortConfig())
    assert result.success
    assert list_cohorts(tables, TRIAL)["cohort"].to_list() == ["cdisc-pilot-eligibility", "cdisc-pilot-hepatic"]
    assert len(list(objects.list("reports/cohorts/"))) == 2


@pytest.mark.parametrize(
    ("config", "why"),
    [
        (CohortConfig(criteria=["no-such"]), "there are no criteria"),
        (CohortConfig(criteria=["simulated-monitored"]), "meant for the trial simulated"),
        (CohortConfig(definition={"name": "empty"}), "at least one criterion"),
    ],
)
def test_wrong_criteria_fail_once_and_say_why(tables: InMemoryTableStore, config: CohortConfig, why: str) -> None:
    result, _ = materialize(tables, config, raise_on_error=False)
    assert not result.success
    (failure,) = [event for event in result.all_events if event.event_type_value == "STEP_FAILURE"]
    assert why in str(failure.step_failure_data.error)
    assert not tables.exists(COHORT_DEFINITIONS)
    assert not tables.exists(COHORT_ATTRITION)


def test_the_check_reads_what_is_stored(tables: InMemoryTableStore, monkeypatch: pytest.MonkeyPatch) -> None:
    from clinical_orchestration.stores import cohorts

    real = cohorts.build_cohort

    def loses_a_row(*args: Any, **kwargs: Any) -> Any:
        built = real(*args, **kwargs)
        kept = pl.DataFrame(pl.from_arrow(tables.read(COHORT_MEMBERS))).filter(pl.col("patient_id") != "P3")
        tables.replace(COHORT_MEMBERS, kept.to_arrow())
        return built

    monkeypatch.setattr(cohorts, "build_cohort", loses_a_row)
    result, _ = materialize(tables, CohortConfig(definition=CRITERIA))
    assert {check.check_name: check.passed for check in result.get_asset_check_evaluations()} == {ADDS_UP.name: False}
