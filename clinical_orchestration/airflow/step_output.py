"""What a step printed, from the files that Dagster captured it in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from dagster import DagsterEventType

if TYPE_CHECKING:
    from dagster import DagsterInstance

    from clinical_orchestration.airflow.runs import TaskTry

_PAGE = 1000


@dataclass(frozen=True)
class OutputPosition:
    """How much of a capture was read.

    Attributes:
        capture: name of its files; empty before there are any.
        stdout: bytes read of one stream.
        stderr: bytes read of the other.
        titled: whether something was shown.
        complete: whether all of the attempt was read.
    """

    capture: str = ""
    stdout: int = 0
    stderr: int = 0
    titled: bool = False
    complete: bool = False


def read_output(
    instance: DagsterInstance, step: str, attempt: TaskTry, position: OutputPosition, most: int | None, ended: bool
) -> tuple[list[str], OutputPosition]:
    """Return the lines that an attempt at a step printed since a position, and the next position.

    Steps that share a process share its output; then it is given whole, and a line says so.

    Args:
        instance: knows where the output is.
        step: key of the step.
        attempt: the attempt at it.
        position: where to begin.
        most: bytes of each stream to read at the most; None for all.
        ended: whether the attempt writes no more; else a line that has no end yet waits.
    """
    if position.complete or attempt.start_date is None:
        return [], position
    found = _capture(instance, attempt.dagster_run_id, step, attempt.start_date.timestamp())
    if found is None:
        return [], position
    name, others = found
    if position.capture != name:
        position = OutputPosition(name)
    manager = instance.compute_log_manager
    try:
        data = manager.get_log_data(
            manager.build_log_key_for_run(attempt.dagster_run_id, name),
            manager.build_cursor(position.stdout, position.stderr),
            most,
        )
    except Exception as error:  # whatever holds the files says
        return [f"*** The output of this task cannot be read: {type(error).__name__}\n"], position
    lines: list[str] = []
    ends = []
    whole = True
    for stream, start, printed in (
        ("stdout", position.stdout, data.stdout or b""),
        ("stderr", position.stderr, data.stderr or b""),
    ):
        full = most is not None and len(printed) >= most
        whole = whole and not full
        if not ended or full:
            printed = printed[: printed.rfind(b"\n") + 1] or (printed if full else b"")
        ends.append(start + len(printed))
        lines += [
            f"[{stream}] {line}\n"
            for line in printed.decode(errors="replace").splitlines()
            if f" - {attempt.dagster_run_id} - " not in line  # Dagster prints events, too, which are in the log already
        ]
    if lines and others and not position.titled:
        lines.insert(0, f"*** Output of the process that also ran: {', '.join(others)}\n")
    return lines, OutputPosition(name, ends[0], ends[1], position.titled or bool(lines), ended and whole)


def _capture(instance: DagsterInstance, run: str, step: str, started: float) -> tuple[str, list[str]] | None:
    """Return the capture that an attempt began in, and which other steps it has; None where there is none yet."""
    found, cursor, more = None, None, True
    while more:
        page = instance.get_records_for_run(run, cursor, DagsterEventType.LOGS_CAPTURED, _PAGE)
        for record in page.records:
            event = record.event_log_entry.dagster_event
            if event is None or record.event_log_entry.timestamp > started:
                continue
            data = event.logs_captured_data
            if step in data.step_keys:
                found = data.file_key, [key for key in data.step_keys if key != step]
        cursor, more = page.cursor, page.has_more
    return found
