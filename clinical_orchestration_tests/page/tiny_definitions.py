"""A small code location for the tests of the page and of the command line."""

import time

import dagster as dg


@dg.op
def count_rows(context: dg.OpExecutionContext) -> int:
    context.log.info("counting")
    context.log_event(dg.AssetMaterialization("silver/patient_vitals", metadata={"rows": 3, "note": "all there"}))
    return 3


@dg.op(config_schema={"seconds": dg.Field(float, default_value=0.0)})
def take_time(context: dg.OpExecutionContext, rows: int) -> None:
    deadline = time.monotonic() + context.op_config["seconds"]
    while time.monotonic() < deadline:
        time.sleep(0.1)


@dg.op
def fail(rows: int) -> None:
    raise ValueError(f"{rows} rows are not enough")


class Pipeline(dg.ConfigurableResource):  # type: ignore[type-arg]
    trial: str = "cdisc-pilot"
    source: str | None = None
    conf: dict[str, str] = {}


@dg.op
def show_trial(context: dg.OpExecutionContext, pipeline: Pipeline) -> None:
    context.log_event(dg.AssetMaterialization("trial", metadata={"trial": pipeline.trial, "conf": str(pipeline.conf)}))


@dg.job(resource_defs={"pipeline": Pipeline()})
def good_pipeline() -> None:
    """Counts rows."""
    take_time(count_rows())
    show_trial()


@dg.job(resource_defs={"pipeline": Pipeline()})
def bad_pipeline() -> None:
    """Fails in its second step."""
    fail(count_rows())


defs = dg.Definitions(
    jobs=[good_pipeline, bad_pipeline],
    schedules=[
        dg.ScheduleDefinition(
            job=good_pipeline, cron_schedule="0 */6 * * *", default_status=dg.DefaultScheduleStatus.RUNNING
        )
    ],
    resources={"pipeline": Pipeline()},
)
