"""Cohorts: patients by inclusion and exclusion criteria. Not part of a pipeline; built when somebody asks."""

from clinical_orchestration.defs.cohorts.assets import build_cohorts

ASSETS = [build_cohorts]

__all__ = ["ASSETS"]
