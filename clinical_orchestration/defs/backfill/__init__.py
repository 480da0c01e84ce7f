"""Features of any range of days, computed again."""

import dagster as dg

ASSETS: list[dg.AssetsDefinition] = []

__all__ = ["ASSETS"]
