"""Jobs whose steps write down on disk what they do, so that nobody has to believe the event log.

A line is `begin|end step attempt pid worker`, in a file of its run: `worker` is the process that executes the run.
"""

import os
import time
from pathlib import Path
from typing import Any

import dagster as dg

from clinical_orchestration.execution.steps import forked_executor

NOTES = "CLINICAL_KILLS_NOTES"


def lines(place: Path) -> list[list[str]]:
    """Return what the steps of a run wrote down."""
    return [line.split() for line in place.read_text().splitlines()] if place.exists() else []


def _note(context: dg.OpExecutionContext, what: str, worker: int) -> None:
    line = f"{what} {context.op_handle.name} {context.retry_number} {os.getpid()} {worker}\n"
    with (Path(os.environ[NOTES]) / context.run_id).open("a") as notes:
        notes.write(line)


def _work(context: dg.OpExecutionContext, worker: int) -> None:
    _note(context, "begin", worker)
    time.sleep(context.op_config["seconds"])
    _note(context, "end", worker)


@dg.op(config_schema={"seconds": float}, ins={"after": dg.In(dg.Nothing)})
def works(context: dg.OpExecutionContext) -> None:
    """Take some time in the run's process."""
    _work(context, os.getpid())


@dg.op(config_schema={"seconds": float}, ins={"after": dg.In(dg.Nothing)}, retry_policy=dg.RetryPolicy(max_retries=1))
def works_apart(context: dg.OpExecutionContext) -> None:
    """Take some time in a process forked from the run's."""
    _work(context, os.getppid())


def _graph(op: Any) -> None:
    first = op.alias("first")()
    op.alias("last")([op.alias("left")(first), op.alias("right")(first)])


@dg.job(executor_def=dg.in_process_executor)
def in_process() -> None:
    """Four steps in the run's process."""
    _graph(works)


@dg.job(executor_def=forked_executor.configured({"max_concurrent": 2}))
def forked() -> None:
    """Four steps, two of them at the same time, in processes of their own; each is tried twice."""
    _graph(works_apart)


STEPS = ("first", "left", "right", "last")
defs = dg.Definitions(jobs=[in_process, forked])
