"""Data quality monitoring."""

import dagster as dg

ASSETS: list[dg.AssetsDefinition] = []

__all__ = ["ASSETS"]
