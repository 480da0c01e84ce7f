"""The clients of notebooks: what they return, and errors that say what to do."""

from __future__ import annotations

import json
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import polars as pl
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clinical_orchestration import clients
from clinical_orchestration.clients import ClientError, ClinicalData, FeatureStore, Models
from clinical_orchestration.features.as_of import join_as_of
from clinical_orchestration.features.definitions import feature_names, feature_set_id
from clinical_orchestration.settings import ClientSettings
from clinical_orchestration.stores.online import InMemoryOnlineStore, OnlineFeatures
from clinical_orchestration.stores.registry import ModelNotFoundError, ModelVersionInfo
from clinical_orchestration.stores.serving import ServingClient
from clinical_orchestration.stores.tables import DeltaTableStore
from clinical_orchestration.tables import (
    FEATURES,
    QUARANTINE,
    QUARANTINE_COLUMNS,
    SILVER_COLUMNS,
    TRAINING_SET,
    arrow_schema,
    silver,
)
from clinical_orchestration.trials import load_trial
from clinical_orchestration_tests.factories import vitals_message
from clinical_orchestration_tests.fakes import InMemoryTableStore

TRIAL = "simulated"
PROFILE = load_trial(TRIAL)
NAMES = feature_names(PROFILE)
START = datetime(2025, 1, 1, tzinfo=UTC)


def hours(count: float) -> datetime:
    return START + timedelta(hours=count)


def records(domain: str, *rows: dict[str, Any], trial: str = TRIAL) -> pa.Table:
    common = {
        "trial": trial, "event_time": START, "received_at": START, "source": "s", "ingested_at": START,
        "content_hash": "c",
    }  # fmt: skip
    keyed = [
        {**common, "source_position": f"{trial}-{n:03d}", "record_key": f"{n}", **row} for n, row in enumerate(rows)
    ]
    return pa.Table.from_pylist(keyed, schema=arrow_schema(SILVER_COLUMNS[domain]))


@pytest.fixture
def tables() -> InMemoryTableStore:
    store = InMemoryTableStore()
    vital = {"test_code": "HR", "value": 70.0, "unit": "beats/min", "original_value": "70", "original_unit": "/min"}
    rows = [{**vital, "patient_id": f"P{n % 2}", "event_time": hours(n), "value": 60.0 + n} for n in range(10)]
    rows.append({**vital, "patient_id": "P0", "event_time": hours(1), "test_code": "TEMP", "value": 36.6, "unit": "C"})
    store.append(silver("patient_vitals"), records("patient_vitals", *rows))
    store.append(
        silver("patient_vitals"), records("patient_vitals", {**vital, "patient_id": "X9"}, trial="cdisc-pilot")
    )
    subjects = [{"patient_id": f"P{n}", "age_years": 50.0 + n, "screen_failure": False} for n in (1, 0)]
    subjects.append({**subjects[0], "age_years": 77.0, "received_at": hours(5)})
    store.append(silver("subjects"), records("subjects", *subjects))
    rejected = [
        {"table": "patient_vitals", "trial": TRIAL, "source_position": f"q{n}", "reasons": reasons}
        for n, reasons in enumerate([["range: too high", "type: text"], ["range: too low"]])
    ]
    store.append(QUARANTINE, pa.Table.from_pylist(rejected, schema=arrow_schema(QUARANTINE_COLUMNS)))
    return store


@pytest.fixture
def data(tables: InMemoryTableStore) -> ClinicalData:
    return ClinicalData(TRIAL, tables=tables)


# --- clinical data ---------------------------------------------------------------------------------------------------


def test_records_by_patient_time_and_test(data: ClinicalData) -> None:
    assert data.vitals().height == 11
    assert data.vitals("P0", tests=["HR"])["value"].to_list() == [60, 62, 64, 66, 68]
    assert data.vitals("P0", tests="temp").height == 1
    assert data.vitals(["P0", "P1"], since=hours(8)).height == 2
    assert data.vitals(since="2025-01-01T08:00:00Z", until=hours(8)).height == 1
    assert data.vitals(since=date(2025, 1, 2)).height == 0
    assert data.vitals(since=datetime(2025, 1, 1, 9)).height == 1  # noqa: DTZ001 - a naive time is UTC
    assert data.labs("P0").height == data.medications().height == data.adverse_events().height == 0


def test_tables_by_long_and_short_name(data: ClinicalData) -> None:
    assert data.table("vitals").height == data.table("silver/patient_vitals").height == 11
    assert data.table("vitals", trial="*").height == 12
    assert data.table("vitals", trial="cdisc-pilot", columns=["patient_id"]).rows() == [("X9",)]
    assert data.table("vitals", version=1).height == 11
    assert type(data.table("patients", as_pandas=True)).__module__.startswith("pandas")
    assert data.table("gold/predictions").is_empty()
    with pytest.raises(ClientError, match="there is no table 'vitls'"):
        data.table("vitls")
    with pytest.raises(ClientError, match="there is no table gold/nothing yet"):
        data.table("gold/nothing")


def test_patients_are_the_newest_row_of_each(data: ClinicalData) -> None:
    assert data.patients().select("patient_id", "age_years").rows() == [("P0", 50.0), ("P1", 77.0)]


def test_catalog_tells_rows_and_what_is_absent(data: ClinicalData) -> None:
    found = {row["table"]: row for row in data.catalog().iter_rows(named=True)}
    assert found["silver/patient_vitals"]["rows"] == 12
    assert found["gold/predictions"]["version"] is None


def test_quality_and_rejections(data: ClinicalData) -> None:
    quality = {row["table"]: row for row in data.quality().iter_rows(named=True)}
    assert quality["patient_vitals"]["rows"] == 11
    assert quality["patient_vitals"]["acceptance_rate"] == pytest.approx(11 / 13)
    assert quality["patient_vitals"]["passed"], quality["patient_vitals"]["broken"]
    broken = {row["table"]: row for row in data.quality(now="2024-12-31").iter_rows(named=True)}
    assert "times_are_not_in_the_future" in str(broken["patient_vitals"]["broken"])
    assert data.rejected().rows() == [("patient_vitals", "range", 2), ("patient_vitals", "type", 1)]


def test_validation_of_messages_and_files(data: ClinicalData, tmp_path: Path) -> None:
    messages = [vitals_message(1), vitals_message(2, spo2=7)]
    assert data.validate(messages, "vitals").invalid == 1
    path = tmp_path / "x.jsonl"
    path.write_text("\n".join(json.dumps(message) for message in messages))
    assert data.validate(path, "patient-vitals").invalid == 1
    with pytest.raises(ClientError, match="tells no domain"):
        data.validate(messages, "blood")
    with pytest.raises(ClientError, match="No such file"):
        data.validate(tmp_path / "none", "vitals")


def test_cohorts_are_matched_built_and_read_back(data: ClinicalData) -> None:
    criteria = {"name": "old", "index": {"at": "consent"}, "inclusion": [{"kind": "age", "min": 60, "id": "age"}]}
    assert data.match(criteria).members == ("P1",)
    assert data.cohorts().is_empty()
    assert data.build_cohort(criteria).members == 1
    assert data.cohorts()["cohort"].to_list() == ["old"]
    assert data.cohort("old")["patient_id"].to_list() == ["P1"]
    assert data.cohort("old", members_only=False)["removed_by"].to_list() == ["age", None]
    assert data.attrition("old")["remaining"].to_list() == [2, 2, 1, 1]
    with pytest.raises(ClientError, match="there are: old"):
        data.cohort("young")
    with pytest.raises(ClientError, match="meant for the trial cdisc-pilot"):
        data.build_cohort("cdisc-pilot-hepatic")
    with pytest.raises(ClientError, match="at least one criterion"):
        data.match({"name": "none"})


# --- features --------------------------------------------------------------------------------------------------------


def feature_row(patient: str, hour: float, value: float | None, trial: str = TRIAL) -> dict[str, Any]:
    moment = hours(hour)
    return {
        "trial": trial, "patient_id": patient, "feature_time": moment, "feature_date": moment.date(),
        **dict.fromkeys(NAMES), NAMES[0]: value,
    }  # fmt: skip


def online_row(patient: str, hour: float, value: float | None) -> OnlineFeatures:
    values: dict[str, float | None] = dict.fromkeys(NAMES)
    return OnlineFeatures(patient, TRIAL, hours(hour), {**values, NAMES[0]: value}, feature_set_id(PROFILE))


@pytest.fixture
def features(tables: InMemoryTableStore) -> FeatureStore:
    rows = [
        feature_row("P0", 6, 1.0), feature_row("P0", 30, 2.0), feature_row("P1", 6, None), feature_row("P2", 6, 5.0),
        feature_row("P3", 6, 5.0), feature_row("P4", 6, 5.0), feature_row("X9", 6, 9.0, trial="other"),
    ]  # fmt: skip
    schema: dict[str, Any] = {
        "trial": pl.String, "patient_id": pl.String, "feature_time": pl.Datetime("us", "UTC"), "feature_date": pl.Date,
        **dict.fromkeys(NAMES, pl.Float64),
    }  # fmt: skip
    tables.append(FEATURES, pl.DataFrame(rows, schema).to_arrow())
    store = InMemoryOnlineStore()
    store.put([
        online_row("P0", 30, 2.0), online_row("P1", 12, None), online_row("P2", 6, 5.5), online_row("P4", 3, 5.0),
    ])  # fmt: skip
    return FeatureStore(TRIAL, tables=tables, store=store)


def test_offline_features_by_day(features: FeatureStore) -> None:
    assert features.offline().height == 6
    assert features.offline("2025-01-02").select("patient_id", NAMES[0]).rows() == [("P0", 2.0)]
    span = features.offline((date(2025, 1, 1), "2025-01-02"), features=[NAMES[0]])
    assert span.columns == ["trial", "patient_id", "feature_time", "feature_date", NAMES[0]]
    assert span.height == 6
    assert features.days().rows() == [(date(2025, 1, 1), 5, 5), (date(2025, 1, 2), 1, 1)]
    with pytest.raises(ClientError, match="is no span of days"):
        features.offline(("2025-01-02", "2025-01-01"))
    with pytest.raises(ClientError, match=f"did you mean {NAMES[0]}"):
        features.offline(features=[NAMES[0] + "x"])


def test_online_features(features: FeatureStore) -> None:
    assert features.online("P0").features[NAMES[0]] == 2.0
    assert features.online_many().select("patient_id", NAMES[0]).rows() == [
        ("P0", 2.0), ("P1", None), ("P2", 5.5), ("P4", 5.0),
    ]  # fmt: skip
    with pytest.raises(ClientError, match="no online features of this patient"):
        features.online("P3")


def test_compare_tells_each_way_in_which_the_stores_may_differ(features: FeatureStore) -> None:
    found = {row["patient_id"]: row for row in features.compare().iter_rows(named=True)}
    assert {patient: row["status"] for patient, row in found.items()} == {
        "P0": "equal", "P1": "newer", "P2": "differing", "P3": "missing", "P4": "older",
    }  # fmt: skip
    assert found["P2"]["differing_features"] == 1
    assert features.compare("2025-01-02")["patient_id"].to_list() == ["P0"]
    assert features.compare("2025-02-02").is_empty()


def test_as_of_takes_what_was_valid_then(features: FeatureStore) -> None:
    asked = [("P0", 31.0, 2.0), ("P0", 5.0, None), ("P0", 6.0, 1.0), ("P0", 29.0, 1.0), ("X9", 40.0, None)]
    entities = pl.DataFrame(
        {"patient_id": [p for p, _, _ in asked], "time": [hours(h) for _, h, _ in asked], "label": range(5)}
    )
    found = features.as_of(entities, features=[NAMES[0]])
    assert found.columns == ["patient_id", "time", "label", "feature_time", NAMES[0]]
    assert found[NAMES[0]].to_list() == [value for _, _, value in asked]
    assert found["label"].to_list() == list(range(5))
    recent = features.as_of(entities, features=[NAMES[0]], max_age=timedelta(hours=2))
    assert recent[NAMES[0]].to_list() == [2.0, None, 1.0, None, None]
    assert features.as_of(entities.to_pandas()).height == 5
    with pytest.raises(ClientError, match="no column 'time'"):
        features.as_of(entities.drop("time"))
    with pytest.raises(ClientError, match="no time zone"):
        features.as_of(entities.with_columns(pl.col("time").dt.replace_time_zone(None)))
    with pytest.raises(ClientError, match="already"):
        features.as_of(entities.with_columns(feature_time=pl.lit(None)))


moments = st.integers(0, 12)
people = st.sampled_from("abc")


@settings(max_examples=80, deadline=None)
@given(
    st.lists(st.tuples(people, moments), max_size=15),
    st.lists(st.tuples(people, moments), max_size=15, unique=True),
    st.none() | moments,
)
def test_as_of_equals_the_plain_definition(
    entities: list[tuple[str, int]], rows: list[tuple[str, int]], limit: int | None
) -> None:
    schema: dict[str, Any] = {"patient_id": pl.String, "time": pl.Datetime("us", "UTC")}
    left = pl.DataFrame([(p, hours(h)) for p, h in entities], schema, orient="row")
    right = pl.DataFrame(
        [(p, hours(h), float(h)) for p, h in rows],
        {"patient_id": pl.String, "feature_time": pl.Datetime("us", "UTC"), "x": pl.Float64},
        orient="row",
    )
    max_age = None if limit is None else timedelta(hours=limit)
    found = join_as_of(left, right, features=["x"], max_age=max_age)
    expected = [
        max((h for q, h in rows if q == p and h <= t and (limit is None or t - h <= limit)), default=None)
        for p, t in entities
    ]
    assert found["x"].to_list() == expected
    assert found.select("patient_id", "time").equals(left)


def test_training_set_by_version(features: FeatureStore, tables: InMemoryTableStore) -> None:
    with pytest.raises(ClientError, match="there is no table gold/training_set yet"):
        features.training_set()
    tables.append(TRAINING_SET, pa.table({"trial": [TRIAL], "label": [1]}))
    tables.append(TRAINING_SET, pa.table({"trial": [TRIAL, "other"], "label": [0, 0]}))
    assert features.training_set().height == 2
    assert features.training_set(version=1).height == 1


# --- models ----------------------------------------------------------------------------------------------------------


class Registry:
    """Two versions; the first is the champion."""

    tracking_uri = "http://mlflow"

    def __init__(self, champion: bool = True) -> None:
        def info(version: str, aliases: tuple[str, ...]) -> ModelVersionInfo:
            return ModelVersionInfo(
                PROFILE.model_name, version, f"run-{version}", TRIAL, "f", "xgboost", "s", 3, None, aliases, START, {}
            )

        self.found = [info("2", ()), info("1", ("champion",))]
        self.with_champion = champion

    def champion(self, name: str) -> ModelVersionInfo | None:
        assert name == PROFILE.model_name
        return self.found[1] if self.with_champion else None

    def versions(self, name: str) -> list[ModelVersionInfo]:
        return self.found

    def evaluation_of(self, version: ModelVersionInfo) -> Any:
        if version.version == "2":
            raise ModelNotFoundError("run run-2 has no artifact evaluation.json")
        return SimpleNamespace(version=version.version)


def models(**options: Any) -> Models:
    registry: Any = Registry(**options)
    return Models(TRIAL, registry=registry)


def test_champion_versions_and_evaluation() -> None:
    found = models()
    champion = found.champion()
    assert champion is not None
    assert champion.version == "1"
    assert found.versions().select("version", "aliases").rows() == [("2", []), ("1", ["champion"])]
    assert found.evaluation().version == "1"  # type: ignore[attr-defined]
    with pytest.raises(ClientError, match=r"evaluation\.json"):
        found.evaluation("2")
    with pytest.raises(ClientError, match="no version 7; there are: 2, 1"):
        found.evaluation("7")
    with pytest.raises(ClientError, match="has no champion yet"):
        models(champion=False).load()


# --- errors and secrets ----------------------------------------------------------------------------------------------


def test_systems_that_are_away_are_named_with_the_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CLINICAL_LAKE_ROOT", raising=False)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "very-secret")
    monkeypatch.setenv("REDIS_URL", "redis://:very-secret@127.0.0.1:9/0")
    asked = [
        (lambda: ClinicalData(TRIAL).patients(), "AWS_ENDPOINT_URL"),
        (lambda: FeatureStore(TRIAL).online("P1"), r"127\.0\.0\.1:9"),
        (lambda: Models(TRIAL).champion(), "MLFLOW_TRACKING_URI"),
        (lambda: Models(TRIAL, serving=ServingClient("http://127.0.0.1:9")).predict("P1"), "SERVING_URL"),
    ]
    for ask, named in asked:
        with pytest.raises(ClientError, match=named) as caught:
            ask()
        assert "very-secret" not in str(caught.value)


def test_nothing_shows_a_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "very-secret")
    monkeypatch.setenv("REDIS_URL", "redis://:very-secret@127.0.0.1:9/0")
    for client in (ClinicalData(TRIAL), FeatureStore(TRIAL), Models(TRIAL)):
        assert repr(client) == f"{type(client).__name__}(trial='simulated')"
        assert "very-secret" not in repr(vars(client))


def test_an_unknown_trial_is_answered_with_those_there_are() -> None:
    with pytest.raises(ClientError, match="available: cdisc-pilot, simulated"):
        FeatureStore("no-such-trial")


def test_the_deployment_is_that_of_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLINICAL_LAKE_ROOT", str(tmp_path))
    monkeypatch.setenv("CLINICAL_TRIAL", TRIAL)
    DeltaTableStore(str(tmp_path)).append(silver("subjects"), records("subjects", {"patient_id": "P1"}))
    data = ClinicalData()
    assert data.trial == TRIAL
    assert data.patients()["patient_id"].to_list() == ["P1"]
    with pytest.raises(ClientError, match="cannot be read"):
        data.table("subjects", version=99)
    with pytest.raises(ClientError, match="cannot be read"):
        data.table("subjects", columns=["shoe_size"])


def test_other_errors_are_not_hidden() -> None:
    with pytest.raises(ZeroDivisionError), clients._friendly("x"):
        1 / 0  # noqa: B018
    assert ClientSettings().trial
