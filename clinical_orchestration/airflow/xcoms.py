"""XComs: what the assets of a task left in a run.

``return_value`` is the result that a step hands on: an object, or an object by asset where a step makes several. Every
asset's metadata stands under the asset's own key, with its types.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from clinical_orchestration.airflow.runs import DagRun

if TYPE_CHECKING:
    from clinical_orchestration.airflow.control import Control

RETURN_VALUE = "return_value"
_RESULT = "result"


@dataclass(frozen=True)
class XCom:
    """One value; `value` is JSON."""

    task_id: str
    key: str
    value: Any
    at: datetime


class XComReader:
    """Reads XComs from the materializations of a run."""

    def __init__(self, control: Control) -> None:
        self._control = control

    def entries(self, run: DagRun) -> list[XCom]:
        """Return the XComs of a run, in the order of its tasks; a later attempt replaces an earlier one."""
        from dagster import DagsterEventType

        dag = self._control.catalog().dags.get(run.dag_id)
        if dag is None:
            return []
        instance = self._control.instance()
        found: dict[str, dict[str, tuple[dict[str, Any], datetime]]] = {}
        for dagster_run in self._control.runs.attempts(run):
            if not instance.has_run(dagster_run):
                continue
            records = instance.get_records_for_run(
                dagster_run, of_type=DagsterEventType.ASSET_MATERIALIZATION, ascending=True
            ).records
            for record in records:
                entry = record.event_log_entry
                made = entry.asset_materialization
                task = dag.by_step.get(entry.step_key or "")
                if made is None or task is None:
                    continue
                values = {name: plain(value.value) for name, value in made.metadata.items()}
                at = datetime.fromtimestamp(entry.timestamp, UTC)
                found.setdefault(task.task_id, {})[made.asset_key.to_user_string()] = (values, at)
        entries = []
        for task_id in dag.tasks:
            assets = found.get(task_id)
            if not assets:
                continue
            results = {
                name: values[_RESULT] for name, (values, _) in assets.items() if isinstance(values.get(_RESULT), dict)
            }
            if results:
                value = next(iter(results.values())) if len(results) == 1 else results
                entries.append(XCom(task_id, RETURN_VALUE, value, max(at for _, at in assets.values())))
            entries += [
                XCom(task_id, name, {key: one for key, one in values.items() if key != _RESULT}, at)
                for name, (values, at) in assets.items()
            ]
        return entries


def plain(value: Any) -> Any:
    """Return a metadata value as JSON: text where JSON has no such type."""
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return value if value == value and abs(value) != float("inf") else str(value)
    if isinstance(value, dict):
        return {str(key): plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [plain(one) for one in value]
    return str(value)
