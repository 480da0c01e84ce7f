"""Task instances: lists, tries, logs, notes, clearing, states, XComs."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Any

import orjson

from clinical_orchestration.airflow.control import Control, RefusedError, UnknownError
from clinical_orchestration.airflow.logs import LogReader
from clinical_orchestration.airflow.runs import TASK_ORDER, DagRun, RunFilter, TaskFilter, TaskInstance, TaskTry
from clinical_orchestration.airflow.states import SUCCESS, UPSTREAM_FAILED
from clinical_orchestration.airflow.xcoms import XCom, XComReader
from clinical_orchestration.api.call import Body, Call, show_time
from clinical_orchestration.api.problems import bad_request, not_found
from clinical_orchestration.api.runs import note_of, page_of

_TASK_RANGES = ("start_date", "end_date", "updated_at")
_STATES = (
    "success", "running", "failed", "upstream_failed", "skipped", "up_for_retry", "up_for_reschedule", "queued", "none",
    "scheduled", "deferred", "removed", "restarting",
)  # fmt: skip
_QUEUE, _EXECUTOR = "default", "LocalExecutor"


class TaskRoutes:
    """Handlers of task instances, named by Airflow's operation ids. No task of this platform is mapped."""

    def __init__(self, control: Control) -> None:
        self.control = control
        self.logs = LogReader(control)
        self.xcoms = XComReader(control)

    # --- lists ------------------------------------------------------------------------------------------------------

    def get_task_instances(self, call: Call) -> dict[str, Any]:
        """``GET /dags/{dag_id}/dagRuns/{dag_run_id}/taskInstances``; ``~`` stands for all."""
        limit, offset = call.page()
        return self._listed(self._filter(call), limit, offset, ())

    def get_task_instances_batch(self, call: Call) -> dict[str, Any]:
        """``POST /dags/~/dagRuns/~/taskInstances/list``."""
        body = Body(call.body(), _BATCH)
        limit, offset = page_of(body)
        durations = {("duration", side): body.number(f"duration_{side}") for side in ("gte", "lte")}
        states = body.texts("state", nulls=True)
        wanted = TaskFilter(
            runs=RunFilter(
                dag_ids=body.texts("dag_ids") or None,
                run_ids=body.texts("dag_run_ids"),
                ranges=body.ranges("execution_date"),
            ),
            task_ids=body.texts("task_ids"),
            states=_states(states) if states else (),
            pools=body.texts("pool") or (),
            ranges={
                **body.ranges("start_date", "end_date"),
                **{key: bound for key, bound in durations.items() if bound is not None},
            },
        )
        if _elsewhere(body.texts("queue"), _QUEUE) or _elsewhere(body.texts("executor"), _EXECUTOR):
            return {"task_instances": [], "total_entries": 0}
        return self._listed(wanted, limit, offset, ())

    def get_mapped_task_instances(self, call: Call) -> dict[str, Any]:
        """``GET .../taskInstances/{task_id}/listMapped``: nothing here is mapped, so there are none to list."""
        call.page()
        order = call.text("order_by")
        if order is not None and order.lstrip("-") not in (*TASK_ORDER, "data_interval_start"):
            raise bad_request(f"Ordering with '{order}' is not supported")
        self._filter(call)
        dag_id, task_id = call.path["dag_id"], call.path["task_id"]
        dag = self.control.catalog().dags.get(dag_id)
        if dag is None:
            raise not_found(f"DAG {dag_id} not found")
        if task_id not in dag.tasks:
            raise not_found(f"Task id {task_id} not found")
        raise not_found(f"Task id {task_id} is not mapped")

    # --- one --------------------------------------------------------------------------------------------------------

    def get_task_instance(self, call: Call) -> dict[str, Any]:
        """``GET .../taskInstances/{task_id}``."""
        return show_task(self._task(call))

    def get_mapped_task_instance(self, call: Call) -> dict[str, Any]:
        """``GET .../taskInstances/{task_id}/{map_index}``: -1 is the task itself."""
        return show_task(self._mapped(call))

    def get_task_instance_tries(self, call: Call) -> dict[str, Any]:
        """``GET .../taskInstances/{task_id}/tries``."""
        limit, offset = call.page()
        task = self._task(call, "Task instance not found")
        tries = self.control.runs.tries(task.run, task.task_id)
        order = call.text("order_by") or ""
        if order and order.lstrip("-") not in _TRY_ORDER:
            raise bad_request(
                f"Ordering with '{order.lstrip('-')}' is disallowed or the attribute does not exist on the model"
            )
        if order.startswith("-"):
            tries = tries[::-1]
        page = tries[offset : offset + limit]
        return {"task_instances": [show_try(task, one) for one in page], "total_entries": len(tries)}

    def get_mapped_task_instance_tries(self, call: Call) -> dict[str, Any]:
        """``GET .../taskInstances/{task_id}/{map_index}/tries``."""
        self._mapped(call)
        return self.get_task_instance_tries(call)

    def get_task_instance_try_details(self, call: Call) -> dict[str, Any]:
        """``GET .../taskInstances/{task_id}/tries/{task_try_number}``."""
        task = self._task(call, "Task instance not found")
        number = _integer(call.path["task_try_number"], "task_try_number")
        for one in self.control.runs.tries(task.run, task.task_id):
            if one.number == number:
                return show_try(task, one)
        raise not_found(
            "Task instance not found",
            f"The Task Instance with dag_id: `{task.run.dag_id}`, run_id: `{task.run.run_id}`, task_id: "
            f"`{task.task_id}`, try_number: `{number}` and map_index: `-1` was not found",
        )

    def get_mapped_task_instance_try_details(self, call: Call) -> dict[str, Any]:
        """``GET .../taskInstances/{task_id}/{map_index}/tries/{task_try_number}``."""
        self._mapped(call)
        return self.get_task_instance_try_details(call)

    def get_task_instance_dependencies(self, call: Call) -> dict[str, Any]:
        """``GET .../taskInstances/{task_id}/dependencies``: what keeps a task from starting."""
        task = self._task(call, "Task instance not found")
        return {"dependencies": self._dependencies(task)}

    def get_mapped_task_instance_dependencies(self, call: Call) -> dict[str, Any]:
        """``GET .../taskInstances/{task_id}/{map_index}/dependencies``."""
        return {"dependencies": self._dependencies(self._mapped(call))}

    def get_extra_links(self, call: Call) -> dict[str, Any]:
        """``GET .../taskInstances/{task_id}/links``: the step in the Dagster UI."""
        dag_id, run_id, task_id = call.path["dag_id"], call.path["dag_run_id"], call.path["task_id"]
        dag = self.control.catalog().dags.get(dag_id)
        if dag is None:
            raise not_found("DAG not found", f'DAG with ID = "{dag_id}" not found')
        if task_id not in dag.tasks:
            raise not_found("Task not found", f'Task with ID = "{task_id}" not found')
        run = self.control.runs.get_run(dag_id, run_id)
        if run is None:
            raise not_found("DAG Run not found", f'DAG Run with ID = "{run_id}" not found')
        step = dag.tasks[task_id].step
        link = f"/dagster/runs/{run.dagster_run_id}" + (f"?selection={step}" if step else "")
        return {"Dagster": link}

    # --- changes ----------------------------------------------------------------------------------------------------

    def set_task_instance_note(self, call: Call) -> dict[str, Any]:
        """``PATCH .../taskInstances/{task_id}/setNote``."""
        task = self._task(call, "Task instance not found")
        self.control.set_note(task.run, note_of(call), task.task_id)
        return show_task(self._task(call))

    def set_mapped_task_instance_note(self, call: Call) -> dict[str, Any]:
        """``PATCH .../taskInstances/{task_id}/{map_index}/setNote``."""
        self._mapped(call)
        return self.set_task_instance_note(call)

    def patch_task_instance(self, call: Call) -> dict[str, Any]:
        """``PATCH .../taskInstances/{task_id}``."""
        body = Body(call.body(), ("dry_run", "new_state"))
        state = _new_state(body)
        dag_id, task_id = call.path["dag_id"], call.path["task_id"]
        dag = self.control.catalog().dags.get(dag_id)
        if dag is None:
            raise not_found("DAG not found", f"DAG {dag_id!r} not found")
        if task_id not in dag.tasks:
            raise not_found("Task not found", f"Task {task_id!r} not found in DAG {dag_id!r}")
        task = self._task(call, None)
        if not body.boolean("dry_run", True):
            self._set(task.run, [task.task_id], state)
        return show_reference(task)

    def patch_mapped_task_instance(self, call: Call) -> dict[str, Any]:
        """``PATCH .../taskInstances/{task_id}/{map_index}``."""
        if _integer(call.path["map_index"], "map_index") != -1:
            raise not_found("Task instance not found")
        return self.patch_task_instance(call)

    def post_set_task_instances_state(self, call: Call) -> dict[str, Any]:
        """``POST /dags/{dag_id}/updateTaskInstancesState``."""
        body = Body(call.body(), _SET_STATES)
        dag_id = call.path["dag_id"]
        task_id = body.text("task_id", required=True) or ""
        flags = {
            name: body.boolean(name, required=True)
            for name in ("include_upstream", "include_downstream", "include_future", "include_past")
        }
        state = _new_state(body)
        moment, run_id = body.time("execution_date"), body.text("dag_run_id")
        if (moment is None) == (run_id is None):
            raise bad_request("{'_schema': ['Exactly one of execution_date or dag_run_id must be provided']}")
        dag = self.control.catalog().dags.get(dag_id)
        if dag is None:
            raise not_found(f"Dag ID {dag_id} not found")
        if task_id not in dag.tasks:
            raise not_found(f"Task ID {task_id} not found")
        runs = self._runs(dag_id, run_id, moment, moment)
        if not runs:
            raise not_found(None, f"Task instance not found for task {task_id!r} on execution_date {moment or run_id}")
        tasks = [task_id]
        tasks += sorted(dag.ancestors(task_id)) if flags["include_upstream"] else []
        tasks += sorted(dag.descendants(task_id)) if flags["include_downstream"] else []
        runs = self._with_others(runs[0], flags["include_past"], flags["include_future"])
        found = [self.control.runs.tasks_of(run)[name] for run in runs for name in tasks]
        changed = [one for one in found if one.state != state]
        if not body.boolean("dry_run", True):
            for run in runs:
                mine = [one.task_id for one in changed if one.run.id == run.id]
                if mine:
                    self._set(run, mine, state)
        return {"task_instances": [show_reference(one) for one in changed]}

    def post_clear_task_instances(self, call: Call) -> dict[str, Any]:
        """``POST /dags/{dag_id}/clearTaskInstances``."""
        body = Body(call.body(), _CLEAR)
        only_failed, only_running = body.boolean("only_failed", True), body.boolean("only_running")
        start, end, run_id = body.time("start_date"), body.time("end_date"), body.text("dag_run_id")
        task_ids = body.texts("task_ids")
        wrong = None
        if only_failed and only_running:
            wrong = "only_failed and only_running both are set to True"
        elif start and end and start > end:
            wrong = "end_date is sooner than start_date"
        elif run_id and (start or end):
            wrong = "Exactly one of dag_run_id or (start_date and end_date) must be provided"
        elif task_ids is not None and not task_ids:
            wrong = "Shorter than minimum length 1."
        flags = {name: body.boolean(name) for name in _CLEAR_FLAGS}
        dry_run = body.boolean("dry_run", True)
        if wrong:
            raise bad_request(str({"_schema": [wrong]}))
        dag_id = call.path["dag_id"]
        dag = self.control.catalog().dags.get(dag_id)
        if dag is None:
            raise not_found(f"Dag id {dag_id} not found")
        runs = self._runs(dag_id, run_id, start, end)
        if run_id is not None:
            if not runs:
                raise not_found(f"Dag Run id {run_id} not found in dag {dag_id}")
            runs = self._with_others(runs[0], flags["include_past"], flags["include_future"])
        chosen = set(dag.tasks) if task_ids is None else {name for name in task_ids if name in dag.tasks}
        if task_ids is not None:
            if flags["include_upstream"]:
                chosen |= {name for one in task_ids if one in dag.tasks for name in dag.ancestors(one)}
            if flags["include_downstream"]:
                chosen |= {name for one in task_ids if one in dag.tasks for name in dag.descendants(one)}
        states = ("failed", UPSTREAM_FAILED) if only_failed else ("running",) if only_running else None
        found = [
            one
            for run in runs
            for one in self.control.runs.tasks_of(run).values()
            if one.task_id in chosen and (states is None or one.state in states)
        ]
        if not dry_run:
            for run in runs:
                mine = [one.task_id for one in found if one.run.id == run.id]
                if mine:
                    self._refusable(lambda run=run, mine=mine: self.control.clear(run, mine))  # type: ignore[misc]
        return {"task_instances": [show_reference(one) for one in found]}

    # --- logs and XComs ---------------------------------------------------------------------------------------------

    def get_log(self, call: Call) -> Any:
        """``GET .../taskInstances/{task_id}/logs/{task_try_number}``: text, or JSON with a continuation token."""
        number = _integer(call.path["task_try_number"], "task_try_number")
        if number < 1:
            raise bad_request(f"task_try_number must be a positive integer, not {number}")
        map_index = call.integer("map_index", -1)
        full = bool(call.boolean("full_content", False))
        token = call.text("token")
        position = None
        if token is not None:
            position = self.logs.position_of(token)
            if position is None:
                raise bad_request("Bad Signature. Please use only the tokens provided by the API.")
        task = self._found(call)
        if task is None or map_index != -1:
            raise not_found("TaskInstance not found")
        wants_json = "application/json" in call.accept
        found = self.logs.read(task, number, None if full else position, whole=full or not wants_json)
        if not wants_json:
            return found.text
        return {
            "content": str([(found.host, found.text)]) if found.text or not found.finished else str([]),
            "continuation_token": self.logs.token(found.position),
        }

    def get_xcom_entries(self, call: Call) -> dict[str, Any]:
        """``GET .../taskInstances/{task_id}/xcomEntries``; ``~`` stands for all."""
        limit, offset = call.page()
        map_index = call.integer("map_index")
        key = call.text("xcom_key")
        task_id = call.path["task_id"]
        runs = self._some_runs(call)
        found = [
            (run, entry)
            for run in runs
            for entry in self.xcoms.entries(run)
            if task_id in ("~", entry.task_id) and key in (None, entry.key) and map_index in (None, -1)
        ]
        page = found[offset : offset + limit]
        return {"xcom_entries": [_show_xcom(run, entry) for run, entry in page], "total_entries": len(found)}

    def get_xcom_entry(self, call: Call) -> dict[str, Any]:
        """``GET .../taskInstances/{task_id}/xcomEntries/{xcom_key}``."""
        if call.boolean("deserialize", False):
            raise bad_request("XCom deserialization is disabled in configuration.")
        stringify = call.boolean("stringify", True)
        map_index = call.integer("map_index", -1)
        run = self.control.runs.get_run(call.path["dag_id"], call.path["dag_run_id"])
        for entry in self.xcoms.entries(run) if run is not None and map_index == -1 else ():
            if entry.task_id == call.path["task_id"] and entry.key == call.path["xcom_key"] and run is not None:
                value = str(entry.value) if stringify else orjson.loads(orjson.dumps(entry.value))
                return {**_show_xcom(run, entry), "value": value}
        raise not_found("XCom entry not found")

    # --- parts ------------------------------------------------------------------------------------------------------

    def _listed(self, wanted: TaskFilter, limit: int, offset: int, order: Sequence[str]) -> dict[str, Any]:
        tasks, total = self.control.runs.list_tasks(wanted, limit=limit, offset=offset, order_by=order)
        return {"task_instances": [show_task(task) for task in tasks], "total_entries": total}

    def _filter(self, call: Call) -> TaskFilter:
        dag_id, run_id = call.path["dag_id"], call.path["dag_run_id"]
        ranges: dict[tuple[str, str], datetime | float] = {**call.ranges(*_TASK_RANGES)}
        for side in ("gte", "lte"):
            bound = call.number(f"duration_{side}")
            if bound is not None and math.isfinite(bound):
                ranges["duration", side] = bound
        elsewhere = _elsewhere(call.texts("queue"), _QUEUE) or _elsewhere(call.texts("executor"), _EXECUTOR)
        states = call.texts("state")
        return TaskFilter(
            runs=RunFilter(
                dag_ids=[] if elsewhere else None if dag_id == "~" else [dag_id],
                run_ids=None if run_id == "~" else [run_id],
                ranges=call.ranges("execution_date"),
            ),
            states=_states(states) if states else (),
            pools=call.texts("pool"),
            ranges=ranges,
        )

    def _found(self, call: Call) -> TaskInstance | None:
        wanted = TaskFilter(
            runs=RunFilter(dag_ids=[call.path["dag_id"]], run_ids=[call.path["dag_run_id"]]),
            task_ids=[call.path["task_id"]],
        )
        tasks, _ = self.control.runs.list_tasks(wanted, limit=1)
        return tasks[0] if tasks else None

    def _task(self, call: Call, title: str | None = "Task instance not found") -> TaskInstance:
        task = self._found(call)
        if task is None:
            raise not_found(
                title,
                f"Task instance not found for task {call.path['task_id']!r} on DAG run with ID "
                f"{call.path['dag_run_id']!r}",
            )
        return task

    def _mapped(self, call: Call) -> TaskInstance:
        if _integer(call.path["map_index"], "map_index") != -1:
            raise not_found("Task instance not found")
        return self._task(call)

    def _some_runs(self, call: Call) -> list[DagRun]:
        dag_id, run_id = call.path["dag_id"], call.path["dag_run_id"]
        wanted = RunFilter(None if dag_id == "~" else [dag_id], None if run_id == "~" else [run_id])
        return self.control.runs.list_runs(wanted, limit=200, order_by=["-id"])[0]

    def _runs(self, dag_id: str, run_id: str | None, start: datetime | None, end: datetime | None) -> list[DagRun]:
        ranges = {}
        if start is not None:
            ranges["execution_date", "gte"] = start
        if end is not None:
            ranges["execution_date", "lte"] = end
        wanted = RunFilter([dag_id], None if run_id is None else [run_id], ranges=ranges)
        return self.control.runs.list_runs(wanted, limit=1000)[0]

    def _with_others(self, run: DagRun, past: bool, future: bool) -> list[DagRun]:
        runs = [run]
        if past:
            runs += [one for one in self._runs(run.dag_id, None, None, run.logical_date) if one.id != run.id]
        if future:
            runs += [one for one in self._runs(run.dag_id, None, run.logical_date, None) if one.id != run.id]
        return runs

    def _set(self, run: DagRun, tasks: Sequence[str], state: str) -> None:
        self._refusable(lambda: self.control.set_task_states(run, tasks, state))

    def _refusable(self, change: Callable[[], object]) -> None:
        try:
            change()
        except RefusedError as error:
            raise bad_request(str(error)) from None
        except UnknownError as error:
            raise not_found(str(error)) from None

    def _dependencies(self, task: TaskInstance) -> list[dict[str, str]]:
        if task.state not in (None, "scheduled"):
            return []
        run, dag = task.run, self.control.dag(task.run.dag_id)
        found = []
        if run.held:
            found.append({"name": "Dagrun Running", "reason": "The DAG is paused; the run starts when it is unpaused."})
        elif run.state == "queued":
            found.append({"name": "Dagrun Running", "reason": f"Task instance's dagrun was not in the 'running' state "
                          f"but in the state '{run.state}'."})  # fmt: skip
        states = self.control.runs.tasks_of(run)
        waits = [name for name in dag.tasks[task.task_id].upstream if states[name].state != SUCCESS]
        if waits:
            rule = dag.tasks[task.task_id].trigger_rule
            found.append(
                {
                    "name": "Trigger Rule",
                    "reason": f"Task's trigger rule '{rule}' requires all upstream tasks to have succeeded, "
                    f"but found {len(waits)} non-success(es): {', '.join(waits)}.",
                }
            )
        return found


_BATCH = (
    "page_offset", "page_limit", "dag_ids", "dag_run_ids", "task_ids", "execution_date_gte", "execution_date_lte",
    "start_date_gte", "start_date_lte", "end_date_gte", "end_date_lte", "duration_gte", "duration_lte", "state", "pool",
    "queue", "executor",
)  # fmt: skip
_CLEAR_FLAGS = (
    "include_subdags", "include_parentdag", "reset_dag_runs", "include_upstream", "include_downstream",
    "include_future", "include_past",
)  # fmt: skip
_CLEAR = (
    "dry_run", "task_ids", "start_date", "end_date", "only_failed", "only_running", "dag_run_id", *_CLEAR_FLAGS,
)  # fmt: skip
_SET_STATES = (
    "dry_run", "task_id", "execution_date", "dag_run_id", "include_upstream", "include_downstream", "include_future",
    "include_past", "new_state",
)  # fmt: skip
_TRY_ORDER = ("try_number", "start_date", "end_date", "duration", "state", "task_id")


def show_task(task: TaskInstance) -> dict[str, Any]:
    """Return a task instance as the API shows it."""
    return {
        "dag_id": task.run.dag_id,
        "dag_run_id": task.run.run_id,
        "duration": task.duration,
        "end_date": show_time(task.end_date),
        "execution_date": show_time(task.run.logical_date),
        "executor": None,
        "executor_config": "{}",
        "hostname": "",
        "map_index": -1,
        "max_tries": task.max_tries,
        "note": task.note,
        "operator": "EmptyOperator" if task.task_id.startswith(("start_", "end_")) else "PythonOperator",
        "pid": None,
        "pool": task.pool,
        "pool_slots": 1,
        "priority_weight": 1,
        "queue": _QUEUE,
        "queued_when": show_time(task.queued_when),
        "rendered_fields": {},
        "rendered_map_index": None,
        "sla_miss": None,
        "start_date": show_time(task.start_date),
        "state": task.state,
        "task_display_name": task.task_id,
        "task_id": task.task_id,
        "trigger": None,
        "triggerer_job": None,
        "try_number": task.try_number,
        "unixname": "",
    }


def show_try(task: TaskInstance, one: TaskTry) -> dict[str, Any]:
    """Return one attempt as the API shows it."""
    shown = show_task(task)
    for name in (
        "execution_date", "note", "rendered_fields", "rendered_map_index", "sla_miss", "trigger", "triggerer_job",
    ):  # fmt: skip
        del shown[name]
    return shown | {
        "try_number": one.number,
        "state": one.state,
        "start_date": show_time(one.start_date),
        "end_date": show_time(one.end_date),
        "duration": one.duration,
    }


def show_reference(task: TaskInstance) -> dict[str, Any]:
    """Return what names a task instance."""
    return {
        "task_id": task.task_id,
        "dag_id": task.run.dag_id,
        "execution_date": show_time(task.run.logical_date),
        "dag_run_id": task.run.run_id,
    }


def _show_xcom(run: DagRun, entry: XCom) -> dict[str, Any]:
    return {
        "key": entry.key,
        "timestamp": show_time(entry.at),
        "execution_date": show_time(run.logical_date),
        "map_index": -1,
        "task_id": entry.task_id,
        "dag_id": run.dag_id,
    }


def _new_state(body: Body) -> str:
    state = body.text("new_state", required=True) or ""
    if state not in ("success", "failed", "skipped"):
        raise bad_request(str({"new_state": ["Must be one of: success, failed, skipped."]}))
    return state


def _states(wanted: Sequence[str | None]) -> list[str | None]:
    return [None if state in ("none", "None", None) else state for state in wanted]


def _elsewhere(wanted: Sequence[str] | None, ours: str) -> bool:
    return bool(wanted) and ours not in (wanted or ())


def _integer(text: str, name: str) -> int:
    try:
        value = int(text)
    except ValueError:
        raise bad_request(f"Wrong type, expected 'integer' for path parameter '{name}'") from None
    if abs(value) >= 2**31:
        raise not_found("Task instance not found")
    return value
