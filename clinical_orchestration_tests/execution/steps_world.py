"""Small jobs for the tests of forked steps, and a run worker that runs them.

It is started by `python -m ... <folder of the instance> [module of the definitions]`.

The worker reads a job's name and its configuration, or the id of a run to resume, from each line of its input, and
answers with the run's id when it has made the run and with the state the run ended in.
"""

import ctypes
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dagster as dg

from clinical_orchestration.execution.steps import forked_executor

EXECUTOR = forked_executor.configured({"max_concurrent": 3, "seconds_to_stop": 1.0})


def note(context: Any, text: str) -> None:
    """Write a line that outlives the process: who says what."""
    folder = Path(os.environ["STEPS_NOTES"])
    with (folder / context.run_id).open("a") as notes:
        notes.write(f"{context.op.name} {text}\n")


@dg.op
def nothing() -> None:
    """Do nothing."""


@dg.op(ins={"after": dg.In(dg.Nothing)})
def then() -> None:
    """Do nothing, afterwards."""


@dg.job(executor_def=EXECUTOR)
def chain() -> None:
    """Five steps one after the other."""
    done = nothing()
    for number in range(4):
        done = then.alias(f"then_{number}")(done)


@dg.op
def meets(context: dg.OpExecutionContext) -> int:
    """Wait for another step that runs at the same time."""
    folder = Path(os.environ["STEPS_NOTES"])
    (folder / f"{context.run_id}-{context.op_handle.name}").touch()
    deadline = time.monotonic() + 10
    while len(list(folder.glob(f"{context.run_id}-*"))) < 2:
        if time.monotonic() > deadline:
            raise RuntimeError("nobody came")
        time.sleep(0.005)
    return os.getpid()


@dg.op
def counts(context: dg.OpExecutionContext, pids: list[int]) -> None:
    """Tell the processes."""
    context.log.info("processes %s", len({os.getpid(), os.getppid(), *pids}))


@dg.job(executor_def=EXECUTOR)
def meeting() -> None:
    """Two steps at the same time."""
    counts([meets.alias("left")(), meets.alias("right")()])


@dg.op(config_schema={"how": str})
def dies(context: dg.OpExecutionContext) -> None:
    """End in the way that the configuration names."""
    context.log.info("these are its last words")
    how = context.op_config["how"]
    if how == "segfault":
        ctypes.string_at(0)
    elif how == "exit":
        os._exit(7)
    elif how == "raise":
        raise ValueError("it was wrong")
    else:
        os.kill(os.getpid(), getattr(signal, how))


@dg.job(executor_def=EXECUTOR)
def deadly() -> None:
    """A step that dies, one that waits for it and one that does not."""
    then(dies())
    nothing()


@dg.op(retry_policy=dg.RetryPolicy(max_retries=2))
def dies_once(context: dg.OpExecutionContext) -> int:
    """Die at the first attempt."""
    if context.retry_number == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return context.retry_number


@dg.op
def asks_again(context: dg.OpExecutionContext, before: int) -> None:
    """Ask to be tried again."""
    if context.retry_number < 2:
        raise dg.RetryRequested(max_retries=3, seconds_to_wait=0.05)
    context.log.info("attempts %s and %s", before, context.retry_number)


@dg.job(executor_def=EXECUTOR)
def retried() -> None:
    """Steps that succeed at a later attempt."""
    asks_again(dies_once())


@dg.op(config_schema={"deaf": bool})
def sleeps(context: dg.OpExecutionContext) -> None:
    """Sleep for long, with a process of its own; a deaf one does not stop when it is told."""
    child = subprocess.Popen(["sleep", "600"])
    note(context, f"{os.getpid()} {child.pid}")
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            time.sleep(5)
        except BaseException:
            if not context.op_config["deaf"]:
                note(context, "cleaned up")
                raise


@dg.job(executor_def=EXECUTOR)
def long() -> None:
    """A step that takes long."""
    sleeps()


@dg.op(pool="one_at_a_time")
def alone(context: dg.OpExecutionContext) -> None:
    """Be the only one."""
    folder = Path(os.environ["STEPS_NOTES"])
    place = folder / f"{context.run_id}-alone"
    place.touch(exist_ok=False)
    time.sleep(0.05)
    place.unlink()


@dg.job(executor_def=EXECUTOR)
def pooled() -> None:
    """Three steps that may not overlap."""
    for number in range(3):
        alone.alias(f"alone_{number}")()


class Counter(dg.ConfigurableResource):  # type: ignore[type-arg]
    """A resource that notes when it is made and given back."""

    start: int

    def setup_for_execution(self, context: dg.InitResourceContext) -> None:
        """Note it."""
        if self.start < 0:
            raise ValueError("a counter cannot start below zero")


@dg.op(out=dg.DynamicOut())
def parts(counter: Counter) -> Iterator[dg.DynamicOutput[int]]:
    """Give three parts."""
    for number in range(3):
        yield dg.DynamicOutput(counter.start + number, mapping_key=f"part_{number}")


@dg.op
def double(part: int) -> int:
    """Double it."""
    return part * 2


@dg.op
def total(context: dg.OpExecutionContext, found: list[int]) -> None:
    """Add them up."""
    context.log.info("total %s", sum(found))


@dg.job(executor_def=EXECUTOR, resource_defs={"counter": Counter(start=1)})
def dynamic() -> None:
    """Steps that are known when the run is under way."""
    total(parts().map(double).collect())


@dg.job(executor_def=EXECUTOR, resource_defs={"counter": Counter(start=-1)})
def no_resource() -> None:
    """A step whose resource cannot be made."""
    total(parts().map(double).collect())


@dg.op
def gives_random() -> tuple[float, float]:
    """Give random numbers."""
    import numpy as np

    return random.random(), float(np.random.random())


@dg.op
def differ(context: dg.OpExecutionContext, numbers: list[tuple[float, float]]) -> None:
    """Tell how many are different."""
    context.log.info("different %s", len({one for pair in numbers for one in pair}))


@dg.job(executor_def=EXECUTOR)
def chances() -> None:
    """Random numbers in three processes."""
    differ([gives_random.alias(f"random_{number}")() for number in range(3)])


@dg.op(config_schema={"until": str})
def talks(context: dg.OpExecutionContext) -> None:
    """Say something, wait for a file and die."""
    print(f"this is {context.run_id}")  # noqa: T201
    subprocess.run(["sh", "-c", "echo from a child >&2"], check=True)
    deadline = time.monotonic() + 20
    while not Path(context.op_config["until"]).exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    ctypes.string_at(0)


@dg.job(executor_def=EXECUTOR)
def talking() -> None:
    """A step whose output is read while it runs."""
    talks()


@dg.asset
def source() -> dg.MaterializeResult[None]:
    """An asset with a figure."""
    return dg.MaterializeResult(metadata={"rows": 3})


@dg.asset(deps=[source])
def copy(context: dg.AssetExecutionContext) -> dg.MaterializeResult[None]:
    """An asset that reads the event log while it is made: what came before, and what it said itself."""
    context.log.info("about to read")
    record = context.instance.get_latest_materialization_event(dg.AssetKey("source"))
    rows = record.asset_materialization.metadata["rows"].value if record and record.asset_materialization else None
    said = [entry for entry in context.instance.all_logs(context.run_id) if "about to read" in entry.user_message]
    return dg.MaterializeResult(metadata={"rows": rows, "said": len(said)})


@dg.asset_check(asset=copy, blocking=True)
def is_whole() -> dg.AssetCheckResult:
    """A check that does not pass."""
    return dg.AssetCheckResult(passed=False, metadata={"missing": 1})


@dg.asset(deps=[copy])
def never() -> None:
    """An asset behind a check that does not pass."""


DEFINITIONS = dg.Definitions(
    assets=[source, copy, never],
    asset_checks=[is_whole],
    jobs=[
        dg.define_asset_job("assets"),
        chain,
        meeting,
        deadly,
        retried,
        long,
        pooled,
        dynamic,
        no_resource,
        chances,
        talking,
    ],
    executor=EXECUTOR,
)


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def _work(folder: str, module: str) -> None:
    from dagster._core.definitions.reconstruct import ReconstructableRepository
    from dagster._core.execution.api import execute_run_iterator
    from dagster._utils.interrupts import setup_interrupt_handlers

    setup_interrupt_handlers()
    repository = ReconstructableRepository.for_module(module, "DEFINITIONS", str(Path(__file__).resolve().parents[2]))
    with dg.DagsterInstance.from_config(folder) as instance:
        _say("ready")
        for line in sys.stdin:
            name, config = json.loads(line)
            job = repository.get_reconstructable_job(name)
            again = instance.get_run_by_id(str(config))  # a run whose worker is gone
            run = again or instance.create_run_for_job(
                job.get_definition(), run_config=config, job_code_origin=job.get_python_origin()
            )
            _say(run.run_id)
            for _ in execute_run_iterator(job, run, instance, resume_from_failure=again is not None):
                pass
            ended = instance.get_run_by_id(run.run_id)
            _say(ended.status.value if ended else "gone")


if __name__ == "__main__":
    _work(sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else "clinical_orchestration_tests.execution.steps_world")
