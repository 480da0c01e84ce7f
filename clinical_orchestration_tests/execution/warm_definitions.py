"""A code location for runs that are started warm: jobs that succeed, wait, crash, or say what they found."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import dagster as dg

LOADED = frozenset(sys.modules)
IN_PROCESS = dg.in_process_executor


@dg.op
def first() -> int:
    return 1


@dg.op
def second(number: int) -> int:
    return number + 1


@dg.op
def third(number: int) -> None:
    assert number == 2


@dg.job(executor_def=IN_PROCESS)
def three_steps() -> None:
    third(second(first()))


@dg.op(config_schema={"seconds": float, "stubborn": dg.Field(bool, default_value=False), "mark": str})
def wait(context: dg.OpExecutionContext) -> None:
    """Leave a mark, then wait until it may go or time is over; a stubborn one does not listen to interrupts."""
    mark = context.op_config["mark"]
    Path(mark).write_text(str(os.getpid()))
    end = time.monotonic() + context.op_config["seconds"]
    while time.monotonic() < end and not Path(f"{mark}.go").exists():
        try:
            time.sleep(0.02)
        except BaseException:
            if not context.op_config["stubborn"]:
                raise


@dg.job(executor_def=IN_PROCESS)
def waiting() -> None:
    wait()


@dg.op(config_schema={"how": str, "mark": str})
def die(context: dg.OpExecutionContext) -> None:
    """End this process, after it has started another one."""
    child = subprocess.Popen(["sleep", "600"])
    Path(context.op_config["mark"]).write_text(str(child.pid))
    how = context.op_config["how"]
    if how == "exit":
        os._exit(3)
    if how == "segfault":
        import ctypes

        ctypes.string_at(0)
    os.kill(os.getpid(), getattr(signal, how))


@dg.job(executor_def=IN_PROCESS)
def dying() -> None:
    die()


@dg.op
def look(context: dg.OpExecutionContext) -> None:
    """Say what this process has that it was not forked with, and what is its own."""
    import random

    from clinical_orchestration.execution import warm_up

    [warm] = warm_up.made
    engine = context.instance.event_log_storage._engine  # type: ignore[attr-defined]
    context.add_output_metadata(
        {
            "imported": sorted(set(sys.modules) - warm.modules),
            "compiled": len(engine._compiled_cache) - warm.compiled,
            "random": random.random(),
            "leads": os.getsid(0) == os.getpid(),
            "oom": int(Path("/proc/self/oom_score_adj").read_text()),
            "threads": [thread.name for thread in threading.enumerate()],
            "interrupt": signal.getsignal(signal.SIGTERM) is not signal.SIG_IGN,
        }
    )


@dg.job(executor_def=IN_PROCESS)
def looking() -> None:
    look()


@dg.asset(check_specs=[dg.AssetCheckSpec("fine", asset="thing")])
def thing() -> dg.MaterializeResult:  # type: ignore[type-arg]
    return dg.MaterializeResult(check_results=[dg.AssetCheckResult(passed=True)])


defs = dg.Definitions(
    assets=[thing],
    jobs=[three_steps, waiting, dying, looking, dg.define_asset_job("things", "*", executor_def=IN_PROCESS)],
)
