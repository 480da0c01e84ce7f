"""What starts runs when something happens, and what tells people about finished runs."""

from clinical_orchestration.defs.sensors.sensors import SENSORS

__all__ = ["SENSORS"]
