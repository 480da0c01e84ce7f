"""The assets of the pipeline ``data_quality_monitoring``."""

from clinical_orchestration.defs.data_quality.assets import (
    check_data_completeness,
    check_data_consistency,
    detect_anomalies,
    monitor_data_freshness,
    validate_data_schema,
)
from clinical_orchestration.defs.data_quality.cleaning import trigger_data_cleaning
from clinical_orchestration.defs.data_quality.report import generate_quality_report

ASSETS = [
    check_data_completeness,
    validate_data_schema,
    check_data_consistency,
    monitor_data_freshness,
    detect_anomalies,
    generate_quality_report,
    trigger_data_cleaning,
]

__all__ = ["ASSETS"]
