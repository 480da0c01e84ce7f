"""Offline features by day and online features a patient."""

from clinical_orchestration.defs.features.assets import extract_features

ASSETS = [extract_features]

__all__ = ["ASSETS"]
