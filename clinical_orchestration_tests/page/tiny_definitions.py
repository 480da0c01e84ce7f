"""A small code location for the tests of the page and of the command line."""

import time

import dagster as dg
from pydantic import Field


@dg.op
def count_rows(context: dg.OpExecutionContext) -> int:
    context.log.info("counting")
    context.log_event(dg.AssetMaterialization("silver/patient_vitals", metadata={"rows": 3, "note": "all there"}))
    return 3


@dg.op
def use(rows: int) -> None:
    assert rows == 3


@dg.op
def take_time() -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        time.sleep(0.1)


@dg.op
def fail(rows: int) -> None:
    raise ValueError(f"{rows} rows are not enough")


class Pipeline(dg.ConfigurableResource):  # type: ignore[type-arg]
    trial: str | None = None
    source: str | None = None
    conf: dict[str, str] = Field(default_factory=dict)


@dg.op
def show_trial(context: dg.OpExecutionContext, pipeline: Pipeline) -> None:
    context.log_event(dg.AssetMaterialization("trial", metadata={"trial": pipeline.trial, "conf": str(pipeline.conf)}))


@dg.job(executor_def=dg.in_process_executor, resource_defs={"pipeline": Pipeline()})
def good_pipeline() -> None:
    """Counts rows."""
    use(count_rows())
    show_trial()


@dg.job(executor_def=dg.in_process_executor, resource_defs={"pipeline": Pipeline()})
def bad_pipeline() -> None:
    """Fails in its second step."""
    fail(count_rows())


@dg.job(executor_def=dg.in_process_executor, resource_defs={"pipeline": Pipeline()})
def long_pipeline() -> None:
    """Takes a minute, for tests that cancel it."""
    take_time()


defs = dg.Definitions(
    jobs=[good_pipeline, bad_pipeline, long_pipeline],
    schedules=[
        dg.ScheduleDefinition(
            job=good_pipeline, cron_schedule="0 */6 * * *", default_status=dg.DefaultScheduleStatus.RUNNING
        )
    ],
    resources={"pipeline": Pipeline()},
)
