"""Logs of task instances: the event log of their step, as lines of text."""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import json
import os
import secrets
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from clinical_orchestration.airflow.runs import TaskInstance
from clinical_orchestration.airflow.states import FINISHED

if TYPE_CHECKING:
    from dagster import EventLogRecord

    from clinical_orchestration.airflow.control import Control

_CHUNK = 1000
_LEVELS = {10: "DEBUG", 20: "INFO", 30: "WARNING", 40: "ERROR", 50: "CRITICAL"}


@dataclass(frozen=True)
class LogChunk:
    """Part of a log: `position` is where the next part begins, `finished` whether there will be no more."""

    host: str
    text: str
    position: int
    finished: bool


class LogReader:
    """Reads the logs of task instances from the event log of the instance."""

    def __init__(self, control: Control) -> None:
        self._control = control
        given = os.environ.get("CLINICAL_FERNET_KEY", "")
        # another process of the same deployment, or this one after a restart, takes the same tokens
        self._key = hashlib.sha256(b"log-token" + given.encode()).digest() if given else secrets.token_bytes(32)

    def read(self, task: TaskInstance, number: int, position: int = 0) -> LogChunk:
        """Return the log of one attempt from a position on; empty where there was no such attempt.

        Start and end markers have the events of the run itself that are of no step.
        """
        tries = [one for one in self._control.runs.tries(task.run, task.task_id) if one.number == number]
        if not tries:
            finished = task.run.state in FINISHED
            return LogChunk("", "" if position else f"*** No logs: attempt {number} did not take place.\n", 1, finished)
        one = tries[0]
        step = self._control.dag(task.run.dag_id).tasks[task.task_id].step
        attempt_in_run = sum(
            before.dagster_run_id == one.dagster_run_id and before.number <= number
            for before in self._control.runs.tries(task.run, task.task_id)
        )
        lines, last = [], position
        for record in self._records(one.dagster_run_id, position):
            last = record.storage_id
            if record.event_log_entry.step_key == step and (
                step is None or _attempt_at(record, one.start_date, one.end_date)
            ):
                lines += _lines(record)
        done = one.end_date is not None or attempt_in_run == 0
        return LogChunk(task.run.dagster_run_id[:8], "".join(lines), last, done)

    def token(self, position: int) -> str:
        """Return a signed token of a position."""
        body = json.dumps({"position": position}).encode()
        return ".".join((_encode(body), _encode(self._sign(body))))

    def position_of(self, token: str) -> int | None:
        """Return the position of a token; None where it was not made here."""
        try:
            body, signature = (base64.urlsafe_b64decode(part + "=" * (-len(part) % 4)) for part in token.split("."))
        except (ValueError, binascii.Error):
            return None
        if not hmac.compare_digest(signature, self._sign(body)):
            return None
        return int(json.loads(body)["position"])

    def _sign(self, body: bytes) -> bytes:
        return hmac.new(self._key, body, hashlib.sha256).digest()

    def _records(self, dagster_run: str, position: int) -> Iterable[EventLogRecord]:
        from dagster._core.event_api import EventLogCursor

        cursor = EventLogCursor.from_storage_id(position).to_string() if position else None
        instance = self._control.instance()
        while True:
            found = instance.get_records_for_run(dagster_run, cursor=cursor, limit=_CHUNK)
            yield from found.records
            if not found.has_more:
                return
            cursor = found.cursor


def _attempt_at(record: EventLogRecord, start: datetime | None, end: datetime | None) -> bool:
    at = datetime.fromtimestamp(record.event_log_entry.timestamp, UTC)
    # what is said of a step before it starts belongs to its first attempt
    return (start is None or at >= start or (start - at).total_seconds() < 0.05) and (end is None or at <= end)


def _lines(record: EventLogRecord) -> list[str]:
    entry = record.event_log_entry
    level = _LEVELS.get(entry.level if isinstance(entry.level, int) else 20, "INFO")
    at = datetime.fromtimestamp(entry.timestamp, UTC).strftime("%Y-%m-%dT%H:%M:%S.%f")[:-3] + "+0000"
    event = entry.dagster_event
    kind = event.event_type_value if event is not None else "log"
    message = (event.message if event is not None else entry.user_message) or ""
    lines = [f"[{at}] {{{kind}}} {level} - {message}\n"]
    error = _error(event)
    if error is not None:
        lines.append(error.to_string().rstrip() + "\n")
    return lines


def _error(event: Any) -> Any:
    data = getattr(event, "event_specific_data", None)
    return getattr(data, "error", None)


def _encode(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).decode().rstrip("=")
