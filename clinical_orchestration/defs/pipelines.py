"""Jobs and schedules, made from the contract: a job has the pipeline's name, its steps have the tasks' ids."""

from __future__ import annotations

import dagster as dg

from clinical_orchestration.contract import (
    CLINICAL_DATA_PIPELINE,
    DATA_QUALITY_MONITORING,
    FEATURE_BACKFILL,
    MODEL_MONITORING,
    OWNER,
    SCHEDULED_RETRAINING,
    Pipeline,
)
from clinical_orchestration.defs import backfill, data_quality, monitoring, retraining
from clinical_orchestration.execution.steps import shared_executor

EXCLUSIVE_TAG = "clinical/exclusive"
_EXCLUSIVE = {FEATURE_BACKFILL: CLINICAL_DATA_PIPELINE.name}
"""Runs with one value of the tag wait for one another: a pipeline's own, and those that write the same tables."""


def pipeline_job(pipeline: Pipeline, selection: dg.AssetSelection) -> dg.UnresolvedAssetJobDefinition:
    """Return the job of a pipeline over `selection`.

    Steps share the run's process, and with it a Spark session and what is imported: a step of its own process would
    open and import both again. A run asks for isolated steps by ``execution: {config: {steps: forked}}``.
    """
    return dg.define_asset_job(
        pipeline.name,
        selection=selection,
        description=pipeline.description,
        tags={
            **{f"airflow/{tag}": "true" for tag in pipeline.tags},
            "owner": OWNER,
            EXCLUSIVE_TAG: _EXCLUSIVE.get(pipeline, pipeline.name),
        },
        executor_def=shared_executor,
    )


def pipeline_schedule(pipeline: Pipeline, job: dg.UnresolvedAssetJobDefinition) -> dg.ScheduleDefinition | None:
    """Return the schedule of a pipeline, None for a manual one."""
    if pipeline.cron is None:
        return None
    return dg.ScheduleDefinition(
        name=f"{pipeline.name}_schedule",
        job=job,
        cron_schedule=pipeline.cron,
        execution_timezone="UTC",
        default_status=dg.DefaultScheduleStatus.RUNNING,
        description=f"Starts {pipeline.name} at its UTC times, whatever happened to the run before.",
    )


clinical_data_pipeline = pipeline_job(
    CLINICAL_DATA_PIPELINE,
    dg.AssetSelection.groups("ingestion", "lakehouse", "features", "training", "deployment", "quality"),
)
_GROUPS = (
    (MODEL_MONITORING, "monitoring", monitoring.ASSETS),
    (DATA_QUALITY_MONITORING, "data_quality", data_quality.ASSETS),
    (SCHEDULED_RETRAINING, "retraining", retraining.ASSETS),
    (FEATURE_BACKFILL, "backfill", backfill.ASSETS),
)
_JOBS = {
    CLINICAL_DATA_PIPELINE: clinical_data_pipeline,
    **{
        pipeline: pipeline_job(pipeline, dg.AssetSelection.groups(group))
        for pipeline, group, assets in _GROUPS
        if assets
    },
}
JOBS = list(_JOBS.values())
SCHEDULES = [schedule for pipeline, job in _JOBS.items() if (schedule := pipeline_schedule(pipeline, job)) is not None]
