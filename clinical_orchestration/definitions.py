"""The code location: the stages and the resources, merged. Implements nothing itself."""

from __future__ import annotations

import dagster as dg

from clinical_orchestration.defs import deployment, features, ingestion, quality, training
from clinical_orchestration.defs.pipelines import clinical_data_pipeline, clinical_data_pipeline_schedule
from clinical_orchestration.resources import build_resources


def build_definitions(resources: dict[str, object] | None = None) -> dg.Definitions:
    """Return the definitions; `resources` replaces those of the deployment by key."""
    stages = (ingestion, features, training, deployment, quality)
    return dg.Definitions(
        assets=[asset for stage in stages for asset in stage.ASSETS],
        jobs=[clinical_data_pipeline],
        schedules=[schedule for schedule in (clinical_data_pipeline_schedule,) if schedule is not None],
        resources={**build_resources(), **(resources or {})},
    )


defs = build_definitions()
