"""The backfill's steps on in-memory stores, with the Spark computation replaced by one in Polars."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from datetime import UTC, date, datetime, timedelta
from typing import TYPE_CHECKING, Any

import dagster as dg
import orjson
import pytest

from clinical_orchestration.contract import CLINICAL_DATA_PIPELINE, FEATURE_BACKFILL
from clinical_orchestration.definitions import build_definitions
from clinical_orchestration.defs.backfill.assets import PATIENT_FEATURES
from clinical_orchestration.defs.backfill.request import FIRST_DAY, PARTITIONS
from clinical_orchestration.defs.common import asset_key
from clinical_orchestration.defs.pipelines import EXCLUSIVE_TAG
from clinical_orchestration.defs.results import RESULT
from clinical_orchestration.features.changes import expected_times
from clinical_orchestration.features.definitions import feature_names
from clinical_orchestration.resources import PipelineResource
from clinical_orchestration.stores.feature_backfill import Days, FeatureBackfill
from clinical_orchestration.stores.feature_store import FeatureState, OfflineStore, read_features
from clinical_orchestration.stores.online import InMemoryOnlineStore, OnlineFeatures
from clinical_orchestration.stores.tables import TransactionMovedError
from clinical_orchestration.tables import FEATURE_STAGING, FEATURES, SILVER_COLUMNS, arrow_schema, silver
from clinical_orchestration.trials import load_trial
from clinical_orchestration_tests.defs.test_quality_assets import InMemoryObjects
from clinical_orchestration_tests.fakes import InMemoryTableStore

if TYPE_CHECKING:
    import pyarrow as pa

    from clinical_orchestration.trials import TrialProfile

PILOT = load_trial("cdisc-pilot")
NOON = datetime(2013, 5, 1, 12, tzinfo=UTC)
RANGE = ("dagster/asset_partition_range_start", "dagster/asset_partition_range_end")


class World:
    """Stores and the job over them."""

    def __init__(self, instance: dg.DagsterInstance) -> None:
        self.instance = instance
        self.tables, self.online, self.objects = InMemoryTableStore(), InMemoryOnlineStore(), InMemoryObjects()
        self.computed: list[Days] = []
        self.bad_values = False

    def run(
        self,
        conf: Mapping[str, Any] | None = None,
        tags: Mapping[str, str] | None = None,
        *,
        only: str | None = None,
        trial: str | None = PILOT.name,
        config: Mapping[str, Any] | None = None,
    ) -> dg.ExecuteInProcessResult:
        definitions = build_definitions(
            {
                "pipeline": PipelineResource(trial=trial, conf=dict(conf or {})),
                "tables": self.tables,
                "spark": None,
                "online": self.online,
                "objects": self.objects,
            }
        )
        job = definitions.resolve_job_def(FEATURE_BACKFILL.name)
        selection = None if only is None else [asset_key(only)]
        return job.execute_in_process(
            instance=self.instance, tags=dict(tags or {}), asset_selection=selection, raise_on_error=False,
            run_config=dict(config or {}),
        )  # fmt: skip

    def vitals(self, patient: str, *days: int, trial: str = PILOT.name, position: str | None = None) -> None:
        import pyarrow as pa

        columns = SILVER_COLUMNS["patient_vitals"]
        before = self.tables.row_count(silver("patient_vitals"))
        rows = [
            {
                **dict.fromkeys(columns), "trial": trial, "patient_id": patient, "record_key": f"{patient}-{day}",
                "event_time": NOON + timedelta(days=day), "received_at": NOON + timedelta(days=day),
                "source_position": position or f"vs#{before + place}",
            }
            for place, day in enumerate(days)
        ]  # fmt: skip
        self.tables.append(silver("patient_vitals"), pa.Table.from_pylist(rows, arrow_schema(columns)))

    def subjects(self, *patients: str) -> None:
        import pyarrow as pa

        columns = SILVER_COLUMNS["subjects"]
        rows = [
            {**dict.fromkeys(columns), "trial": PILOT.name, "patient_id": patient, "event_time": NOON,
             "record_key": patient, "source_position": f"dm#{patient}"}
            for patient in patients
        ]  # fmt: skip
        self.tables.append(silver("subjects"), pa.Table.from_pylist(rows, arrow_schema(columns)))

    def ages(self, profile: TrialProfile = PILOT) -> dict[tuple[str, int], float]:
        rows = read_features(self.tables, profile)
        return {
            (patient, (time.date() - NOON.date()).days): age
            for patient, time, age in rows.select("patient_id", "feature_time", "age_years").iter_rows()
        }

    def spoil(self, day: date, value: float) -> None:
        """Put other values on one stored day, as code with a mistake had written them."""
        import polars as pl

        rows = read_features(self.tables, PILOT, dates=[day]).with_columns(pl.lit(value).alias("age_years"))
        self.tables.replace(
            FEATURES, rows.to_arrow(), predicate=f"trial = '{PILOT.name}' AND feature_date = CAST('{day}' AS DATE)"
        )


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    monkeypatch.setenv("DAGSTER_EVENT_BATCH_SIZE", "1000")
    with dg.DagsterInstance.ephemeral() as instance:
        made = World(instance)

        def computed(self: FeatureBackfill, profile: TrialProfile, days: Days, versions: Mapping[str, int]) -> pa.Table:
            """One row a due time: `age_years` is the patient's number of vital signs so far, all history counted."""
            import polars as pl

            made.computed.append(days)
            vitals = self._times(profile, versions.get("patient_vitals"))
            times = expected_times(vitals, profile)
            times = times.filter((pl.col("feature_time") >= days.begin) & (pl.col("feature_time") < days.end))
            counts = (
                times.join(vitals, on="patient_id")
                .filter(pl.col("event_time") <= pl.col("feature_time"))
                .group_by("patient_id", "feature_time")
                .agg(pl.len().cast(pl.Float64).alias("age_years"))
            )
            if made.bad_values:
                counts = counts.with_columns(pl.lit(-1.0).alias("age_years"))
            filled = {name for name in feature_names(profile) if name.startswith("lab_")}
            return counts.select(
                pl.lit(profile.name).alias("trial"),
                "patient_id",
                "feature_time",
                pl.col("feature_time").dt.date().alias("feature_date"),
                *(
                    pl.col(name)
                    if name == "age_years"
                    else pl.lit(1.0 if name in filled else None).cast(pl.Float64).alias(name)
                    for name in feature_names(profile)
                ),
            ).to_arrow()

        monkeypatch.setattr(FeatureBackfill, "_computed", computed)
        made.vitals("P1", 0, 1, 2, 10)
        made.vitals("P2", 1, 5, 12)
        made.subjects("P1", "P2")
        yield made


def result_of(run: dg.ExecuteInProcessResult, key: str) -> dict[str, Any]:
    found = [e.materialization for e in run.get_asset_materialization_events() if e.asset_key == asset_key(key)]
    return dict(found[-1].metadata[RESULT].value)


def checks(run: dg.ExecuteInProcessResult) -> dict[str, bool]:
    return {check.check_name: check.passed for check in run.get_asset_check_evaluations()}


def why(run: dg.ExecuteInProcessResult) -> str:
    (failure,) = [event for event in run.all_events if event.is_step_failure]
    return str(failure.step_failure_data.error)


def days(first: str, last: str) -> dict[str, str]:
    return dict(zip(RANGE, (first, last), strict=True))


# ------------------------------------------------------------------------------------------------------- what is run


def test_the_job_has_the_steps_of_the_contract_in_its_order(world: World) -> None:
    run = world.run({"start_date": "2013-05-01", "end_date": "2013-05-03"})
    assert run.success
    done = [event.step_key for event in run.all_events if event.is_step_success]
    assert tuple(done) == FEATURE_BACKFILL.steps


def test_a_range_given_as_partition_tags_is_one_run_and_one_computation(world: World) -> None:
    run = world.run(tags=days("2013-05-01", "2013-05-03"))
    assert run.success
    assert world.computed == [Days(date(2013, 5, 1), date(2013, 5, 3))]
    assert world.ages() == {("P1", 0): 1, ("P1", 1): 2, ("P1", 2): 3, ("P2", 1): 1}
    partitions = [e.partition for e in run.get_asset_materialization_events() if e.partition]
    assert partitions == ["2013-05-01", "2013-05-02", "2013-05-03"]
    events = [e.materialization for e in run.get_asset_materialization_events() if e.partition]
    assert [event.metadata["dagster/partition_row_count"].value for event in events] == [1, 2, 1]
    assert [RESULT in event.metadata for event in events] == [False, False, True]


def test_a_single_partition_is_a_range_of_one_day(world: World) -> None:
    assert world.run(tags={"dagster/partition": "2013-05-06"}).success
    assert world.ages() == {("P2", 5): 2}  # the record of day 1 counts: history before the range is read


def test_conf_without_tags_sets_the_tags_of_the_run(world: World) -> None:
    run = world.run({"start_date": "2013-05-01", "end_date": "2013-05-02T23:00:00Z"})
    assert run.success
    stored = world.instance.get_run_by_id(run.run_id)
    assert stored is not None
    assert {name: stored.tags[name] for name in RANGE} == days("2013-05-01", "2013-05-02")
    assert world.instance.get_materialized_partitions(asset_key(PATIENT_FEATURES)) == {"2013-05-01", "2013-05-02"}


def test_a_run_triggered_with_conf_as_airflow_does_covers_its_range(world: World) -> None:
    from dagster._core.remote_representation.external_data import RepositorySnap

    from clinical_orchestration.airflow.catalog import dags_of
    from clinical_orchestration.airflow.control import run_config

    repository = build_definitions().get_repository_def()
    job = repository.get_job(FEATURE_BACKFILL.name)
    (dag,) = dags_of(RepositorySnap.from_def(repository), {job.name: job.get_job_snapshot()})
    conf = {"start_date": "2013-05-01", "end_date": "2013-05-02", "trial": PILOT.name}
    run = world.run(trial=None, config=run_config(dag, conf))
    assert run.success
    assert world.computed == [Days(date(2013, 5, 1), date(2013, 5, 2))]
    stored = world.instance.get_run_by_id(run.run_id)
    assert stored is not None
    assert {name: stored.tags[name] for name in RANGE} == days("2013-05-01", "2013-05-02")


def test_without_conf_and_tags_the_whole_trial_is_computed(world: World) -> None:
    run = world.run()
    assert run.success
    assert world.computed == [Days(date(2013, 5, 1), date(2013, 5, 13))]
    assert len(world.ages()) == 7


@pytest.mark.parametrize(
    ("conf", "first", "last"),
    [
        ({"start_date": "2013-05-05"}, date(2013, 5, 5), date(2013, 5, 13)),
        ({"end_date": "2013-05-10"}, date(2013, 5, 1), date(2013, 5, 10)),
    ],
)
def test_one_end_may_be_left_open(world: World, conf: dict[str, str], first: date, last: date) -> None:
    assert world.run(conf).success
    assert world.computed == [Days(first, last)]


@pytest.mark.parametrize(
    ("conf", "said"),
    [
        ({"start_date": "May"}, "start_date 'May' is no date"),
        ({"start_date": 20130101}, "start_date 20130101 is no date"),
        ({"start_date": "2013-02-01", "end_date": "2013-01-01"}, "end_date 2013-01-01 is before start_date"),
        ({"start_date": "2000-01-01"}, f"is before {FIRST_DAY}"),
        ({"start_date": "2999-01-01"}, "lies in the future"),
    ],
)
def test_a_wrong_range_fails_at_once_and_says_why(world: World, conf: dict[str, Any], said: str) -> None:
    run = world.run(conf)
    assert not run.success
    assert said in why(run)
    assert not [event for event in run.all_events if event.is_step_up_for_retry]


def test_a_range_that_reaches_into_the_future_ends_today(world: World) -> None:
    today = datetime.now(UTC).date()
    run = world.run({"start_date": (today - timedelta(days=3)).isoformat(), "end_date": "2999-01-01"})
    assert run.success
    assert result_of(run, PATIENT_FEATURES)["end"] == today.isoformat()


def test_today_is_a_partition() -> None:
    assert PARTITIONS.get_last_partition_key() == datetime.now(UTC).date().isoformat()


def test_the_trial_may_be_given_by_the_runs_tag(world: World) -> None:
    world.vitals("S1", 3, trial="simulated")
    run = world.run({"start_date": "2013-05-01", "end_date": "2013-05-05"}, {"clinical/trial": "simulated"}, trial=None)
    assert run.success
    assert not world.ages()
    assert world.ages(load_trial("simulated")) != {}


def test_a_backfill_and_the_data_pipeline_wait_for_each_other() -> None:
    definitions = build_definitions()
    tags = {
        name: definitions.resolve_job_def(name).tags for name in (FEATURE_BACKFILL.name, CLINICAL_DATA_PIPELINE.name)
    }
    assert len({one[EXCLUSIVE_TAG] for one in tags.values()}) == 1


# ----------------------------------------------------------------------------------------------------- what is written


def test_an_empty_range_is_said_and_is_no_error(world: World) -> None:
    run = world.run({"start_date": "2013-07-01", "end_date": "2013-07-31"})
    assert run.success
    assert world.computed == []
    assert result_of(run, "backfill/history")["empty"]
    assert result_of(run, PATIENT_FEATURES)["rows"] == 0
    assert all(checks(run).values()) or {n for n, ok in checks(run).items() if not ok} <= {"every_feature_has_values"}
    assert not world.tables.exists(FEATURES) or world.tables.row_count(FEATURES) == 0


def test_a_second_run_says_that_nothing_changed_and_writes_nothing(world: World) -> None:
    world.run()
    version = world.tables.version(FEATURES)
    again = world.run()
    assert again.success
    assert world.tables.version(FEATURES) == version
    result = result_of(again, PATIENT_FEATURES)
    assert (result["written"], result["resumed"], result["differences"]["changed_days"]) == (False, False, 0)
    notes = [e.materialization.metadata["note"].value for e in again.get_asset_materialization_events()
             if e.asset_key == asset_key(PATIENT_FEATURES) and "note" in e.materialization.metadata]  # fmt: skip
    assert notes[0].startswith("Nothing changed")


def test_only_days_of_the_range_change(world: World) -> None:
    world.run()
    world.spoil(date(2013, 5, 2), 77.0)
    world.spoil(date(2013, 5, 11), 88.0)
    run = world.run({"start_date": "2013-05-01", "end_date": "2013-05-07"})
    assert run.success
    ages = world.ages()
    assert (ages["P1", 1], ages["P1", 10]) == (2.0, 88.0)
    changes = result_of(run, PATIENT_FEATURES)["differences"]
    assert (changes["changed_rows"], changes["added_rows"], changes["removed_rows"]) == (2, 0, 0)
    assert (changes["changed_days"], changes["first_changed_day"]) == (1, "2013-05-02")
    assert changes["features"] == [
        {"feature": "age_years", "changed": 2, "emptied": 0, "filled": 0, "max_difference": 76.0}
    ]


def test_other_trials_rows_of_the_same_days_stay(world: World) -> None:
    world.vitals("S1", 1, trial="simulated")
    world.run(trial="simulated")
    theirs = world.ages(load_trial("simulated"))
    assert theirs
    run = world.run()
    assert run.success
    assert world.ages(load_trial("simulated")) == theirs


def test_rows_whose_records_are_gone_are_removed(world: World) -> None:
    world.vitals("P3", 2)
    world.run()
    del world.tables._tables[silver("patient_vitals")]
    world.vitals("P1", 0, 1, 2, 10)
    world.vitals("P2", 1, 5, 12)
    run = world.run({"start_date": "2013-05-01", "end_date": "2013-05-07"})
    assert result_of(run, PATIENT_FEATURES)["differences"]["removed_rows"] == 1
    assert ("P3", 2) not in world.ages()


def test_wrong_values_block_and_neither_store_is_written(world: World) -> None:
    world.bad_values = True
    run = world.run()
    assert not run.success
    assert not checks(run)["feature_values_are_valid"]
    assert world.tables.row_count(FEATURES) == 0
    assert world.online.count() == 0
    done = {event.step_key for event in run.all_events if event.is_step_success}
    assert "load_to_feature_store" not in done


def test_too_few_features_block(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLINICAL_VAR_FEATURE_COUNT_THRESHOLD", "5000")
    run = world.run()
    assert not checks(run)["features_as_many_as_expected"]
    assert world.online.count() == 0


def test_a_lost_row_blocks(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = FeatureBackfill._computed
    monkeypatch.setattr(FeatureBackfill, "_computed", lambda *given: whole(*given).slice(1))  # type: ignore[union-attr]
    run = world.run()
    assert not checks(run)["rows_are_complete"]
    assert world.tables.row_count(FEATURES) == 0


def test_wrong_values_are_refused_by_the_partitioned_asset_alone_too(world: World) -> None:
    world.bad_values = True
    run = world.run(tags=days("2013-05-01", "2013-05-03"), only=PATIENT_FEATURES)
    assert not run.success
    assert "age_plausible" in why(run)
    assert world.tables.row_count(FEATURES) == 0


def test_the_partitioned_asset_can_be_materialized_alone(world: World) -> None:
    assert world.run(tags=days("2013-05-01", "2013-05-03"), only=PATIENT_FEATURES).success
    assert len(world.ages()) == 4


def test_records_without_a_time_and_repeated_keys_block(world: World) -> None:
    world.vitals("P1", 1)  # the same key once more
    run = world.run()
    assert not run.success
    assert not checks(run)["no_record_twice"]
    assert world.computed == []


def test_the_rows_of_one_wide_message_are_one_record(world: World) -> None:
    for _ in range(3):  # three vital signs of one message
        world.vitals("P1", 15, position="patient-vitals-0-7")
    run = world.run()
    assert run.success
    assert checks(run)["no_record_twice"]


# ------------------------------------------------------------------------------------------------------------- online


def test_redis_gets_the_newest_row_of_each_patient_and_no_newer_one_is_replaced(world: World) -> None:
    ahead = OnlineFeatures("P2", PILOT.name, datetime(2016, 1, 1, tzinfo=UTC), {"age_years": 9.0}, "other")
    world.online.put([ahead])
    run = world.run({"start_date": "2013-05-01", "end_date": "2013-05-07"})
    assert run.success
    stored = world.online.get("P1")
    assert stored is not None
    assert stored.features["age_years"] == 3.0
    kept = world.online.get("P2")
    assert kept is not None
    assert kept.feature_time == ahead.feature_time
    verified = result_of(run, "backfill/verification")
    assert (verified["online_checked"], verified["online_equal"], verified["online_newer"]) == (2, 1, 1)


def test_an_old_range_does_not_put_an_old_row_online(world: World) -> None:
    world.run()
    world.run({"start_date": "2013-05-01", "end_date": "2013-05-02"})
    stored = world.online.get("P1")
    assert stored is not None
    assert stored.feature_time.date() == date(2013, 5, 11)


# ------------------------------------------------------------------------------------------- beside the data pipeline


def test_a_backfill_of_the_whole_trial_leaves_nothing_to_do_for_the_pipeline(world: World) -> None:
    world.run()
    assert OfflineStore(None, world.tables).refresh(PILOT).status == "up_to_date"  # type: ignore[arg-type]


def test_a_backfill_of_a_part_leaves_the_pipelines_record_alone(world: World) -> None:
    world.run()
    recorded = FeatureState(PILOT, world.tables).recorded()
    assert recorded is not None
    world.vitals("P9", 3)
    world.subjects("P9")
    world.run({"start_date": "2013-05-01", "end_date": "2013-05-07"})
    assert ("P9", 3) in world.ages()
    assert FeatureState(PILOT, world.tables).recorded() == recorded  # P9's other days may be due: the pipeline looks


def test_rows_prepared_from_older_rows_are_compared_again(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.run()
    world.spoil(date(2013, 5, 2), 77.0)
    replace, calls = world.tables.replace, []

    def overtaken(name: str, *given: Any, **named: Any) -> int:
        if name == FEATURES and named.get("expected"):
            calls.append(name)
            if len(calls) == 1:  # another writer commits between the comparison and the write
                (app,) = named["transactions"]
                world.tables.append(FEATURES, read_features(world.tables, PILOT).clear().to_arrow(),
                                    transactions={app: named["transactions"][app]})  # fmt: skip
        return replace(name, *given, **named)

    monkeypatch.setattr(world.tables, "replace", overtaken)
    assert world.run().success
    assert len(calls) == 2
    assert world.ages()["P1", 1] == 2.0


def test_a_pipeline_refresh_notices_that_rows_changed_under_it(world: World) -> None:
    world.run()
    world.tables.append(FEATURES, read_features(world.tables, PILOT).clear().to_arrow(), transactions={"a": 1})
    store = FeatureBackfill(None, world.tables)  # type: ignore[arg-type]
    span = store.span(PILOT)
    assert span is not None
    from clinical_orchestration.stores.feature_store import WriteGuard

    guard = WriteGuard(PILOT, world.tables)
    world.spoil(date(2013, 5, 2), 77.0)
    store.load(PILOT, span, store.stage(PILOT, span))
    with pytest.raises(TransactionMovedError):
        world.tables.replace(
            FEATURES, read_features(world.tables, PILOT).clear().to_arrow(), predicate="trial = 'none'",
            transactions=guard.next, expected=guard.seen,
        )  # fmt: skip


# ------------------------------------------------------------------------------------------------------------- resume


@pytest.mark.parametrize("stop", ["validate_features", "load_to_feature_store", "verify_feature_store"])
def test_an_interrupted_backfill_is_resumed_with_the_same_result(
    world: World, monkeypatch: pytest.MonkeyPatch, stop: str
) -> None:
    """The run dies before, at the end of, and after the load; the next one ends what it began."""
    target = {
        "validate_features": "check",
        "load_to_feature_store": "_record",
        "verify_feature_store": "verify",
    }[stop]
    conf = {"start_date": "2013-05-01", "end_date": "2013-05-07"}
    with monkeypatch.context() as patched:

        def killed(*_: Any, **__: Any) -> None:
            raise KeyboardInterrupt

        patched.setattr(FeatureBackfill, target, killed)
        with contextlib.suppress(KeyboardInterrupt):
            assert not world.run(conf).success
    run = world.run(conf)
    assert run.success
    assert len(world.computed) == 1  # the computed rows were there
    assert world.ages() == {("P1", 0): 1, ("P1", 1): 2, ("P1", 2): 3, ("P2", 1): 1, ("P2", 5): 2}
    result = result_of(run, PATIENT_FEATURES)
    assert result["resumed"] is (stop != "validate_features")
    assert result["differences"]["added_rows"] == 5  # of both runs together
    assert world.tables.row_count(FEATURE_STAGING) == 0


# ------------------------------------------------------------------------------------------------------------- report


def test_the_report_says_what_was_done_and_names_no_patient(world: World) -> None:
    run = world.run()
    names = sorted(world.objects.objects)
    assert [name.rpartition(".")[2] for name in names] == ["html", "json"]
    report = orjson.loads(world.objects.objects[names[1]])
    assert report["patient_features"]["rows"] == 7
    assert report["patient_features"]["differences"]["added_rows"] == 7
    assert set(report["seconds"]) == {
        "history", "validation", "engineered_features", "feature_checks", "patient_features", "verification",
    }  # fmt: skip
    assert report["verification"]["consistent"]
    page = world.objects.objects[names[0]].decode()
    assert "<h2>Before and after</h2>" in page
    assert result_of(run, "backfill/report")["report"].endswith(".html")
    assert not [event for event in run.all_events if "P1" in str(event.event_specific_data)]
    assert "P1" not in page
