"""Retraining when conditions ask for it, and the watch of the champion that goes on afterwards."""

from clinical_orchestration.defs.retraining.assets import (
    check_retraining_conditions,
    compare_models,
    deploy_new_model,
    evaluate_retrained_model,
    prepare_training_data,
    retrain_model,
    rollback_if_needed,
    skip_retraining,
)
from clinical_orchestration.defs.retraining.sensor import champion_watch_sensor

ASSETS = [
    check_retraining_conditions,
    skip_retraining,
    prepare_training_data,
    retrain_model,
    evaluate_retrained_model,
    compare_models,
    deploy_new_model,
    rollback_if_needed,
]
SENSORS = [champion_watch_sensor]

__all__ = ["ASSETS", "SENSORS"]
