"""What starts runs when something happens."""

import dagster as dg

SENSORS: list[dg.SensorDefinition] = []

__all__ = ["SENSORS"]
