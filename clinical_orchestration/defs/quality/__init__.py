"""The quality of the tables at the end of a run."""

from clinical_orchestration.defs.quality.assets import validate_data_quality

ASSETS = [validate_data_quality]

__all__ = ["ASSETS"]
