"""Keys of the assets of ``data_quality_monitoring``."""

from clinical_orchestration.tables import CLEANING_LOG, QUALITY_SCORES

GROUP = "data_quality"
COMPLETENESS = "quality/completeness"
SCHEMA = "quality/schema"
CONSISTENCY = "quality/consistency"
FRESHNESS = "quality/freshness"
ANOMALIES = "quality/anomalies"
REPORT = "quality/report"
SCORES = QUALITY_SCORES
CLEANING = CLEANING_LOG
