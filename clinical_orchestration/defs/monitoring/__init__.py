"""Monitoring of the served model."""

from clinical_orchestration.defs.monitoring.assets import (
    check_concept_drift,
    check_model_performance,
    detect_data_drift,
    generate_monitoring_report,
    send_alerts_if_needed,
    validate_feature_distribution,
)

ASSETS = [
    check_model_performance,
    detect_data_drift,
    check_concept_drift,
    validate_feature_distribution,
    generate_monitoring_report,
    send_alerts_if_needed,
]

__all__ = ["ASSETS"]
