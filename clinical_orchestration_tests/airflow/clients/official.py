"""Drives every operation of the stable API with `apache-airflow-client` and prints what came of it as JSON.

    python official.py URL            # names and passwords: ADMIN, VIEWER as `name:password` in the environment

URL is that of the page, without ``/api/v1``. The pipelines are the five of the platform; runs are real ones.
"""

from __future__ import annotations

import datetime
import inspect
import json
import os
import sys
import time
import traceback
from collections import Counter

from airflow_client import client as airflow
from airflow_client.client import apis
from airflow_client.client.model.action import Action
from airflow_client.client.model.action_resource import ActionResource
from airflow_client.client.model.clear_dag_run import ClearDagRun
from airflow_client.client.model.clear_task_instances import ClearTaskInstances
from airflow_client.client.model.connection import Connection
from airflow_client.client.model.create_dataset_event import CreateDatasetEvent
from airflow_client.client.model.dag import DAG
from airflow_client.client.model.dag_run import DAGRun
from airflow_client.client.model.list_dag_runs_form import ListDagRunsForm
from airflow_client.client.model.list_task_instance_form import ListTaskInstanceForm
from airflow_client.client.model.pool import Pool
from airflow_client.client.model.resource import Resource
from airflow_client.client.model.role import Role
from airflow_client.client.model.set_dag_run_note import SetDagRunNote
from airflow_client.client.model.set_task_instance_note import SetTaskInstanceNote
from airflow_client.client.model.update_dag_run_state import UpdateDagRunState
from airflow_client.client.model.update_task_instance import UpdateTaskInstance
from airflow_client.client.model.update_task_instances_state import UpdateTaskInstancesState
from airflow_client.client.model.update_task_state import UpdateTaskState
from airflow_client.client.model.user import User
from airflow_client.client.model.variable import Variable

DAG_ID, OTHER, MANUAL = "clinical_data_pipeline", "model_monitoring", "feature_backfill"
TASK = "train_model"
UTC = datetime.timezone.utc  # noqa: UP017 - the client runs on older Pythons too


class Client:
    """One user of the API."""

    def __init__(self, url: str, login: str) -> None:
        name, _, password = login.partition(":")
        host = url.rstrip("/") + "/api/v1"
        self.api = airflow.ApiClient(airflow.Configuration(host=host, username=name, password=password))
        self.methods = {}
        self.where = {}
        for kind in vars(apis).values():
            if inspect.isclass(kind) and kind.__name__.endswith("Api"):
                api = kind(self.api)
                for attribute, endpoint in vars(api).items():
                    if attribute.endswith("_endpoint"):
                        settings = endpoint.settings
                        name = settings["operation_id"]
                        self.methods[name] = getattr(api, attribute.removesuffix("_endpoint"))
                        self.where[name] = (settings["http_method"], settings["endpoint_path"])


class Drive:
    """Calls operations and notes how they were answered."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.admin = Client(url, os.environ.get("ADMIN", "admin:admin"))
        self.answers: dict[str, Counter] = {name: Counter() for name in self.admin.methods}
        self.failures: list[str] = []
        self.section = ""

    def check(self, holds: object, text: str) -> None:
        """Note a failure unless something holds."""
        if not holds:
            self.failures.append(f"{self.section}: {text}")

    def ok(self, operation: str, *, by: Client | None = None, **values):
        """Call an operation that must succeed; return its answer, typed by the client."""
        answer, status, _ = (by or self.admin).methods[operation](_return_http_data_only=False, **values)
        self.answers[operation][str(status)] += 1
        return answer

    def refused(self, operation: str, status: int, *, by: Client | None = None, says: str = "", **values) -> None:
        """Call an operation that must be refused with a status, as problem+json."""
        try:
            (by or self.admin).methods[operation](**values)
        except airflow.ApiException as error:
            self.answers[operation][str(error.status)] += 1
            self.check(error.status == status, f"{operation} answers {error.status}, not {status}: {error.body}")
            kind = error.headers.get("content-type", "")
            self.check(kind.startswith("application/problem+json"), f"{operation} {status} is sent as {kind}")
            body = json.loads(error.body)
            self.check(body["status"] == error.status and "title" in body, f"{operation} {status}: {error.body}")
            self.check(says in error.body, f"{operation} {status} does not say {says!r}: {error.body}")
            if status == 401:
                self.check("www-authenticate" not in error.headers, "401 carries WWW-Authenticate")
        else:
            self.check(False, f"{operation} was not refused with {status}")

    def wait(self, dag_id: str, run_id: str, *states: str):
        """Wait until a run has one of the states."""
        end = time.monotonic() + float(os.environ.get("RUN_SECONDS", "60"))
        while True:
            run = self.ok("get_dag_run", dag_id=dag_id, dag_run_id=run_id)
            if str(run.state) in states or time.monotonic() > end:
                self.check(str(run.state) in states, f"the run {run_id} is {run.state}, not {states}")
                return run
            time.sleep(0.1)


def dags(drive: Drive) -> None:
    listed = drive.ok("get_dags")
    names = [dag.dag_id for dag in listed.dags]
    drive.check(names == sorted(names) and listed.total_entries == len(names) == 5, f"DAGs {names}")
    page = drive.ok("get_dags", limit=2, offset=1, order_by="-dag_id")
    drive.check([dag.dag_id for dag in page.dags] == sorted(names, reverse=True)[1:3], "page of DAGs")
    drive.check(drive.ok("get_dags", tags=["monitoring"]).total_entries == 2, "DAGs by tag")
    drive.check(drive.ok("get_dags", dag_id_pattern="clinical").total_entries == 1, "DAGs by pattern")
    drive.refused("get_dags", 400, order_by="owners", says="Ordering with")
    dag = drive.ok("get_dag", dag_id=DAG_ID)
    drive.check(dag.is_active and not dag.is_paused and dag.owners == ["clinical_trials_team"], "the main DAG")
    drive.check(str(dag.schedule_interval["seconds"]) == "21600", f"its schedule {dag.schedule_interval}")
    drive.refused("get_dag", 404, dag_id="none", says="DAG not found")
    details = drive.ok("get_dag_details", dag_id=DAG_ID)
    drive.check(details.catchup is False and details.timezone == "UTC", "details of the DAG")
    drive.refused("get_dag_details", 404, dag_id="none")
    tasks = drive.ok("get_tasks", dag_id=DAG_ID, order_by="-task_id")
    ids = [task.task_id for task in tasks.tasks]
    drive.check(ids == sorted(ids, reverse=True) and len(ids) == 12, f"tasks {ids}")
    drive.refused("get_tasks", 404, dag_id="none")
    drive.refused("get_tasks", 400, dag_id=DAG_ID, order_by="colour")
    task = drive.ok("get_task", dag_id=DAG_ID, task_id=TASK)
    drive.check(task.downstream_task_ids == ["evaluate_model"] and task.retries == 1, "one task")
    drive.refused("get_task", 404, dag_id=DAG_ID, task_id="none")
    source = drive.ok("get_dag_source", file_token=dag.file_token)
    drive.check("train_model" in source.content, "the source does not name its tasks")
    drive.refused("get_dag_source", 404, file_token="bm9uZQ")
    paused = drive.ok("patch_dag", dag_id=OTHER, dag=DAG(is_paused=True))
    drive.check(paused.is_paused is True, "pausing")
    drive.check([one.dag_id for one in drive.ok("get_dags", paused=True).dags] == [OTHER], "paused DAGs")
    drive.refused("patch_dag", 404, dag_id="none", dag=DAG(is_paused=True))
    drive.refused("patch_dag", 400, dag_id=OTHER, dag=DAG(is_paused=True), update_mask=["tags"])
    back = drive.ok("patch_dags", dag_id_pattern=OTHER, dag=DAG(is_paused=False))
    drive.check([(one.dag_id, one.is_paused) for one in back.dags] == [(OTHER, False)], "unpausing by pattern")
    drive.refused("patch_dags", 400, dag_id_pattern="~", dag=DAG(is_paused=False), update_mask=["tags"])
    drive.refused("reparse_dag_file", 404, file_token="bm9uZQ")


def runs(drive: Drive) -> None:
    made = drive.ok("post_dag_run", dag_id=DAG_ID, dag_run=DAGRun(dag_run_id="official-1", conf={"a": 1}, note="first"))
    drive.check(str(made.run_type) == "manual" and made.conf == {"a": 1}, "the triggered run")
    done = drive.wait(DAG_ID, "official-1", "success")
    drive.check(done.start_date <= done.end_date and done.note == "first", "times of the run")
    dated = datetime.datetime(2025, 10, 25, tzinfo=UTC)
    second = drive.ok("post_dag_run", dag_id=DAG_ID, dag_run=DAGRun(logical_date=dated, conf={"fail": TASK}))
    drive.check(second.dag_run_id == "manual__2025-10-25T00:00:00+00:00", f"run id {second.dag_run_id}")
    drive.check(second.data_interval_end == dated, "the data interval ends at the logical date")
    drive.wait(DAG_ID, second.dag_run_id, "failed")
    drive.refused("post_dag_run", 409, dag_id=DAG_ID, dag_run=DAGRun(dag_run_id="official-1"))
    drive.refused("post_dag_run", 409, dag_id=DAG_ID, dag_run=DAGRun(logical_date=dated))
    drive.refused("post_dag_run", 404, dag_id="none", dag_run=DAGRun())
    drive.refused("post_dag_run", 400, dag_id=DAG_ID, dag_run=DAGRun(dag_run_id="x" * 300))
    drive.refused("get_dag_run", 404, dag_id=DAG_ID, dag_run_id="none")

    listed = drive.ok("get_dag_runs", dag_id=DAG_ID, order_by="-execution_date", limit=1)
    drive.check([run.dag_run_id for run in listed.dag_runs] == ["official-1"], "newest run first")
    drive.check(listed.total_entries == 2, f"{listed.total_entries} runs in all")
    failed = drive.ok("get_dag_runs", dag_id="~", state=["failed"], execution_date_lte=dated, end_date_gte=dated)
    drive.check([run.dag_run_id for run in failed.dag_runs] == [second.dag_run_id], "runs by filters")
    drive.check(drive.ok("get_dag_runs", dag_id="none").total_entries == 0, "runs of an unknown DAG")
    drive.refused("get_dag_runs", 400, dag_id=DAG_ID, order_by="colour")
    drive.refused("get_dag_runs", 400, dag_id=DAG_ID, limit=-1)
    form = ListDagRunsForm(dag_ids=[DAG_ID], states=["success"], order_by="-start_date", page_limit=1)
    batch = drive.ok("get_dag_runs_batch", list_dag_runs_form=form)
    drive.check([run.dag_run_id for run in batch.dag_runs] == ["official-1"], "batch of runs")
    drive.refused("get_dag_runs_batch", 400, list_dag_runs_form=ListDagRunsForm(order_by="colour"))
    stats = drive.ok("get_dag_stats", dag_ids=DAG_ID)
    counts = {str(one.state): one.count for one in stats.dags[0].stats}
    drive.check((counts["success"], counts["failed"]) == (1, 1), f"statistics {counts}")

    noted = drive.ok(
        "set_dag_run_note", dag_id=DAG_ID, dag_run_id="official-1", set_dag_run_note=SetDagRunNote(note="n")
    )
    drive.check(noted.note == "n", "note of a run")
    note = SetDagRunNote(note="n")
    drive.refused("set_dag_run_note", 404, dag_id=DAG_ID, dag_run_id="none", set_dag_run_note=note)
    long = SetDagRunNote(note="n" * 1001, _check_type=False)
    drive.refused("set_dag_run_note", 400, dag_id=DAG_ID, dag_run_id="official-1", set_dag_run_note=long)

    preview = drive.ok(
        "clear_dag_run", dag_id=DAG_ID, dag_run_id=second.dag_run_id, clear_dag_run=ClearDagRun(dry_run=True)
    )
    drive.check(preview["total_entries"] == 12, "clearing a run shows its tasks first")
    cleared = drive.ok(
        "clear_dag_run", dag_id=DAG_ID, dag_run_id=second.dag_run_id, clear_dag_run=ClearDagRun(dry_run=False),
        _check_return_type=False,
    )  # fmt: skip
    drive.check(cleared["dag_run_id"] == second.dag_run_id, "the cleared run is the same")
    drive.wait(DAG_ID, second.dag_run_id, "failed")
    drive.refused("clear_dag_run", 404, dag_id=DAG_ID, dag_run_id="none", clear_dag_run=ClearDagRun(dry_run=True))

    for state in ("success", "failed"):
        changed = drive.ok(
            "update_dag_run_state", dag_id=DAG_ID, dag_run_id=second.dag_run_id,
            update_dag_run_state=UpdateDagRunState(state=state),
        )  # fmt: skip
        drive.check(str(changed.state) == state, f"run set to {state}")
    state = UpdateDagRunState(state="success")
    drive.refused("update_dag_run_state", 404, dag_id=DAG_ID, dag_run_id="none", update_dag_run_state=state)
    upstream = drive.ok("get_upstream_dataset_events", dag_id=DAG_ID, dag_run_id="official-1")
    drive.check(upstream.total_entries == 0, "datasets start no run")
    drive.refused("get_upstream_dataset_events", 404, dag_id=DAG_ID, dag_run_id="none")

    drive.ok("patch_dag", dag_id=OTHER, dag=DAG(is_paused=True))
    drive.ok("post_dag_run", dag_id=OTHER, dag_run=DAGRun(dag_run_id="held"))
    held = drive.ok("get_dag_run", dag_id=OTHER, dag_run_id="held")
    drive.check(str(held.state) == "queued", "a run of a paused DAG waits")
    waiting = drive.ok("get_task_instances", dag_id=OTHER, dag_run_id="held")
    drive.check(waiting.total_entries == 8, f"its {waiting.total_entries} task instances are there")
    drive.ok("patch_dag", dag_id=OTHER, dag=DAG(is_paused=False))
    drive.wait(OTHER, "held", "success")
    drive.ok("delete_dag_run", dag_id=OTHER, dag_run_id="held")
    drive.refused("delete_dag_run", 404, dag_id=OTHER, dag_run_id="held")


def task_instances(drive: Drive) -> None:
    failed = "manual__2025-10-25T00:00:00+00:00"
    run = {"dag_id": DAG_ID, "dag_run_id": "official-1"}
    task, mapped = {**run, "task_id": TASK}, {**run, "task_id": TASK, "map_index": -1}
    bad, none = {"dag_id": DAG_ID, "dag_run_id": failed, "task_id": TASK}, {**run, "task_id": "none"}
    listed = drive.ok("get_task_instances", **run)
    drive.check({str(one.state) for one in listed.task_instances} == {"success"}, "all tasks succeeded")
    states = drive.ok("get_task_instances", dag_id=DAG_ID, dag_run_id=failed, state=["upstream_failed"])
    drive.check(states.total_entries > 0, "tasks behind the failed one")
    drive.check(drive.ok("get_task_instances", **run, limit=3, offset=10).total_entries == 12, "page of tasks")
    drive.check(drive.ok("get_task_instances", **run, pool=["none"]).total_entries == 0, "tasks by pool")
    drive.refused("get_task_instances", 400, **run, limit=-1)
    form = ListTaskInstanceForm(dag_ids=[DAG_ID], dag_run_ids=["official-1"], task_ids=[TASK])
    batch = drive.ok("get_task_instances_batch", list_task_instance_form=form)
    drive.check([one.task_id for one in batch.task_instances] == [TASK], "batch of tasks")
    drive.ok("get_task_instance", **task)
    drive.refused("get_task_instance", 404, **none)
    wrong = ListTaskInstanceForm(dag_ids="x", _check_type=False)
    drive.refused("get_task_instances_batch", 400, list_task_instance_form=wrong)
    one = drive.ok("get_mapped_task_instance", **mapped)
    drive.check(one.map_index == -1 and one.duration >= 0, "the only index of a task")
    drive.refused("get_mapped_task_instance", 404, **{**mapped, "map_index": 3})
    drive.refused("get_mapped_task_instances", 404, **task, says="not mapped")
    tries = drive.ok("get_task_instance_tries", **bad)
    drive.check([one.try_number for one in tries.task_instances] == [1, 2], "tries count on after clearing")
    drive.refused("get_task_instance_tries", 404, **none)
    drive.ok("get_mapped_task_instance_tries", **mapped)
    drive.refused("get_mapped_task_instance_tries", 404, **{**mapped, "map_index": 3})
    first = drive.ok("get_task_instance_try_details", **bad, task_try_number=1)
    drive.check(str(first.state) == "failed", "the first try failed")
    drive.refused("get_task_instance_try_details", 404, **bad, task_try_number=9)
    drive.ok("get_mapped_task_instance_try_details", **mapped, task_try_number=1)
    drive.refused("get_mapped_task_instance_try_details", 404, **{**mapped, "map_index": 3}, task_try_number=1)
    drive.check(drive.ok("get_task_instance_dependencies", **task).dependencies == [], "nothing keeps it back")
    drive.refused("get_task_instance_dependencies", 404, **none)
    drive.ok("get_mapped_task_instance_dependencies", **mapped)
    drive.refused("get_mapped_task_instance_dependencies", 404, **{**mapped, "map_index": 3})
    links = drive.ok("get_extra_links", **task, _check_return_type=False)
    drive.check("/dagster/runs/" in str(links), f"links {links}")
    drive.refused("get_extra_links", 404, **none)

    log = drive.ok("get_log", **bad, task_try_number=1, full_content=True)
    drive.check("made to fail" in log.content, "the log of the failed try")
    drive.check(log.continuation_token, "logs go on with a token")
    drive.ok("get_log", **bad, task_try_number=1, token=log.continuation_token)
    drive.refused("get_log", 400, **bad, task_try_number=1, token="forged")
    drive.refused("get_log", 404, **none, task_try_number=1)
    entries = drive.ok("get_xcom_entries", **task)
    keys = [entry.key for entry in entries.xcom_entries]
    drive.check("return_value" in keys, f"XComs {keys}")
    drive.check(drive.ok("get_xcom_entries", **task, xcom_key="none").total_entries == 0, "XComs by key")
    drive.refused("get_xcom_entries", 400, **task, limit=-1)
    value = drive.ok("get_xcom_entry", **task, xcom_key="return_value")
    drive.check(value.value == "{'rows': 3, 'step': 'train_model'}" or os.environ.get("REAL"), f"XCom {value.value}")
    drive.refused("get_xcom_entry", 404, **task, xcom_key="none")
    drive.refused("get_xcom_entry", 400, **task, xcom_key="return_value", deserialize=True)

    note = SetTaskInstanceNote(note="looked at")
    drive.check(drive.ok("set_task_instance_note", **task, set_task_instance_note=note).note == "looked at", "note")
    drive.refused("set_task_instance_note", 404, **none, set_task_instance_note=note)
    drive.ok("set_mapped_task_instance_note", **mapped, set_task_instance_note=note)
    drive.refused("set_mapped_task_instance_note", 404, **{**mapped, "map_index": 3}, set_task_instance_note=note)

    change = UpdateTaskInstance(dry_run=False, new_state=UpdateTaskState("success"))
    drive.check(drive.ok("patch_task_instance", **bad, update_task_instance=change).task_id == TASK, "state of a task")
    drive.check(str(drive.ok("get_task_instance", **bad).state) == "success", "the state is set")
    drive.refused("patch_task_instance", 404, **none, update_task_instance=change)
    drive.ok("patch_mapped_task_instance", **{**mapped, "dag_run_id": failed}, update_task_instance=change)
    drive.refused("patch_mapped_task_instance", 404, **{**mapped, "map_index": 3}, update_task_instance=change)
    state = UpdateTaskState("success")
    flags = dict.fromkeys(("include_upstream", "include_future", "include_past"), False)
    several = UpdateTaskInstancesState(
        dry_run=True,
        dag_run_id=failed,
        task_id=TASK,
        new_state=state,
        include_downstream=True,
        **flags,
    )
    shown = drive.ok("post_set_task_instances_state", dag_id=DAG_ID, update_task_instances_state=several)
    drive.check("evaluate_model" in [one.task_id for one in shown.task_instances], "tasks below are set too")
    drive.refused("post_set_task_instances_state", 404, dag_id="none", update_task_instances_state=several)
    clear = ClearTaskInstances(dry_run=False, dag_run_id="official-1", task_ids=[TASK], only_failed=False)
    again = drive.ok("post_clear_task_instances", dag_id=DAG_ID, clear_task_instances=clear)
    drive.check([one.task_id for one in again.task_instances] == [TASK], "the cleared task")
    drive.wait(DAG_ID, "official-1", "success")
    drive.check(drive.ok("get_task_instance", **task).try_number == 2, "the cleared task ran again")
    drive.refused("post_clear_task_instances", 404, dag_id="none", clear_task_instances=clear)
    both = ClearTaskInstances(only_failed=True, only_running=True)
    drive.refused("post_clear_task_instances", 400, dag_id=DAG_ID, clear_task_instances=both)


def stored(drive: Drive) -> None:
    made = drive.ok("post_variables", variable=Variable(key="official", value="1", description="d"))
    drive.check((made.key, made.value) == ("official", "1"), "variable")
    drive.ok("post_variables", variable=Variable(key="official", value="2"))
    drive.check(drive.ok("get_variable", variable_key="official").value == "2", "a variable is overwritten")
    drive.refused("post_variables", 400, variable=Variable(value="x"))
    listed = drive.ok("get_variables", order_by="-key", limit=1, offset=0)
    drive.check(len(listed.variables) == 1 and listed.total_entries >= 1, "page of variables")
    drive.refused("get_variables", 400, order_by="colour")
    changed = drive.ok("patch_variable", variable_key="official", variable=Variable(key="official", value="3"))
    drive.check(changed.value == "3", "changed variable")
    drive.refused("patch_variable", 404, variable_key="none", variable=Variable(key="none", value="3"))
    drive.refused("patch_variable", 400, variable_key="official", variable=Variable(key="other", value="3"))
    drive.ok("delete_variable", variable_key="official")
    drive.refused("get_variable", 404, variable_key="official")
    drive.refused("delete_variable", 404, variable_key="official")

    lab = Connection(connection_id="official", conn_type="http", host="lab", port=80, password="geheim")
    drive.check("geheim" not in str(drive.ok("post_connection", connection=lab)), "the password is shown")
    drive.refused("post_connection", 409, connection=lab)
    drive.refused("post_connection", 400, connection=Connection(connection_id="official"))
    drive.check(drive.ok("get_connection", connection_id="official").port == 80, "connection")
    drive.check("geheim" not in str(drive.ok("get_connection", connection_id="official")), "the password is shown")
    drive.refused("get_connection", 404, connection_id="none")
    connections = drive.ok("get_connections", order_by="connection_id", limit=1, offset=1)
    drive.check(len(connections.connections) <= 1, "page of connections")
    drive.refused("get_connections", 400, order_by="colour")
    moved = Connection(connection_id="official", conn_type="http", port=81, host="x")
    changed = drive.ok("patch_connection", connection_id="official", connection=moved, update_mask=["port"])
    drive.check((changed.host, changed.port) == ("lab", 81), "only the masked field changes")
    drive.refused("patch_connection", 404, connection_id="none", connection=moved)
    drive.refused("patch_connection", 400, connection_id="official", connection=moved, update_mask=["colour"])
    drive.refused("test_connection", 403, connection=lab, says="disabled")
    drive.ok("delete_connection", connection_id="official")
    drive.refused("delete_connection", 404, connection_id="official")

    drive.check(drive.ok("post_pool", pool=Pool(name="official", slots=3)).open_slots == 3, "pool")
    drive.refused("post_pool", 409, pool=Pool(name="official", slots=3))
    drive.refused("post_pool", 400, pool=Pool(slots=3))
    drive.check(drive.ok("get_pool", pool_name="official").slots == 3, "one pool")
    drive.refused("get_pool", 404, pool_name="none")
    pools = drive.ok("get_pools", order_by="-slots", limit=2)
    drive.check(pools.pools[0].slots >= pools.pools[1].slots and pools.total_entries >= 11, "pools in order")
    drive.refused("get_pools", 400, order_by="colour")
    grown = drive.ok("patch_pool", pool_name="official", pool=Pool(slots=5, name="official"), update_mask=["slots"])
    drive.check(grown.slots == 5, "changed pool")
    drive.refused("patch_pool", 404, pool_name="none", pool=Pool(slots=5, name="none"))
    drive.refused("patch_pool", 400, pool_name="official", pool=Pool(slots=5, name="official"), update_mask=["colour"])
    drive.ok("delete_pool", pool_name="official")
    drive.refused("delete_pool", 404, pool_name="official")
    drive.refused("delete_pool", 400, pool_name="default_pool")


def datasets(drive: Drive) -> None:
    listed = drive.ok("get_datasets", dag_ids=DAG_ID, uri_pattern=TASK)
    drive.check(listed.total_entries >= 1 or os.environ.get("REAL"), "datasets of the DAG")
    listed = drive.ok("get_datasets", dag_ids=DAG_ID, limit=1, order_by="-uri")
    uri = listed.datasets[0].uri
    drive.refused("get_datasets", 400, order_by="colour")
    drive.check(drive.ok("get_dataset", uri=uri).id == listed.datasets[0].id, "one dataset")
    drive.refused("get_dataset", 404, uri="asset://none")
    made = drive.ok("create_dataset_event", create_dataset_event=CreateDatasetEvent(dataset_uri=uri, extra={"k": "v"}))
    drive.check(made.dataset_uri == uri and made.extra["k"] == "v", "reported event")
    drive.refused("create_dataset_event", 404, create_dataset_event=CreateDatasetEvent(dataset_uri="asset://none"))
    wrong = CreateDatasetEvent(dataset_uri=uri, colour="red")
    drive.refused("create_dataset_event", 400, create_dataset_event=wrong)
    events = drive.ok("get_dataset_events", source_dag_id=DAG_ID, source_run_id="official-1", order_by="-timestamp")
    drive.check(events.total_entries >= 1, "events of a run")
    drive.check({event.source_run_id for event in events.dataset_events} == {"official-1"}, "events of that run only")
    drive.refused("get_dataset_events", 400, order_by="colour")
    for operation in ("get_dag_dataset_queued_event", "delete_dag_dataset_queued_event"):
        drive.refused(operation, 404, dag_id=DAG_ID, uri=uri, says="Queue event")
    for operation in ("get_dag_dataset_queued_events", "delete_dag_dataset_queued_events"):
        drive.refused(operation, 404, dag_id=DAG_ID, says="Queue event")
    for operation in ("get_dataset_queued_events", "delete_dataset_queued_events"):
        drive.refused(operation, 404, uri=uri, says="Queue event")


def platform(drive: Drive) -> None:
    drive.check(drive.ok("get_version").version == "2.11.0", "version")
    health = drive.ok("get_health")
    drive.check(str(health.metadatabase.status) == "healthy", "health")
    sections = drive.ok("get_config").sections
    drive.check({"core", "webserver"} <= {one.name for one in sections}, "config")
    drive.refused("get_config", 404, section="none")
    value = drive.ok("get_value", section="core", option="executor").sections[0].options[0].value
    drive.check(value == "LocalExecutor", f"executor {value}")
    drive.refused("get_value", 404, section="core", option="none")
    drive.check(drive.ok("get_providers")["total_entries"] >= 1, "providers")
    drive.check(drive.ok("get_plugins", limit=5).total_entries == 0, "plugins")
    drive.refused("get_plugins", 400, limit=-1)
    errors = drive.ok("get_import_errors", order_by="-timestamp")
    if errors.total_entries:
        number = errors.import_errors[0].import_error_id
        shown = drive.ok("get_import_error", import_error_id=number)
        drive.check("Error" in shown.stack_trace, "text of an import error")
    drive.refused("get_import_errors", 400, order_by="colour")
    drive.refused("get_import_error", 404, import_error_id=999)
    drive.ok("get_dag_warnings", dag_id=DAG_ID)
    drive.refused("get_dag_warnings", 400, order_by="colour")


def people(drive: Drive) -> None:
    roles = drive.ok("get_roles", order_by="name")
    drive.check({"Admin", "Op", "User", "Viewer", "Public"} <= {role.name for role in roles.roles}, "Airflow's roles")
    drive.check(drive.ok("get_roles", limit=1, offset=1).total_entries == roles.total_entries, "page of roles")
    drive.refused("get_roles", 400, order_by="colour")
    drive.check(drive.ok("get_role", role_name="Viewer").name == "Viewer", "one role")
    drive.refused("get_role", 404, role_name="none")
    permissions = drive.ok("get_permissions", limit=100)
    drive.check(permissions.total_entries >= 4, "permissions")
    action, resource = Action._from_openapi_data(name="can_read"), Resource._from_openapi_data(name="DAGs")
    reader = Role(name="Reader", actions=[ActionResource(action=action, resource=resource)])
    drive.check(drive.ok("post_role", role=reader).name == "Reader", "new role")
    drive.refused("post_role", 400, role=reader, says="already exists")
    drive.ok("patch_role", role_name="Reader", role=reader)
    drive.refused("patch_role", 404, role_name="none", role=reader)

    person = User(
        username="official", password="a-long-password-1", email="o@example.org", first_name="O", last_name="F",
        _check_type=False,
    )  # fmt: skip
    made = drive.ok("post_user", user=person)
    drive.check(made.username == "official", "new user")
    drive.refused("post_user", 409, user=person)
    drive.refused("post_user", 400, user=User(username="no-mail"))
    users = drive.ok("get_users", order_by="-username", limit=1)
    drive.check(len(users.users) == 1 and users.total_entries >= 2, "page of users")
    drive.refused("get_users", 400, order_by="colour")
    shown = drive.ok("get_user", username="official")
    drive.check("a-long-password-1" not in str(shown) and shown.first_name == "O", "one user")
    drive.refused("get_user", 404, username="none")
    renamed = User(username="official", email="o@example.org", first_name="Other", last_name="F")
    changed = drive.ok("patch_user", username="official", user=renamed, update_mask=["first_name"])
    drive.check(changed.first_name == "Other", "changed user")
    drive.refused("patch_user", 404, username="none", user=renamed)
    drive.ok("delete_user", username="official")
    drive.refused("delete_user", 404, username="official")
    drive.ok("delete_role", role_name="Reader")
    drive.refused("delete_role", 404, role_name="Reader")


def trail(drive: Drive) -> None:
    logs = drive.ok("get_event_logs", dag_id=DAG_ID, order_by="-event_log_id", limit=5)
    drive.check(logs.total_entries >= 3 and len(logs.event_logs) == 5, f"{logs.total_entries} event logs of the DAG")
    numbers = [one.event_log_id for one in logs.event_logs]
    drive.check(numbers == sorted(numbers, reverse=True), "event logs in order")
    triggers = drive.ok("get_event_logs", run_id="official-1", included_events="post_dag_run")
    drive.check({one.event for one in triggers.event_logs} == {"post_dag_run"}, "event logs by event")
    drive.check({one.owner for one in triggers.event_logs} == {drive.admin.api.configuration.username}, "who it was")
    one = drive.ok("get_event_log", event_log_id=numbers[0])
    drive.check(one.event_log_id == numbers[0], "one event log")
    drive.refused("get_event_log", 404, event_log_id=10**9)
    drive.refused("get_event_logs", 400, order_by="colour")


def doors(drive: Drive) -> None:
    stranger = Client(drive.url, "nobody-known:wrong-password")
    drive.refused("get_dags", 401, by=stranger)
    drive.refused("post_dag_run", 401, by=stranger, dag_id=DAG_ID, dag_run=DAGRun())
    drive.check(drive.ok("get_version", by=stranger).version == "2.11.0", "the version needs no login")
    viewer = Client(drive.url, os.environ["VIEWER"])
    drive.ok("get_dags", by=viewer)
    drive.ok("get_dag_runs", by=viewer, dag_id=DAG_ID)
    drive.refused("post_dag_run", 403, by=viewer, dag_id=DAG_ID, dag_run=DAGRun())
    drive.refused("patch_dag", 403, by=viewer, dag_id=DAG_ID, dag=DAG(is_paused=True))
    drive.refused("delete_dag_run", 403, by=viewer, dag_id=DAG_ID, dag_run_id="official-1")
    drive.refused("get_connections", 403, by=viewer)
    drive.refused("get_variables", 403, by=viewer)
    drive.refused("post_pool", 403, by=viewer, pool=Pool(name="v", slots=1))
    drive.refused("get_config", 403, by=viewer)
    drive.refused("get_users", 403, by=viewer)
    drive.refused("get_event_logs", 403, by=viewer)


def last(drive: Drive) -> None:
    token = drive.ok("get_dag", dag_id=DAG_ID).file_token
    drive.ok("reparse_dag_file", file_token=token)
    drive.ok("post_dag_run", dag_id=MANUAL, dag_run=DAGRun(dag_run_id="to-delete"))
    drive.wait(MANUAL, "to-delete", "success", "failed")
    drive.ok("delete_dag", dag_id=MANUAL)
    drive.check(drive.ok("get_dag_runs", dag_id=MANUAL).total_entries == 0, "the runs of a deleted DAG are gone")
    drive.check(drive.ok("get_dag", dag_id=MANUAL).is_active, "its code is there, so it is there again")
    drive.refused("delete_dag", 404, dag_id="none")


def main() -> None:
    drive = Drive(sys.argv[1])
    parts = [dags, runs, task_instances, stored, datasets, platform, people, trail]
    parts += [doors] if os.environ.get("VIEWER") else []
    for part in (*parts, last):
        drive.section = part.__name__
        try:
            part(drive)
        except Exception as error:
            frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == __file__]
            said = getattr(error, "body", None) or error
            drive.failures.append(f"{part.__name__}: line {frames[-1].lineno}: {type(error).__name__}: {said}")
    operations = [
        {"name": name, "method": drive.admin.where[name][0], "path": drive.admin.where[name][1], "answers": counted}
        for name, counted in drive.answers.items()
    ]
    sys.stdout.write(json.dumps({"operations": operations, "failures": drive.failures}))


if __name__ == "__main__":
    main()
