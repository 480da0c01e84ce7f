"""The code location: the stages and the resources, merged. Implements nothing itself."""

from __future__ import annotations

import warnings

import dagster as dg

from clinical_orchestration.defs import (
    backfill,
    cohorts,
    data_quality,
    deployment,
    features,
    ingestion,
    monitoring,
    quality,
    retraining,
    sensors,
    training,
)
from clinical_orchestration.defs.pipelines import JOBS, SCHEDULES
from clinical_orchestration.resources import build_resources

STAGES = (ingestion, features, training, deployment, quality, data_quality, monitoring, retraining, backfill, cohorts)


def build_definitions(resources: dict[str, object] | None = None) -> dg.Definitions:
    """Return the definitions; `resources` replaces those of the deployment by key."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", dg.BetaWarning)  # one for each asset otherwise
        # the Dagster UI and Airflow's API show the code of an asset by these references
        assets = dg.with_source_code_references([asset for stage in STAGES for asset in stage.ASSETS])
    return dg.Definitions(
        assets=assets,
        jobs=JOBS,
        schedules=SCHEDULES,
        sensors=[*sensors.SENSORS, *retraining.SENSORS],
        resources={**build_resources(), **(resources or {})},
    )


defs = build_definitions()
