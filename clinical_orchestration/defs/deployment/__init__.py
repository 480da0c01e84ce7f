"""From a registered version to the model that answers."""

from clinical_orchestration.defs.deployment.assets import deploy_model

ASSETS = [deploy_model]

__all__ = ["ASSETS"]
