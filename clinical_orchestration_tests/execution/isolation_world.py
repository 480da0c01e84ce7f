"""Jobs whose steps choose where they run."""

import os
import signal

import dagster as dg

from clinical_orchestration.execution.isolation import EXECUTOR_TAG, FORKED, IN_PROCESS, runs_in
from clinical_orchestration.execution.steps import forked_executor
from clinical_orchestration_tests.execution.steps_world import note

EXECUTOR = forked_executor.configured({"max_concurrent": 3, "seconds_to_stop": 8.0}, name="forked")
CONTAINER = {"poll_seconds": 0.1, "health_seconds": 0.3, "seconds_to_stop": 8.0}

kept: list[str] = []
"""What steps in one process leave for one another."""


@dg.op(tags=runs_in(IN_PROCESS))
def keeps(context: dg.OpExecutionContext) -> int:
    kept.append(context.op_handle.name)
    context.log.info("%s in %d", " ".join(kept), os.getpid())
    return os.getpid()


@dg.op
def forked(context: dg.OpExecutionContext, pids: list[int]) -> int:
    context.log.info("forked in %d with %d", os.getpid(), len(kept))
    return os.getpid()


@dg.op(tags=runs_in(IN_PROCESS), retry_policy=dg.RetryPolicy(max_retries=1))
def dies_once(context: dg.OpExecutionContext, pid: int) -> int:
    if context.retry_number == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    context.log.info("%d kept in %d", len(kept), os.getpid())
    return os.getpid()


@dg.op(tags=runs_in(IN_PROCESS))
def sleeps(context: dg.OpExecutionContext, pid: int) -> None:
    import time

    note(context, f"{os.getpid()}")
    time.sleep(60)


@dg.op(tags=runs_in(FORKED))
def near() -> int:
    return os.getpid()


@dg.job(executor_def=EXECUTOR)
def mixed() -> None:
    dies_once(forked([keeps.alias("one")(), keeps.alias("two")()]))


@dg.job(executor_def=EXECUTOR)
def interrupted() -> None:
    sleeps(keeps())
    sleeps.alias("waits")(keeps.alias("other")())
    near()  # else all steps run in the worker itself


@dg.asset(tags=runs_in(IN_PROCESS))
def first() -> int:
    return os.getpid()


@dg.asset(op_tags=runs_in(IN_PROCESS))
def second(context: dg.AssetExecutionContext, first: int) -> None:
    context.log.info("processes %d %d", first, os.getpid())


@dg.asset(tags={EXECUTOR_TAG: "podman"})
def nowhere() -> None: ...


@dg.op(retry_policy=dg.RetryPolicy(max_retries=1))
def away(context: dg.OpExecutionContext, pid: int) -> int:
    """Die at the first attempt, as a container does that runs out of memory."""
    if context.retry_number == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    context.log.info("in %s, %s", os.environ.get("IMAGE"), os.environ.get("GREETING"))
    return pid


@dg.op(tags=runs_in(FORKED))
def back(context: dg.OpExecutionContext, pid: int) -> None:
    context.log.info("back from %s", os.environ.get("IMAGE", "nowhere"))


@dg.job(executor_def=forked_executor)
def contained() -> None:
    back(away(near()))


@dg.op
def stays(context: dg.OpExecutionContext) -> None:
    import time

    note(context, f"{os.getpid()} in {os.environ.get('IMAGE')}")
    time.sleep(60)


@dg.job(executor_def=forked_executor)
def staying() -> None:
    stays()


@dg.op
def waits(context: dg.OpExecutionContext, pid: int) -> int:
    """Go on when it is told."""
    import time
    from pathlib import Path

    note(context, f"{os.getpid()} in {os.environ.get('IMAGE')}")
    while not (Path(os.environ["STEPS_NOTES"]) / f"{context.run_id}-go").exists():
        time.sleep(0.05)
    return pid


@dg.job(executor_def=forked_executor)
def outliving() -> None:
    back(waits(near()))


DEFINITIONS = dg.Definitions(
    assets=[first, second, nowhere],
    jobs=[
        mixed,
        interrupted,
        contained,
        staying,
        outliving,
        dg.define_asset_job("together", [first, second], executor_def=EXECUTOR),
        dg.define_asset_job("unknown", [first, nowhere], executor_def=EXECUTOR),
    ],
)
