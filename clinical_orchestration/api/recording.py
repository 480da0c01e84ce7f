"""Which operations change something, and what of them goes into the audit trail."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import orjson

from clinical_orchestration.api.call import Call
from clinical_orchestration.audit import recording
from clinical_orchestration.audit.trail import AuditEntry

if TYPE_CHECKING:
    from clinical_orchestration.api.app import Operation

# Airflow names these by the resource; all others by the operation
_EVENTS = {
    "post_connection": "connection.create", "patch_connection": "connection.edit",
    "delete_connection": "connection.delete", "post_variables": "variable.create",
    "patch_variable": "variable.edit", "delete_variable": "variable.delete",
}  # fmt: skip
_CONNECTION = ("conn_type", "description", "host", "login", "schema", "port", "extra")
_POOL = ("name", "slots", "description", "include_deferred")
_USER = ("username", "email", "roles")
_VARIABLE = ("key", "value", "description")
# the operation that reads what another one changes, and the fields that this may change
_BEFORE: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "patch_dag": ("get_dag", ("is_paused",)),
    "delete_dag": ("get_dag", ("is_paused",)),
    "update_dag_run_state": ("get_dag_run", ("state",)),
    "clear_dag_run": ("get_dag_run", ("state",)),
    "delete_dag_run": ("get_dag_run", ("state", "logical_date", "conf", "note")),
    "set_dag_run_note": ("get_dag_run", ("note",)),
    "patch_task_instance": ("get_task_instance", ("state",)),
    "set_task_instance_note": ("get_task_instance", ("note",)),
    "patch_connection": ("get_connection", _CONNECTION),
    "delete_connection": ("get_connection", _CONNECTION),
    "post_variables": ("get_variable", _VARIABLE),
    "patch_variable": ("get_variable", _VARIABLE),
    "delete_variable": ("get_variable", _VARIABLE),
    "patch_pool": ("get_pool", _POOL),
    "delete_pool": ("get_pool", _POOL),
    "patch_user": ("get_user", _USER),
    "delete_user": ("get_user", _USER),
    "patch_role": ("get_role", ("actions",)),
    "delete_role": ("get_role", ("actions",)),
}
_COLUMNS = {"dag_id": "dag_id", "dag_run_id": "run_id", "task_id": "task_id"}
_NUMBERS = {"map_index": "map_index", "task_try_number": "try_number"}


def changes(operation: Operation) -> bool:
    """Return whether an operation is for changing something; lists that take their filters as a body are not."""
    return operation.method != "GET" and not operation.name.startswith("get_")


class ChangeLog:
    """Records the changes of the API.

    Args:
        trail: what they go to.
        handler: returns an operation's handler by the operation's name.
    """

    def __init__(self, trail: recording.Recorder, handler: Callable[[str], Callable[[Call], Any]]) -> None:
        self._trail = trail
        self._handler = handler

    def run(self, operation: Operation, call: Call) -> Any:
        """Carry out an operation and record it; return its answer.

        Raises:
            clinical_orchestration.audit.trail.AuditError: it cannot be recorded and was not carried out.
        """
        entry = replace(self._entry(operation, call), old=self._before(operation, call))
        with recording.change(self._trail, entry) as ending:
            answer = self._handler(operation.name)(call)
            if isinstance(answer, dict) and isinstance(answer.get("dag_run_id"), str):
                ending.run_id = answer["dag_run_id"]
        return answer

    def refused(self, operation: Operation, call: Call, status: int) -> None:
        """Record that somebody may not do this."""
        entry = self._entry(operation, call)
        recording.refused(self._trail, replace(entry, extra={**entry.extra, "status": status}))

    def _entry(self, operation: Operation, call: Call) -> AuditEntry:
        columns: dict[str, Any] = {_COLUMNS[name]: value for name, value in call.path.items() if name in _COLUMNS}
        columns |= {
            _NUMBERS[name]: int(value)
            for name, value in call.path.items()
            if name in _NUMBERS and re.fullmatch(r"-?[0-9]{1,9}", value)
        }
        new = _body(call)
        if columns.get("run_id") is None and isinstance(new, dict) and isinstance(new.get("dag_run_id"), str):
            columns["run_id"] = new["dag_run_id"]
        extra: dict[str, Any] = {"operation": operation.name}
        rest = {name: value for name, value in call.path.items() if name not in _COLUMNS}
        return AuditEntry(
            _EVENTS.get(operation.name, operation.name),
            call.user,
            call.origin,
            address=call.client,
            new=_public(operation.name, new),
            extra=extra | ({"path": rest} if rest else {}) | ({"query": dict(call.query)} if call.query else {}),
            **columns,
        )

    def _before(self, operation: Operation, call: Call) -> Any:
        with contextlib.suppress(Exception):  # what is not there has no old value; the operation itself will say so
            if operation.name == "patch_dags":
                return {
                    dag["dag_id"]: dag["is_paused"] for dag in orjson.loads(self._handler("get_dags")(call))["dags"]
                }
            if operation.name in _BEFORE:
                reader, names = _BEFORE[operation.name]
                asked = call
                if operation.name == "post_variables":
                    asked = replace(call, path={"variable_key": str(call.body().get("key"))})
                found = self._handler(reader)(asked)
                return _public(operation.name, {name: found[name] for name in names})
        return None


def _body(call: Call) -> Any:
    try:
        return orjson.loads(call.content) if call.content else None
    except ValueError:
        return None  # such a body is refused


def _public(operation: str, values: Any) -> Any:
    if isinstance(values, dict) and "connection" in operation:
        return recording.connection_value(values)
    if isinstance(values, dict) and "variable" in operation:
        return recording.variable_value(values)
    return values
