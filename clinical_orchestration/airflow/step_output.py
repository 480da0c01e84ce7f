"""What a step printed, from the files that Dagster captured it in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from dagster import DagsterEventType

from clinical_orchestration.execution.compute_logs import DirectComputeLogManager

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

    Steps that share a process share its output. Where the manager of the output does not know which part is whose, it
    is given whole, and a line says so.

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
    key = manager.build_log_key_for_run(attempt.dagster_run_id, name)
    span = None
    try:
        if others and isinstance(manager, DirectComputeLogManager):
            span = manager.span_of(key, step, attempt.start_date.timestamp())
            if span is None and not ended:  # it is noted just after the start is stored
                return [], position
        starts = (position.stdout, position.stderr)
        if span is not None:
            starts = (max(starts[0], span.starts[0]), max(starts[1], span.starts[1]))
        data = manager.get_log_data(key, manager.build_cursor(*starts), most)
    except Exception as error:  # whatever holds the files says
        return [f"*** The output of this task cannot be read: {type(error).__name__}\n"], position
    lines: list[str] = []
    ends = []
    whole = True
    for stream, start, end, printed in zip(
        ("stdout", "stderr"),
        starts,
        span.ends if span is not None and span.ends is not None else (None, None),
        (data.stdout or b"", data.stderr or b""),
        strict=True,
    ):
        printed = printed if end is None else printed[: end - start]
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
    if lines and others and span is None and not position.titled:
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
