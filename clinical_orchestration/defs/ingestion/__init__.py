"""From records as received to typed, unique, accounted-for tables."""

from clinical_orchestration.defs.ingestion.assets import (
    monitor_kafka_topics,
    spark_data_processing,
    validate_clinical_data,
)

ASSETS = [monitor_kafka_topics, validate_clinical_data, spark_data_processing]

__all__ = ["ASSETS"]
