"""A code location with a step that talks while it runs; the test's own process runs it."""

import sys
import threading

import dagster as dg

began, go_on = threading.Event(), threading.Event()


@dg.op
def prepares() -> int:
    print("all is prepared")  # noqa: T201
    return 1


@dg.op
def talks(context: dg.OpExecutionContext, number: int) -> None:
    context.log.info("it talks %d", number)
    print("first words")  # noqa: T201
    print("a warning", file=sys.stderr)  # noqa: T201
    print("half", end="", flush=True)  # noqa: T201
    began.set()
    go_on.wait(30)
    print(" a line\nlast words", end="")  # noqa: T201


@dg.job(executor_def=dg.in_process_executor)
def talking() -> None:
    talks(prepares())


defs = dg.Definitions(jobs=[talking])
