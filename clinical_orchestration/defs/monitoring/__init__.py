"""Monitoring of the served model."""

import dagster as dg

ASSETS: list[dg.AssetsDefinition] = []

__all__ = ["ASSETS"]
