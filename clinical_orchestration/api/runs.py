"""DAG runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from clinical_orchestration.airflow.control import ConflictError, Control, RefusedError, UnknownError
from clinical_orchestration.airflow.runs import DagRun, RunFilter, TaskFilter
from clinical_orchestration.airflow.states import FINISHED
from clinical_orchestration.api.call import FALLBACK_LIMIT, MAXIMUM_LIMIT, Body, Call, show_time
from clinical_orchestration.api.problems import bad_request, conflict, not_found

RUN_FIELDS = (
    "conf", "dag_id", "dag_run_id", "data_interval_end", "data_interval_start", "end_date", "execution_date",
    "external_trigger", "last_scheduling_decision", "logical_date", "note", "run_type", "start_date", "state",
)  # fmt: skip
_ORDER = (
    "id", "state", "dag_id", "execution_date", "dag_run_id", "start_date", "end_date", "updated_at",
    "external_trigger", "conf",
)  # fmt: skip
_RANGES = ("execution_date", "start_date", "end_date")
RUN_STATES = ("queued", "running", "success", "failed")


class RunRoutes:
    """Handlers of DAG runs, named by Airflow's operation ids."""

    def __init__(self, control: Control) -> None:
        self.control = control

    def get_dag_runs(self, call: Call) -> dict[str, Any]:
        """``GET /dags/{dag_id}/dagRuns``; ``~`` stands for all DAGs."""
        limit, offset = call.page()
        dag_id = call.path["dag_id"]
        wanted = RunFilter(
            dag_ids=None if dag_id == "~" else [dag_id],
            states=call.texts("state"),
            ranges=call.ranges(*_RANGES, "updated_at"),
        )
        fields = call.texts("fields")
        if set(fields) - set(RUN_FIELDS):
            raise bad_request(f"Invalid fields: {', '.join(sorted(set(fields) - set(RUN_FIELDS)))}", _COLLECTION_ERROR)
        runs, total = self.control.runs.list_runs(
            wanted, limit=limit, offset=offset, order_by=[call.order(_ORDER, "id")]
        )  # fmt: skip
        return {"dag_runs": [_only(show_run(run), fields) for run in runs], "total_entries": total}

    def get_dag_runs_batch(self, call: Call) -> dict[str, Any]:
        """``POST /dags/~/dagRuns/list``."""
        body = Body(call.body(), _BATCH)
        order = body.text("order_by", "id") or "id"
        if order.lstrip("-") not in _ORDER:
            raise bad_request(
                f"Ordering with '{order.lstrip('-')}' is disallowed or the attribute does not exist on the model"
            )
        limit, offset = page_of(body)
        runs, total = self.control.runs.list_runs(
            RunFilter(
                dag_ids=body.texts("dag_ids") or None,
                states=body.texts("states") or (),
                ranges=body.ranges(*_RANGES),
            ),
            limit=limit,
            offset=offset,
            order_by=[order],
        )
        return {"dag_runs": [show_run(run) for run in runs], "total_entries": total}

    def get_dag_run(self, call: Call) -> dict[str, Any]:
        """``GET /dags/{dag_id}/dagRuns/{dag_run_id}``."""
        run = self._run(call)
        fields = call.texts("fields")
        if set(fields) - set(RUN_FIELDS):
            raise bad_request(
                f"Invalid fields: {', '.join(sorted(set(fields) - set(RUN_FIELDS)))}", "DAGRunSchema error"
            )
        return _only(show_run(run), fields)

    def post_dag_run(self, call: Call) -> dict[str, Any]:
        """``POST /dags/{dag_id}/dagRuns``."""
        dag_id = call.path["dag_id"]
        try:
            dag = self.control.dag(dag_id)
        except UnknownError:
            raise not_found("DAG not found", f"DAG with dag_id: '{dag_id}' not found") from None
        body = Body(call.body(), (*_POSTED, *_READ_ONLY))
        read_only = [name for name in _READ_ONLY if name in body.values]
        if read_only:
            raise bad_request(str({name: ["Unknown field."] for name in read_only}))
        logical, execution = body.time("logical_date"), body.time("execution_date")
        if logical and execution and logical != execution:
            raise bad_request("logical_date conflicts with execution_date", None)
        start, end = body.time("data_interval_start"), body.time("data_interval_end")
        if (start is None) != (end is None):
            raise bad_request("Both 'data_interval_start' and 'data_interval_end' must be specified together")
        run_id = body.text("dag_run_id")
        if run_id is not None and (not run_id.strip() or len(run_id) > 250):
            raise bad_request(
                f"The run_id provided '{run_id[:80]}' does not match regex pattern '^[A-Za-z0-9_.~:+-]+$'"
            )
        note = body.text("note")
        if note is not None and len(note) > 1000:
            raise bad_request(str({"note": ["Longer than maximum length 1000."]}))
        try:
            run = self.control.trigger(
                dag,
                run_id=run_id,
                logical_date=logical or execution,
                interval=(start, end) if start and end else None,
                conf=body.mapping("conf"),
                note=note,
                user=call.user,
            )
        except ConflictError as error:
            raise conflict(str(error)) from None
        except RefusedError as error:
            raise bad_request(str(error)) from None
        return show_run(run)

    def update_dag_run_state(self, call: Call) -> dict[str, Any]:
        """``PATCH /dags/{dag_id}/dagRuns/{dag_run_id}``."""
        run = self._run(call, f"Dag Run id {call.path['dag_run_id']} not found in dag {call.path['dag_id']}")
        body = Body(call.body(), ("state",))
        state = body.text("state", required=True) or ""
        if state not in ("success", "failed", "queued"):
            raise bad_request(str({"state": ["Must be one of: success, failed, queued."]}))
        try:
            return show_run(self.control.set_run_state(run, state))
        except RefusedError as error:
            raise bad_request(str(error)) from None

    def clear_dag_run(self, call: Call) -> dict[str, Any]:
        """``POST /dags/{dag_id}/dagRuns/{dag_run_id}/clear``: the tasks that would be, or the run that is cleared."""
        run = self._run(call, f"Dag Run id {call.path['dag_run_id']} not found in dag   {call.path['dag_id']}")
        body = Body(call.body(), ("dry_run",))
        if body.boolean("dry_run", True):
            tasks, total = self.control.runs.list_tasks(
                TaskFilter(runs=RunFilter(dag_ids=[run.dag_id], run_ids=[run.run_id])), limit=10_000
            )
            from clinical_orchestration.api.tasks import show_reference

            return {"task_instances": [show_reference(task) for task in tasks], "total_entries": total}
        try:
            return show_run(self.control.clear(run))
        except RefusedError as error:
            raise bad_request(str(error)) from None

    def set_dag_run_note(self, call: Call) -> dict[str, Any]:
        """``PATCH /dags/{dag_id}/dagRuns/{dag_run_id}/setNote``."""
        run = self._run(call, f"Dag Run id {call.path['dag_run_id']} not found in dag {call.path['dag_id']}")
        self.control.set_note(run, note_of(call))
        return show_run(self.control.run(run.dag_id, run.run_id))

    def delete_dag_run(self, call: Call) -> None:
        """``DELETE /dags/{dag_id}/dagRuns/{dag_run_id}``."""
        self.control.delete(self._run(call, None))

    def get_dag_stats(self, call: Call) -> dict[str, Any]:
        """``GET /dagStats``."""
        wanted = call.texts("dag_ids")
        dags = [dag_id for dag_id in self.control.catalog().dags if not wanted or dag_id in wanted]
        counts = self.control.runs.counts(dags)
        return {
            "dags": [
                {
                    "dag_id": dag_id,
                    "stats": [{"state": state, "count": counts.get((dag_id, state), 0)} for state in RUN_STATES],
                }
                for dag_id in dags
            ],
            "total_entries": len(dags),
        }

    def _run(self, call: Call, title: str | None = "DAGRun not found") -> DagRun:
        try:
            return self.control.run(call.path["dag_id"], call.path["dag_run_id"])
        except UnknownError as error:
            raise not_found(title, str(error)) from None


_COLLECTION_ERROR = "DAGRunCollectionSchema error"
_POSTED = (
    "dag_run_id", "logical_date", "execution_date", "data_interval_start", "data_interval_end", "conf", "note",
)  # fmt: skip
_READ_ONLY = ("dag_id", "start_date", "end_date", "state", "external_trigger", "run_type", "last_scheduling_decision")
_BATCH = (
    "order_by", "page_offset", "page_limit", "dag_ids", "states", "execution_date_gte", "execution_date_lte",
    "start_date_gte", "start_date_lte", "end_date_gte", "end_date_lte",
)  # fmt: skip


def show_run(run: DagRun) -> dict[str, Any]:
    """Return a DAG run as the API shows it."""
    decided = run.end_date if run.state in FINISHED else run.updated_at if run.start_date else None
    return {
        "conf": run.conf,
        "dag_id": run.dag_id,
        "dag_run_id": run.run_id,
        "data_interval_end": show_time(run.data_interval_end),
        "data_interval_start": show_time(run.data_interval_start),
        "end_date": show_time(run.end_date),
        "execution_date": show_time(run.logical_date),
        "external_trigger": run.external_trigger,
        "last_scheduling_decision": show_time(decided),
        "logical_date": show_time(run.logical_date),
        "note": run.note,
        "run_type": run.run_type,
        "start_date": show_time(run.start_date),
        "state": run.state,
    }


def note_of(call: Call) -> str | None:
    """Return the note of a body that holds one.

    Raises:
        Problem: it is missing, too long or no text.
    """
    values = call.body()
    unknown = {name: ["Unknown field."] for name in values if name not in ("note", "map_index")}
    if unknown:
        raise bad_request(str(unknown))
    if "note" not in values:
        raise bad_request("'note' is a required property")
    note = values["note"]
    if note is not None and not isinstance(note, str):
        raise bad_request(f"{note!r} is not of type 'string' - 'note'")
    if note is not None and len(note) > 1000:
        raise bad_request(str({"note": ["Longer than maximum length 1000."]}))
    return note


def page_of(body: Body) -> tuple[int, int]:
    """Return limit and offset of a list form.

    Raises:
        Problem: one is out of range.
    """
    limit, offset = body.integer("page_limit", FALLBACK_LIMIT), body.integer("page_offset", 0)
    if limit is None or limit < 1:
        raise bad_request(str({"page_limit": ["Must be greater than or equal to 1."]}))
    if offset is None or offset < 0:
        raise bad_request(str({"page_offset": ["Must be greater than or equal to 0."]}))
    return min(limit, MAXIMUM_LIMIT), offset


def _only(shown: dict[str, Any], fields: Sequence[str]) -> dict[str, Any]:
    return {name: value for name, value in shown.items() if name in fields} if fields else shown
