"""Schedules as the contract has them and a sensor over a world that is one file, for daemons that are killed."""

import json
import os
from pathlib import Path

import dagster as dg
from pydantic import Field

from clinical_orchestration.contract import PIPELINES
from clinical_orchestration.defs.sensors.decisions import Ask, Decision, Wait
from clinical_orchestration.defs.sensors.requests import Cursor, Patience, ask_for_run

WORLD = "CLINICAL_TEST_WORLD"


class Pipeline(dg.ConfigurableResource):  # type: ignore[type-arg]
    trial: str | None = None
    source: str | None = None
    conf: dict[str, str] = Field(default_factory=dict)


@dg.op(required_resource_keys={"pipeline"})
def work() -> None:
    pass


def job(name: str) -> dg.JobDefinition:
    """Return a job of one step."""

    @dg.job(name=name)
    def one() -> None:
        work()

    return one


JOBS = {pipeline.name: job(pipeline.name) for pipeline in PIPELINES}
SCHEDULES = [
    dg.ScheduleDefinition(
        name=f"{pipeline.name}_schedule",
        job=JOBS[pipeline.name],
        cron_schedule=pipeline.cron,
        execution_timezone="UTC",
        default_status=dg.DefaultScheduleStatus.RUNNING,
    )
    for pipeline in PIPELINES
    if pipeline.cron is not None
]


@dg.sensor(
    job=JOBS["clinical_data_pipeline"], minimum_interval_seconds=30, default_status=dg.DefaultSensorStatus.RUNNING
)
def counting_sensor(context: dg.SensorEvaluationContext) -> dg.SensorResult:
    """Ask for a run over the events beyond the position."""

    def decide(cursor: Cursor) -> Decision:
        count = json.loads(Path(os.environ[WORLD]).read_text(encoding="utf-8"))
        done = cursor.position.get("count", 0)
        if count <= done:
            return Wait("nothing new")
        return Ask(f"events {done} to {count}", {"count": count}, conf={"range": f"{done}-{count}"})

    return ask_for_run(context, "clinical_data_pipeline", decide, patience=Patience())


defs = dg.Definitions(
    jobs=list(JOBS.values()), schedules=SCHEDULES, sensors=[counting_sensor], resources={"pipeline": Pipeline()}
)
