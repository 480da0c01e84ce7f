"""Logs of task instances: the events of their step, and what it printed, as lines of text."""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import json
import os
import secrets
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from clinical_orchestration.airflow.runs import TaskInstance
from clinical_orchestration.airflow.states import FINISHED
from clinical_orchestration.airflow.step_output import OutputPosition, read_output

if TYPE_CHECKING:
    from dagster import EventLogRecord

    from clinical_orchestration.airflow.control import Control

_CHUNK = 1000
_OUTPUT_BYTES = 1 << 20
_LEVELS = {10: "DEBUG", 20: "INFO", 30: "WARNING", 40: "ERROR", 50: "CRITICAL"}


@dataclass(frozen=True)
class LogPosition:
    """How much of a log was read: up to which event, by its number, and how much of the output."""

    event: int = 0
    output: OutputPosition = field(default_factory=OutputPosition)


@dataclass(frozen=True)
class LogChunk:
    """Part of a log: `position` is where the next part begins, `finished` whether there will be no more."""

    host: str
    text: str
    position: LogPosition
    finished: bool


class LogReader:
    """Reads the logs of task instances: the event log of the instance, and the output that it captured."""

    def __init__(self, control: Control) -> None:
        self._control = control
        given = os.environ.get("CLINICAL_FERNET_KEY", "")
        # another process of the same deployment, or this one after a restart, takes the same tokens
        self._key = hashlib.sha256(b"log-token" + given.encode()).digest() if given else secrets.token_bytes(32)

    def read(
        self, task: TaskInstance, number: int, position: LogPosition | None = None, *, whole: bool = False
    ) -> LogChunk:
        """Return the log of one attempt from a position on: events, then output; empty where there was no such attempt.

        Start and end markers have the events of the run itself that are of no step.

        Args:
            task: the task instance.
            number: which attempt, from 1.
            position: where to begin; None for the beginning.
            whole: all of the output, else at most a mebibyte of each stream.
        """
        begin = position or LogPosition()
        tries = {one.number: one for one in self._control.runs.tries(task.run, task.task_id)}
        one = tries.get(number)
        if one is None:
            text = "" if position else f"*** No logs: attempt {number} did not take place.\n"
            return LogChunk("", text, LogPosition(1), task.run.state in FINISHED)
        step = self._control.dag(task.run.dag_id).tasks[task.task_id].step
        before = tries.get(number - 1)
        after = before.end_date if before is not None and before.dagster_run_id == one.dagster_run_id else None
        lines, last = [], begin.event
        for record in self._records(one.dagster_run_id, begin.event):
            last = record.storage_id
            if record.event_log_entry.step_key == step and (step is None or _between(record, after, one.end_date)):
                lines += _lines(record)
        ended, output = one.end_date is not None, begin.output
        if step is not None:
            printed, output = read_output(
                self._control.instance(), step, one, output, None if whole else _OUTPUT_BYTES, ended
            )
            lines += printed
        done = ended and (step is None or output.complete or not output.capture)
        return LogChunk(task.run.dagster_run_id[:8], "".join(lines), LogPosition(last, output), done)

    def token(self, position: LogPosition) -> str:
        """Return a signed token of a position."""
        body = json.dumps({"position": position.event, "output": asdict(position.output)}).encode()
        return ".".join((_encode(body), _encode(self._sign(body))))

    def position_of(self, token: str) -> LogPosition | None:
        """Return the position of a token; None where it was not made here."""
        try:
            body, signature = (base64.urlsafe_b64decode(part + "=" * (-len(part) % 4)) for part in token.split("."))
        except (ValueError, binascii.Error):
            return None
        if not hmac.compare_digest(signature, self._sign(body)):
            return None
        said = json.loads(body)
        return LogPosition(int(said["position"]), OutputPosition(**said.get("output", {})))

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


def _between(record: EventLogRecord, after: datetime | None, end: datetime | None) -> bool:
    """Say whether an event is of an attempt: what is said of a step before it starts belongs to the attempt, too."""
    at = datetime.fromtimestamp(record.event_log_entry.timestamp, UTC)
    return (after is None or at > after) and (end is None or at <= end)


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
