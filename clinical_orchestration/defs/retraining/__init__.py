"""Retraining when conditions ask for it."""

import dagster as dg

ASSETS: list[dg.AssetsDefinition] = []

__all__ = ["ASSETS"]
