"""The code location of the benchmark: runs that do nothing, so that all of their time is the orchestrator's."""

from __future__ import annotations

import dagster as dg

from benchmarks.orchestration import MANY_STEPS, SCHEDULE
from clinical_orchestration.contract import CLINICAL_DATA_PIPELINE
from clinical_orchestration.execution.steps import forked_executor

EXECUTORS = {
    "in_process": dg.in_process_executor,
    "forked": forked_executor,
    "multiprocess": dg.multiprocess_executor,
}


def _empty(name: str, *, waits: bool) -> dg.OpDefinition:
    @dg.op(name=name, ins={"after": dg.In(dg.Nothing)} if waits else {}, out=dg.Out(dg.Nothing))
    def work() -> None:
        pass

    return work


@dg.graph
def pipeline() -> None:
    """The tasks and edges of `clinical_data_pipeline`."""
    done: dict[str, object] = {}
    for task in CLINICAL_DATA_PIPELINE.tasks:
        before = [done[upstream] for upstream, downstream in CLINICAL_DATA_PIPELINE.edges if downstream == task]
        done[task] = _empty(task, waits=bool(before))(**({"after": before} if before else {}))


@dg.graph
def three_steps() -> None:
    """Three in a row."""
    last = _empty("one", waits=False)()
    for name in ("two", "three"):
        last = _empty(name, waits=True)(after=last)


@dg.graph
def many_steps() -> None:
    """Steps that do not wait for each other."""
    step = _empty("step", waits=False)
    for number in range(MANY_STEPS):
        step.alias(f"step_{number}")()


three = three_steps.to_job("three_in_process", executor_def=dg.in_process_executor)
defs = dg.Definitions(
    jobs=[
        three,
        *(pipeline.to_job(f"pipeline_{name}", executor_def=executor) for name, executor in EXECUTORS.items()),
        *(many_steps.to_job(f"many_{name}", executor_def=EXECUTORS[name]) for name in ("in_process", "forked")),
    ],
    schedules=[dg.ScheduleDefinition(name=SCHEDULE, job=three, cron_schedule="* * * * *", execution_timezone="UTC")],
)
