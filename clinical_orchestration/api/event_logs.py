"""The audit trail as Airflow's event logs."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from clinical_orchestration.api.call import Call, show_time
from clinical_orchestration.api.problems import not_found
from clinical_orchestration.audit.trail import ORDERS, AuditTrail, Filter

if TYPE_CHECKING:
    from clinical_orchestration.audit.chain import Row

_COLUMNS = ("dag_id", "task_id", "run_id", "map_index", "try_number", "event")


class EventLogRoutes:
    """Handlers of event logs, named by Airflow's operation ids.

    Args:
        trail: None where nothing is recorded.
    """

    def __init__(self, trail: AuditTrail | None) -> None:
        self._trail = trail

    def get_event_logs(self, call: Call) -> dict[str, Any]:
        """``GET /eventLogs``."""
        limit, offset = call.page()
        order = call.order(tuple(ORDERS), "event_log_id")
        only = Filter(
            dag_id=call.text("dag_id") or None,
            task_id=call.text("task_id") or None,
            run_id=call.text("run_id") or None,
            map_index=call.integer("map_index"),
            try_number=call.integer("try_number"),
            who=call.text("owner") or None,
            event=call.text("event") or None,
            included=call.texts("included_events"),
            excluded=call.texts("excluded_events"),
            before=call.time("before"),
            after=call.time("after"),
        )
        rows, total = self._trail.page(only, order, limit, offset) if self._trail else ([], 0)
        return {"event_logs": [_show(row) for row in rows], "total_entries": total}

    def get_event_log(self, call: Call) -> dict[str, Any]:
        """``GET /eventLogs/{event_log_id}``."""
        number = call.path["event_log_id"]
        row = self._trail.row(int(number)) if self._trail and number.isascii() and number.isdigit() else None
        if row is None:
            raise not_found("Event Log not found")
        return _show(row)


def _show(row: Row) -> dict[str, Any]:
    details: dict[str, Any] = {"origin": row.origin, "address": row.address}
    for name in ("old", "new"):
        text = getattr(row, name)
        if text is not None:
            details[name] = json.loads(text)
    if row.extra is not None:
        details["details"] = json.loads(row.extra)
    return {
        "event_log_id": row.seq,
        "when": show_time(row.at),
        **{name: getattr(row, name) for name in _COLUMNS},
        "execution_date": None,
        "owner": row.who,
        "extra": json.dumps(details),
    }
