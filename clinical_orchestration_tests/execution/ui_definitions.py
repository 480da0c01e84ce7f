"""A code location for what people do in the Dagster UI: one graph, with forked steps and in the run's process."""

import os
import sys
import time
from pathlib import Path

import dagster as dg

from clinical_orchestration.execution.steps import forked_executor


@dg.op
def before() -> int:
    return 1


@dg.op(config_schema={"folder": str})
def works(context: dg.OpExecutionContext, number: int) -> int:
    """Say something, leave a mark, go on when it is told, and end as it is told."""
    folder = Path(context.op_config["folder"])
    print("it has begun")  # noqa: T201
    print("this is a warning", file=sys.stderr)  # noqa: T201
    context.log.info("it works")
    (folder / "mark").write_text(str(os.getpid()))
    while not (folder / "go").exists():
        time.sleep(0.02)
    print("it goes on")  # noqa: T201
    if (folder / "go").read_text() == "fail":
        raise ValueError("it was told to fail")
    return number + 1


@dg.op
def after(number: int) -> None:
    assert number == 2


@dg.op
def beside() -> None: ...


@dg.graph
def working() -> None:
    after(works(before()))
    beside()


defs = dg.Definitions(
    jobs=[
        working.to_job("forked", executor_def=forked_executor.configured({"max_concurrent": 2})),
        working.to_job("in_process", executor_def=dg.in_process_executor),
    ]
)
