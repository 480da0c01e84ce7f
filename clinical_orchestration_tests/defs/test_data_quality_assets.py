"""The steps of data_quality_monitoring on a small simulated trial, with stores in memory."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import dagster as dg
import polars as pl
import pytest

from clinical_orchestration.contract import DATA_QUALITY_MONITORING, POOLS
from clinical_orchestration.defs.common import asset_key
from clinical_orchestration.defs.data_quality import ASSETS, cleaning
from clinical_orchestration.defs.data_quality.keys import ANOMALIES, CLEANING, FRESHNESS, REPORT, SCHEMA
from clinical_orchestration.ingestion.accounting import account_for
from clinical_orchestration.resources import PipelineResource
from clinical_orchestration.stores.locks import REFINE, exclusive
from clinical_orchestration.tables import CLEANING_LOG, QUALITY_SCORES, QUARANTINE, silver
from clinical_orchestration.trials import load_trial
from clinical_orchestration.trials.profile import Incident, SimulationSettings
from clinical_orchestration_tests.fakes import InMemoryObjects, InMemoryTableStore, RecordingNotifier
from clinical_orchestration_tests.quality_frames import fill, simulated_bronze

TRIAL = "simulated"
SIZE: dict[str, Any] = {"subjects": 48, "sites": 6, "days": 5.0, "seed": 5}
FAHRENHEIT = Incident(kind="fahrenheit", from_day=2.5, site=2)
SILENT = Incident(kind="silent_lab", from_day=2.0, site=3)


@dataclass
class World:
    """The stores of one lakehouse, and the Dagster instance that remembers its runs."""

    tables: InMemoryTableStore = field(default_factory=InMemoryTableStore)
    objects: InMemoryObjects = field(default_factory=InMemoryObjects)
    alerts: RecordingNotifier = field(default_factory=RecordingNotifier)
    instance: dg.DagsterInstance = field(default_factory=dg.DagsterInstance.ephemeral)

    def run(self, **conf: Any) -> dict[str, Any]:
        """Run the pipeline once; return the result of each asset by key, and the checks under ``checks``."""
        done = dg.materialize(
            ASSETS,
            instance=self.instance,
            resources={
                "pipeline": PipelineResource(trial=TRIAL, conf=conf),
                "tables": self.tables,
                "objects": self.objects,
                "alerts": self.alerts,
            },
        )
        results: dict[str, Any] = {}
        for event in done.get_asset_materialization_events():
            materialization = event.materialization
            results["/".join(materialization.asset_key.path)] = materialization.metadata["result"].value
        results["checks"] = {check.check_name: check for check in done.get_asset_check_evaluations()}
        return results


def world(*incidents: Incident) -> World:
    made = World()
    bronze_rows = simulated_bronze(
        SimulationSettings(**SIZE, incidents=incidents), until=datetime(2025, 1, 6, tzinfo=UTC)
    )
    fill(made.tables, bronze_rows, load_trial(TRIAL))
    return made


@pytest.fixture(scope="module")
def clean() -> World:
    return world()


@pytest.fixture(scope="module")
def clean_run(clean: World) -> dict[str, Any]:
    return clean.run()


@pytest.fixture(scope="module")
def broken() -> World:
    return world(FAHRENHEIT, SILENT)


@pytest.fixture(scope="module")
def broken_run(broken: World) -> dict[str, Any]:
    return broken.run()


def test_steps_and_edges_are_those_of_the_contract() -> None:
    assert {assets.op.name for assets in ASSETS} == set(DATA_QUALITY_MONITORING.steps)
    assert all(assets.op.pool in POOLS for assets in ASSETS)
    step_of = {key: assets.op.name for assets in ASSETS for key in assets.keys}
    upstream: dict[str, set[str]] = {assets.op.name: set() for assets in ASSETS}
    for assets in ASSETS:
        for deps in assets.asset_deps.values():
            upstream[assets.op.name] |= {step_of[key] for key in deps if key in step_of} - {assets.op.name}
    for before, after in DATA_QUALITY_MONITORING.edges:
        if before in upstream and after in upstream:
            assert before in upstream[after]


def test_a_clean_trial_passes_every_check(clean_run: dict[str, Any]) -> None:
    failed = {name: check.metadata for name, check in clean_run["checks"].items() if not check.passed}
    assert not failed
    assert clean_run[REPORT]["passed"]
    assert clean_run[REPORT]["stale_sources"] == []
    assert clean_run[REPORT]["anomalies"] == 0
    assert min(clean_run[REPORT]["scores"].values()) == clean_run[REPORT]["lowest"] > 0.95


def test_a_clean_trial_raises_no_alert(clean: World, clean_run: dict[str, Any]) -> None:
    assert clean.alerts.sent == []


def test_scores_are_a_time_series_of_one_row_a_table_and_run(clean: World, clean_run: dict[str, Any]) -> None:
    before = pl.DataFrame(clean.tables.read(QUALITY_SCORES))
    clean.run()
    after = pl.DataFrame(clean.tables.read(QUALITY_SCORES))
    assert after.height == before.height + 5
    assert after.group_by("table", "run_id").len()["len"].to_list() == [1] * after.height
    assert after["score"].is_between(0, 1).all()


def test_a_fahrenheit_thermometer_is_found_by_site(broken_run: dict[str, Any]) -> None:
    found = broken_run[ANOMALIES]["anomalies"]
    assert {item["site"] for item in found} == {"SITE-002"}
    assert {item["test"] for item in found} == {"out_of_range temperature"}
    check = broken_run["checks"]["sites_are_alike"]
    assert not check.passed
    assert check.severity == dg.AssetCheckSeverity.ERROR


def test_a_laboratory_that_stopped_is_found(broken_run: dict[str, Any]) -> None:
    assert set(broken_run[FRESHNESS]["stale"]) == {"lab_results/SITE-003", "lab_results/LAB-003"}
    check = broken_run["checks"]["sources_are_fresh"]
    assert not check.passed
    assert check.severity == dg.AssetCheckSeverity.WARN


def test_findings_raise_alerts_that_are_resolved_when_they_go_away() -> None:
    made = world(FAHRENHEIT, SILENT)
    made.run()
    keys = {alert.key for alert in made.alerts.sent}
    assert f"data_quality:stale:{TRIAL}:lab_results/SITE-003" in keys
    assert f"data_quality:anomaly:{TRIAL}:SITE-002" in keys
    assert f"data_quality:score:{TRIAL}:patient_vitals" in keys
    assert made.alerts.resolved == []
    healthy = world()
    made.tables = healthy.tables
    made.run()
    assert set(made.alerts.resolved) == keys
    made.alerts.resolved.clear()
    made.run()
    assert made.alerts.resolved == []


def test_the_report_is_one_page_with_plots_and_without_patients(broken: World, broken_run: dict[str, Any]) -> None:
    (stored, *_) = broken.objects.list(f"reports/quality/{TRIAL}/")
    page = broken.objects.get(stored.key).decode()
    assert broken_run[REPORT]["report"] == broken.objects.uri(stored.key)
    assert page.count('src="data:image/png;base64,') == 4
    assert not re.search(r'(?:src|href)="(?!data:)', page)  # nothing is loaded from elsewhere
    assert "SITE-002" in page
    patients = pl.DataFrame(broken.tables.read(silver("subjects")))["patient_id"].to_list()
    assert patients
    assert not [patient for patient in patients if patient in page]


def test_no_result_check_or_alert_names_a_patient(broken: World, broken_run: dict[str, Any]) -> None:
    texts = repr([broken_run, [alert.__dict__ for alert in broken.alerts.sent]])
    patients = pl.DataFrame(broken.tables.read(silver("subjects")))["patient_id"].to_list()
    assert not [patient for patient in patients if patient in texts]


def test_corrections_are_proposed_and_not_applied_by_default(broken: World, broken_run: dict[str, Any]) -> None:
    result = broken_run[CLEANING]
    assert result["safe"] > 100
    assert result["applied"] == {}
    log = pl.DataFrame(broken.tables.read(CLEANING_LOG))
    assert set(log["event"]) == {"proposed"}
    broken.run()
    again = pl.DataFrame(broken.tables.read(CLEANING_LOG))
    assert again.height == log.height  # a proposal is recorded once


def test_cleaning_applies_once_keeps_the_accounts_and_is_reverted() -> None:
    made = world(FAHRENHEIT)
    before = {name: pl.DataFrame(made.tables.read(name)) for name in (silver("patient_vitals"), QUARANTINE)}
    applied = made.run(apply_cleaning=True)
    assert applied["checks"]["every_record_accounted_for_once"].passed
    (batch,) = applied[CLEANING]["batches"]
    count = applied[CLEANING]["applied"]["DQ-CL-01"]
    rejected = pl.DataFrame(made.tables.read(QUARANTINE))
    assert rejected.height == before[QUARANTINE].height - count
    vitals = pl.DataFrame(made.tables.read(silver("patient_vitals")))
    new = vitals.join(before[silver("patient_vitals")], on="source_position", how="anti")
    assert new["source_position"].n_unique() == count
    temperatures = new.filter(pl.col("test_code") == "TEMP")
    assert temperatures["value"].is_between(35, 42).all()
    assert set(temperatures["original_unit"]) == {"[degF]"}

    again = made.run(apply_cleaning=True)
    assert again[CLEANING]["applied"] == {}
    assert pl.DataFrame(made.tables.read(silver("patient_vitals"))).height == vitals.height
    assert again[ANOMALIES]["anomalies"] == []  # the site is like the others now

    back = made.run(revert=batch)
    assert back[CLEANING]["reverted"] == count
    for name, frame in before.items():
        now = pl.DataFrame(made.tables.read(name))
        key = ["source_position"] + (["test_code"] if "test_code" in frame.columns else [])
        assert now.sort(key).equals(frame.sort(key)), name
    assert all(account.balanced for account in account_for(made.tables).values())
    assert made.run(apply_cleaning=True)[CLEANING]["applied"] == {}  # what was taken back stays back


def test_an_unknown_batch_says_which_there_are(clean: World) -> None:
    with pytest.raises(dg.Failure, match="none was ever applied"):
        clean.run(revert="0123456789ab")


def test_nothing_is_applied_while_others_write_the_same_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cleaning, "LOCK_WAIT", 0.0)
    made = world(FAHRENHEIT)
    with exclusive(REFINE, made.tables.uri(QUARANTINE), wait=5):
        result = made.run(apply_cleaning=True)[CLEANING]
        assert result["applied"] == {}
        assert result["safe"] > 0
        with pytest.raises(dg.Failure, match="not reverted"):
            made.run(revert="0123456789ab")
    assert made.run(apply_cleaning=True)[CLEANING]["applied"]


def test_an_empty_trial_is_no_failure() -> None:
    made = World()
    results = made.run()
    assert results[REPORT]["passed"]
    assert results[SCHEMA]["tables"]["subjects"]["rows"] == 0
    assert asset_key(REPORT)
