"""DAG runs over a real Dagster on PostgreSQL: triggered, taken up, held, cleared, set and deleted."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta

import pytest
from dagster._core.workspace.context import WorkspaceProcessContext
from sqlalchemy import event

from clinical_orchestration.airflow.control import ConflictError, Control, RefusedError, UnknownError
from clinical_orchestration.airflow.runs import RunFilter, TaskFilter
from clinical_orchestration.contract import CLINICAL_DATA_PIPELINE, PIPELINES
from clinical_orchestration_tests.airflow import tiny_definitions

pytestmark = pytest.mark.integration

MAIN = "clinical_data_pipeline"


def states(control: Control, dag_id: str, run_id: str) -> dict[str, str | None]:
    return {name: one.state for name, one in control.runs.tasks_of(control.run(dag_id, run_id)).items()}


def test_every_pipeline_is_a_dag_with_the_tasks_of_the_contract(control: Control) -> None:
    dags = control.catalog().dags
    assert set(dags) == {pipeline.name for pipeline in PIPELINES}
    for pipeline in PIPELINES:
        assert list(dags[pipeline.name].tasks) == list(pipeline.tasks)
        assert dags[pipeline.name].cron == pipeline.cron
        assert dags[pipeline.name].tags == pipeline.tags


def test_a_triggered_run_succeeds_with_all_its_tasks_and_its_conf(control: Control) -> None:
    run = control.trigger(control.dag(MAIN), run_id="by-hand", conf={"param1": "value1"}, note="why")

    assert (run.state, run.run_type, run.external_trigger, run.note) == ("success", "manual", True, "why")
    assert run.conf == {"param1": "value1"}
    assert {"param1": "value1"} in tiny_definitions.conf_seen
    tasks = control.runs.tasks_of(run)
    assert list(tasks) == list(CLINICAL_DATA_PIPELINE.tasks)
    assert {one.state for one in tasks.values()} == {"success"}
    assert all(one.try_number == 1 and one.duration is not None and one.duration >= 0 for one in tasks.values())
    assert tasks["start_pipeline"].start_date == run.start_date
    assert tasks["end_pipeline"].end_date == run.end_date
    assert run.start_date is not None
    assert tasks["train_model"].pool == "data_validation"


def test_the_newest_runs_of_several_dags_come_in_one_query(control: Control) -> None:
    for dag_id in ("feature_backfill", "model_monitoring"):
        for number in range(3):
            control.trigger(control.dag(dag_id), run_id=f"newest-{number}")
    with counted(control) as queries:
        found = control.runs.latest(["feature_backfill", "model_monitoring", "none"], 2)
    assert {dag_id: [run.run_id for run in runs] for dag_id, runs in found.items()} == {
        "feature_backfill": ["newest-2", "newest-1"], "model_monitoring": ["newest-2", "newest-1"],
    }  # fmt: skip
    assert sum("LATERAL" in query for query in queries) == 1


@contextmanager
def counted(control: Control) -> Iterator[list[str]]:
    """The statements that are sent meanwhile."""
    seen: list[str] = []

    def note(connection: object, cursor: object, statement: str, *_: object) -> None:
        seen.append(statement)

    event.listen(control.runs.reads, "before_cursor_execute", note)
    yield seen
    event.remove(control.runs.reads, "before_cursor_execute", note)


def test_the_data_interval_of_a_manual_run_ends_at_the_tick_before_it(control: Control) -> None:
    logical = datetime(2025, 10, 25, 7, 30, tzinfo=UTC)
    run = control.trigger(control.dag(MAIN), logical_date=logical)

    assert run.run_id == "manual__2025-10-25T07:30:00+00:00"
    assert run.logical_date == logical
    assert run.data_interval_end == datetime(2025, 10, 25, 6, tzinfo=UTC)
    assert run.data_interval_start == datetime(2025, 10, 25, 0, tzinfo=UTC)


def test_a_second_run_of_the_same_id_or_date_is_a_conflict(control: Control) -> None:
    dag = control.dag("feature_backfill")
    logical = datetime(2025, 1, 1, tzinfo=UTC)
    control.set_paused(dag, False)
    run = control.trigger(dag, run_id="once", logical_date=logical)
    assert run.data_interval_start == run.data_interval_end == logical
    with pytest.raises(ConflictError):
        control.trigger(dag, run_id="once")
    with pytest.raises(ConflictError):
        control.trigger(dag, run_id="other", logical_date=logical)
    assert control.runs.list_runs(RunFilter(dag_ids=["feature_backfill"], run_ids=["once", "other"]))[1] == 1


def test_a_failed_task_fails_the_run_and_leaves_what_follows_upstream_failed(control: Control) -> None:
    tiny_definitions.failing.add("train_model")
    run = control.trigger(control.dag(MAIN), run_id="fails")

    assert run.state == "failed"
    found = states(control, MAIN, "fails")
    assert found["setup_mlflow_experiment"] == "success"
    assert found["train_model"] == "failed"
    assert {found[name] for name in ("evaluate_model", "register_model", "end_pipeline")} == {"upstream_failed"}


def test_clearing_a_failed_task_and_what_follows_goes_on_in_the_same_run(control: Control) -> None:
    tiny_definitions.failing.add("evaluate_model")
    run = control.trigger(control.dag(MAIN), run_id="mended")
    tiny_definitions.failing.clear()
    dag = control.dag(MAIN)

    again = control.clear(run, ["evaluate_model", *dag.descendants("evaluate_model")])

    assert again.id == run.id
    assert again.state == "success"
    assert len(control.runs.attempts(run)) == 2
    tasks = control.runs.tasks_of(again)
    assert {one.state for one in tasks.values()} == {"success"}
    assert tasks["evaluate_model"].try_number == 2
    assert tasks["train_model"].try_number == 1
    tries = control.runs.tries(again, "evaluate_model")
    assert [(one.number, one.state) for one in tries] == [(1, "failed"), (2, "success")]
    assert tries[0].dagster_run_id != tries[1].dagster_run_id


def test_the_branch_not_taken_is_skipped_and_the_run_succeeds(control: Control) -> None:
    run = control.trigger(control.dag("scheduled_retraining"), run_id="skips")

    assert run.state == "success"
    found = states(control, "scheduled_retraining", "skips")
    assert found["skip_retraining"] == "success"
    assert {found[name] for name in ("prepare_training_data", "retrain_model", "rollback_if_needed")} == {"skipped"}
    assert found["end_retraining"] == "success"


def test_a_trigger_of_a_paused_dag_waits_until_it_is_unpaused(control: Control) -> None:
    dag = control.dag("model_monitoring")
    control.set_paused(dag, True)
    assert control.switches([dag])["model_monitoring"].paused
    run = control.trigger(dag, run_id="waits", conf={"a": 1})

    assert (run.state, run.held, run.start_date) == ("queued", True, None)
    tasks = control.runs.tasks_of(run)
    assert list(tasks) == list(dag.tasks)
    assert {one.state for one in tasks.values()} == {None}
    assert control.release_held() == 0

    control.set_paused(dag, False)

    after = control.run("model_monitoring", "waits")
    assert (after.state, after.held) == ("success", False)
    assert {"a": 1} in tiny_definitions.conf_seen
    assert control.switches([dag])["model_monitoring"].next_tick is not None


def test_runs_started_in_dagster_show_up(control: Control, workspace: WorkspaceProcessContext) -> None:
    job = tiny_definitions.defs.resolve_job_def(MAIN)
    tick = "2026-01-01T12:00:00+00:00"
    result = job.execute_in_process(
        instance=workspace.instance,
        tags={"dagster/schedule_name": f"{MAIN}_schedule", ".dagster/scheduled_execution_time": tick},
    )

    found = control.runs.find(result.run_id)

    assert found is not None
    assert found.run_id == "scheduled__2026-01-01T06:00:00+00:00"
    assert found.logical_date == datetime(2026, 1, 1, 6, tzinfo=UTC)
    assert found.data_interval_end == datetime(2026, 1, 1, 12, tzinfo=UTC)
    assert (found.run_type, found.external_trigger, found.state) == ("scheduled", False, "success")

    twice = job.execute_in_process(
        instance=workspace.instance,
        tags={"dagster/schedule_name": f"{MAIN}_schedule", ".dagster/scheduled_execution_time": tick},
    )
    other = control.runs.find(twice.run_id)
    assert other is not None
    assert other.run_id.startswith("scheduled__2026-01-01T06:00:00+00:00__")


def test_states_set_by_hand_show_and_can_be_seen_apart(control: Control) -> None:
    tiny_definitions.failing.add("deploy_model")
    run = control.trigger(control.dag(MAIN), run_id="by-decree")
    assert run.state == "failed"

    control.set_task_states(
        run, ["deploy_model", "validate_data_quality", "end_pipeline"], "success"
    )  # fmt: skip
    assert control.run(MAIN, "by-decree").state == "success"
    assert control.set_run_state(run, "failed").state == "failed"
    with pytest.raises(RefusedError):
        control.set_run_state(run, "running")


def test_a_deleted_run_is_gone_from_dagster_too(control: Control, workspace: WorkspaceProcessContext) -> None:
    run = control.trigger(control.dag(MAIN), run_id="goes")
    control.delete(run)
    with pytest.raises(UnknownError):
        control.run(MAIN, "goes")
    assert not workspace.instance.has_run(run.dagster_run_id)
    assert control.runs.list_runs(RunFilter(run_ids=["goes"]))[0] == []


def test_filters_order_and_pages(control: Control) -> None:
    dag = control.dag("data_quality_monitoring")
    start = datetime(2025, 3, 1, tzinfo=UTC)
    for day in range(5):
        control.trigger(dag, run_id=f"day-{day}", logical_date=start + timedelta(days=day))
    mine = RunFilter(dag_ids=[dag.dag_id])

    newest, total = control.runs.list_runs(mine, limit=2, order_by=["-execution_date"])
    assert ([run.run_id for run in newest], total) == (["day-4", "day-3"], 5)
    rest, total = control.runs.list_runs(mine, limit=2, offset=4, order_by=["-execution_date"])
    assert ([run.run_id for run in rest], total) == (["day-0"], 5)
    ranged = RunFilter(
        dag_ids=[dag.dag_id],
        ranges={
            ("execution_date", "gte"): start + timedelta(days=1), ("execution_date", "lte"): start + timedelta(days=3)
        },
    )  # fmt: skip
    assert control.runs.list_runs(ranged)[1] == 3
    assert control.runs.list_runs(RunFilter(dag_ids=[dag.dag_id], states=["failed"]))[1] == 0
    assert control.runs.counts([dag.dag_id]) == {(dag.dag_id, "success"): 5}
    with pytest.raises(KeyError):
        control.runs.list_runs(mine, order_by=["colour"])
    tasks, total = control.runs.list_tasks(
        TaskFilter(runs=mine, task_ids=["detect_anomalies"], states=["success"]), limit=3
    )
    assert (len(tasks), total) == (3, 5)


def test_a_note_is_kept_when_the_run_goes_on(control: Control) -> None:
    run = control.trigger(control.dag(MAIN), run_id="noted")
    control.set_note(run, "to be looked at", "train_model")
    control.clear(run)
    task = control.runs.tasks_of(control.run(MAIN, "noted"))["train_model"]
    assert (task.note, task.try_number) == ("to be looked at", 2)


def test_a_run_that_is_started_later_is_stored_and_started_once(
    control: Control, workspace: WorkspaceProcessContext
) -> None:
    closed = threading.Event()
    with ThreadPoolExecutor(1) as starter:
        starter.submit(closed.wait, 60)
        slow = Control(lambda: workspace, control._engine, starter)
        dag = slow.dag("model_monitoring")
        runs = [slow.trigger(dag, run_id=f"later-{number}", conf={"n": number}) for number in range(4)]
        assert {run.state for run in runs} == {"queued"}
        assert set(control.runs.tasks_of(runs[0])) == set(dag.tasks)
        # changes do not wait for the start, nor fail for want of it
        assert slow.set_run_state(runs[1], "failed").state == "failed"
        slow.delete(runs[2])
        assert slow.clear(control.run(dag.dag_id, "later-1")).state == "success"
        # another process, as after the end of this one
        assert control.release_held() == 2
        closed.set()
    for number, attempts in ((0, 1), (1, 2), (3, 1)):
        run = control.run(dag.dag_id, f"later-{number}")
        assert (run.state, run.conf, len(control.runs.attempts(run))) == ("success", {"n": number}, attempts)
    with pytest.raises(UnknownError):
        control.run(dag.dag_id, "later-2")


def test_a_run_is_started_behind_the_answer(control: Control, workspace: WorkspaceProcessContext) -> None:
    with ThreadPoolExecutor(1) as starter:
        slow = Control(lambda: workspace, control._engine, starter)
        slow.trigger(slow.dag("model_monitoring"), run_id="behind", user="somebody")
    run = control.run("model_monitoring", "behind")
    assert run.state == "success"
    stored = control.instance().get_run_by_id(run.dagster_run_id)
    assert stored is not None
    assert stored.tags["user"] == "somebody"
