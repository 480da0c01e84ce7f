"""DAGs, their details, tasks and source."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import orjson

from clinical_orchestration.airflow.catalog import Dag, Task
from clinical_orchestration.airflow.control import Control, Switch, UnknownError
from clinical_orchestration.airflow.runs import RunFilter
from clinical_orchestration.api.call import MAXIMUM_LIMIT, Body, Call, show_time
from clinical_orchestration.api.problems import Problem, bad_request, conflict, not_found
from clinical_orchestration.contract import PIPELINES

DAG_FIELDS = (
    "dag_id", "dag_display_name", "root_dag_id", "is_paused", "is_active", "is_subdag", "last_parsed_time",
    "last_pickled", "last_expired", "scheduler_lock", "pickle_id", "default_view", "fileloc", "file_token", "owners",
    "description", "schedule_interval", "timetable_description", "tags", "max_active_tasks", "max_active_runs",
    "max_consecutive_failed_dag_runs", "has_task_concurrency_limits", "has_import_errors", "next_dagrun",
    "next_dagrun_data_interval_start", "next_dagrun_data_interval_end", "next_dagrun_create_after",
)  # fmt: skip
LISTS_KEPT = 64
LIST_LASTS = timedelta(minutes=10)
_CONTRACT = {pipeline.name for pipeline in PIPELINES}


class DagRoutes:
    """Handlers of everything below ``/dags`` that is no run, named by Airflow's operation ids."""

    def __init__(self, control: Control) -> None:
        self.control = control
        self._lists: dict[Any, tuple[Any, datetime, bytes]] = {}

    def get_dags(self, call: Call) -> bytes:
        """``GET /dags``; an answer is kept until a DAG is loaded anew, paused or unpaused, or fires."""
        asked = tuple((name, tuple(values)) for name, values in sorted(call.query.items()))
        version, now = self.control.version(), datetime.now(UTC)
        kept = self._lists.get(asked)
        if kept is not None and kept[0] == version and now < kept[1]:
            return kept[2]
        until = now + LIST_LASTS
        content = orjson.dumps(self._listed(call))
        ticks = [dag.next_tick(now) for dag in self.control.catalog().dags.values()]
        if len(self._lists) >= LISTS_KEPT:
            self._lists.clear()
        self._lists[asked] = version, min([until, *(tick for tick in ticks if tick is not None)]), content
        return content

    def _listed(self, call: Call) -> dict[str, Any]:
        limit, offset = call.page()
        order = call.order(("dag_id",), "dag_id")
        fields = _fields(call, DAG_FIELDS, "DAGCollectionSchema error")
        wanted = self._select(
            call.text("dag_id_pattern"),
            call.texts("tags"),
            call.boolean("paused"),
            call.boolean("only_active", True),
        )
        wanted.sort(key=lambda dag: dag.dag_id, reverse=order.startswith("-"))
        page = wanted[offset : offset + limit]
        return {"dags": [_only(one, fields) for one in self._show_all(page)], "total_entries": len(wanted)}

    def get_dag(self, call: Call) -> dict[str, Any]:
        """``GET /dags/{dag_id}``."""
        fields = _fields(call, DAG_FIELDS, "DAGSchema init error")
        return _only(self._show_all([self._dag(call)])[0], fields)

    def get_dag_details(self, call: Call) -> dict[str, Any]:
        """``GET /dags/{dag_id}/details``."""
        fields = _fields(call, (*DAG_FIELDS, *_DETAIL_FIELDS), "DAGDetailSchema init error")
        dag = self._dag(call)
        shown = self._show_all([dag])[0]
        loaded = show_time(self.control.catalog().loaded_at)
        shown |= {
            "timezone": dag.timezone, "catchup": False, "orientation": "LR", "concurrency": 16,
            "start_date": show_time(_start_date(self.control.catalog().loaded_at)), "end_date": None,
            "dag_run_timeout": None, "dataset_expression": None, "doc_md": dag.description or None, "params": {},
            "is_paused_upon_creation": None, "last_parsed": loaded, "template_search_path": None,
            "render_template_as_native_obj": False,
        }  # fmt: skip
        return _only(shown, fields)

    def patch_dag(self, call: Call) -> dict[str, Any]:
        """``PATCH /dags/{dag_id}``."""
        paused = _paused(call)
        try:
            dag = self.control.dag(call.path["dag_id"])
        except UnknownError:
            raise not_found(f"Dag with id: '{call.path['dag_id']}' not found") from None
        self.control.set_paused(dag, paused)
        return self._show_all([dag])[0]

    def patch_dags(self, call: Call) -> dict[str, Any]:
        """``PATCH /dags``."""
        limit, offset = call.page()
        if call.text("dag_id_pattern") is None:
            raise bad_request("Missing query parameter 'dag_id_pattern'")
        pattern = "" if call.text("dag_id_pattern") == "~" else call.text("dag_id_pattern")
        paused = _paused(call)
        wanted = self._select(pattern, call.texts("tags"), None, call.boolean("only_active", True))
        page = wanted[offset : offset + limit]
        for dag in page:
            self.control.set_paused(dag, paused)
        return {"dags": self._show_all(page), "total_entries": len(wanted)}

    def delete_dag(self, call: Call) -> None:
        """``DELETE /dags/{dag_id}``: its runs go, and as in Airflow the DAG is there again while its code is."""
        dag_id = call.path["dag_id"]
        try:
            self.control.dag(dag_id)
        except UnknownError:
            raise not_found(f"Dag with id: '{dag_id}' not found") from None
        active, _ = self.control.runs.list_runs(RunFilter(dag_ids=[dag_id], states=["running"]), limit=1)
        if active:
            raise conflict(f"Task instances of dag with id: '{dag_id}' are still running")
        while True:
            runs, _ = self.control.runs.list_runs(RunFilter(dag_ids=[dag_id]), limit=MAXIMUM_LIMIT)
            if not runs:
                return
            for run in runs:
                self.control.delete(run)

    def get_tasks(self, call: Call) -> dict[str, Any]:
        """``GET /dags/{dag_id}/tasks``."""
        dag = self._dag(call, "DAG not found", None)
        order = (call.text("order_by") or "task_id").lstrip("-")
        shown = [self._task(dag, task) for task in dag.tasks.values()]
        if order not in shown[0] or isinstance(shown[0][order], dict | list):
            raise bad_request(f"'Operator' object has no attribute '{order}'")
        shown.sort(
            key=lambda task: (task[order] is not None, task[order]),
            reverse=(call.text("order_by") or "").startswith("-"),
        )
        return {"tasks": shown, "total_entries": len(shown)}

    def get_task(self, call: Call) -> dict[str, Any]:
        """``GET /dags/{dag_id}/tasks/{task_id}``."""
        dag = self._dag(call, "DAG not found", None)
        found = dag.tasks.get(call.path["task_id"])
        if found is None:
            raise not_found("Task not found")
        return self._task(dag, found)

    def get_dag_source(self, call: Call) -> Any:
        """``GET /dagSources/{file_token}``: text, or JSON when asked for it."""
        dag = self._of_token(call.path["file_token"], "Dag source not found")
        text = source_of(dag)
        accept = call.accept or "*/*"
        if "text/plain" in accept or ("*/*" in accept and "application/json" not in accept):
            return text
        if "application/json" in accept or "*/*" in accept:
            return {"content": text}
        raise Problem(406)

    def reparse_dag_file(self, call: Call) -> None:
        """``PUT /parseDagFile/{file_token}``: load the code location of the DAG again."""
        dag = self._of_token(call.path["file_token"], "File not found")
        self.control.reload(dag.location)

    # --- parts ------------------------------------------------------------------------------------------------------

    def _dag(self, call: Call, title: str = "DAG not found", detail: str | None = "") -> Dag:
        try:
            return self.control.dag(call.path["dag_id"])
        except UnknownError as error:
            raise not_found(title, str(error) if detail == "" else detail) from None

    def _of_token(self, token: str, title: str) -> Dag:
        try:
            dag_id = base64.urlsafe_b64decode(token + "=" * (-len(token) % 4)).decode()
            return self.control.dag(dag_id)
        except (UnknownError, ValueError, binascii.Error):
            raise not_found(title) from None

    def _select(
        self, pattern: str | None, tags: Sequence[str], paused: bool | None, only_active: bool | None
    ) -> list[Dag]:
        dags: Iterable[Dag] = self.control.catalog().dags.values()
        if pattern:
            matches = _like(pattern)
            dags = [dag for dag in dags if matches(dag.dag_id)]
        if tags:
            dags = [dag for dag in dags if set(tags) & set(dag.tags)]
        found = list(dags)
        if paused is not None:
            switches = self.control.switches(found)
            found = [dag for dag in found if switches[dag.dag_id].paused == paused]
        return sorted(found, key=lambda dag: dag.dag_id)

    def _show_all(self, dags: Sequence[Dag]) -> list[dict[str, Any]]:
        switches = self.control.switches(dags)
        catalog = self.control.catalog()
        return [show_dag(dag, switches[dag.dag_id], catalog.loaded_at) for dag in dags]

    def _task(self, dag: Dag, task: Task) -> dict[str, Any]:
        kind = "EmptyOperator" if task.step is None else "PythonOperator"
        module = "airflow.operators.empty" if task.step is None else "airflow.operators.python"
        return {
            "class_ref": {"class_name": kind, "module_path": module},
            "depends_on_past": False,
            "doc_md": task.description or None,
            "downstream_task_ids": list(task.downstream),
            "end_date": None,
            "execution_timeout": None,
            "executor": None,
            "extra_links": [],
            "is_mapped": False,
            "operator_name": kind,
            "owner": dag.owners[0],
            "params": {},
            "pool": task.pool,
            "pool_slots": 1.0,
            "priority_weight": 1.0,
            "queue": "default",
            "retries": float(task.retries),
            "retry_delay": time_delta(timedelta(seconds=task.retry_delay_seconds)),
            "retry_exponential_backoff": False,
            "start_date": show_time(_start_date(self.control.catalog().loaded_at)),
            "task_display_name": task.task_id,
            "task_id": task.task_id,
            "template_fields": [],
            "trigger_rule": task.trigger_rule,
            "ui_color": "#e8f7e4" if task.step is None else "#ffefeb",
            "ui_fgcolor": "#000",
            "wait_for_downstream": False,
            "weight_rule": "downstream",
        }


_DETAIL_FIELDS = (
    "timezone", "catchup", "orientation", "concurrency", "start_date", "end_date", "dag_run_timeout",
    "dataset_expression", "doc_md", "params", "is_paused_upon_creation", "last_parsed", "template_search_path",
    "render_template_as_native_obj",
)  # fmt: skip


def show_dag(dag: Dag, switch: Switch, loaded_at: datetime) -> dict[str, Any]:
    """Return a DAG as the API shows it."""
    tick = switch.next_tick
    start, end = dag.interval_before(tick) if tick is not None else (None, None)
    return {
        "dag_id": dag.dag_id,
        "dag_display_name": dag.dag_id,
        "root_dag_id": None,
        "is_paused": switch.paused,
        "is_active": True,
        "is_subdag": False,
        "last_parsed_time": show_time(loaded_at),
        "last_pickled": None,
        "last_expired": None,
        "scheduler_lock": None,
        "pickle_id": None,
        "default_view": "grid",
        "fileloc": dag.fileloc or f"{dag.location}/{dag.dag_id}.py",
        "file_token": file_token(dag),
        "owners": list(dag.owners),
        "description": dag.description,
        "schedule_interval": schedule_interval(dag),
        "timetable_description": _described(dag),
        "tags": [{"name": tag} for tag in dag.tags],
        "max_active_tasks": 16,
        "max_active_runs": dag.max_active_runs,
        "max_consecutive_failed_dag_runs": 0,
        "has_task_concurrency_limits": False,
        "has_import_errors": False,
        "next_dagrun": show_time(start),
        "next_dagrun_data_interval_start": show_time(start),
        "next_dagrun_data_interval_end": show_time(end),
        "next_dagrun_create_after": show_time(tick),
    }


def file_token(dag: Dag) -> str:
    """Return the token by which the source of a DAG is asked for."""
    return base64.urlsafe_b64encode(dag.dag_id.encode()).decode().rstrip("=")


def schedule_interval(dag: Dag) -> dict[str, Any] | None:
    """Return the schedule: a time delta where the Airflow deployment had one, else the cron expression."""
    if dag.cron is None:
        return None
    if dag.dag_id in _CONTRACT:
        first = dag.next_tick(datetime(2026, 1, 1, tzinfo=UTC))
        second = dag.next_tick(first) if first else None
        if first and second:
            return time_delta(second - first)
    return {"__type": "CronExpression", "value": dag.cron}


def time_delta(span: timedelta) -> dict[str, Any]:
    """Return a span as Airflow writes it."""
    return {
        "__type": "TimeDelta",
        "days": span.days,
        "seconds": span.seconds,
        "microseconds": span.microseconds,
    }


def source_of(dag: Dag) -> str:
    """Return the code of a DAG's assets: where each task's is, with links into the Dagster UI, then file by file.

    A note stands for a file that is on another machine.
    """
    lines = [f"# {dag.dag_id}: {dag.description}", "#"]
    for task in dag.tasks.values():
        if task.step is not None:
            where = f"{_short(task.code[0])}:{task.code[1]}" if task.code else f"code location {dag.location}"
            lines.append(f"# {task.task_id}  {where}")
            lines += [f"#   /dagster/assets/{asset}" for asset in task.assets]
    parts = ["\n".join(lines)]
    for name in dag.files:
        try:
            parts.append(f"# --- {_short(name)} ---\n{Path(name).read_text(encoding='utf-8')}")
        except OSError:
            parts.append(f"# --- {_short(name)} --- is on the machine of the code location {dag.location}")
    return "\n\n".join(parts) + "\n"


def _short(file: str) -> str:
    return "/".join(Path(file).parts[-3:])


def _described(dag: Dag) -> str:
    if dag.cron is None:
        return "Never, external triggers only"
    return "" if dag.dag_id in _CONTRACT else f"At {dag.cron}"


def _start_date(loaded: datetime) -> datetime:
    """The Airflow deployment set the start date to the day before the files were parsed."""
    return loaded.astimezone(UTC).replace(hour=0, minute=0, second=0, microsecond=0) - timedelta(days=1)


def _paused(call: Call) -> bool:
    body = Body(call.body())
    mask = call.texts("update_mask")
    if mask and mask != ["is_paused"]:
        raise bad_request("Only `is_paused` field can be updated through the REST API")
    read_only = {name: ["Unknown field."] for name in body.values if name in DAG_FIELDS and name != "is_paused"}
    unknown = {name: ["Unknown field."] for name in body.values if name not in DAG_FIELDS}
    if unknown or (read_only and not mask):
        raise bad_request(str(unknown or read_only))
    return body.boolean("is_paused", required=True)


def _like(pattern: str) -> Callable[[str], bool]:
    """Match as SQL's ILIKE with ``%`` around the pattern does."""
    import re

    expression = "".join(".*" if c == "%" else "." if c == "_" else re.escape(c) for c in pattern)
    compiled = re.compile(expression, re.IGNORECASE | re.DOTALL)
    return lambda text: compiled.search(text) is not None


def _fields(call: Call, known: Sequence[str], title: str) -> list[str]:
    wanted = call.texts("fields")
    unknown = sorted(set(wanted) - set(known))
    if unknown:
        raise bad_request(f"Invalid fields: {', '.join(unknown)}", title)
    return wanted


def _only(shown: dict[str, Any], fields: Sequence[str]) -> dict[str, Any]:
    return {name: value for name, value in shown.items() if name in fields} if fields else shown
