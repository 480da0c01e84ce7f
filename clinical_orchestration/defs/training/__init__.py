"""From features to a registered, evaluated model version."""

from clinical_orchestration.defs.training.assets import (
    evaluate_model,
    register_model,
    setup_mlflow_experiment,
    train_model,
)

ASSETS = [setup_mlflow_experiment, train_model, evaluate_model, register_model]

__all__ = ["ASSETS"]
