"""Names that the Airflow deployment published and that this platform keeps: pipelines, tasks, pools, retry rules.

Dagster's step of a task carries the task's id; ``start_*`` and ``end_*`` stand for the run itself.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

OWNER = "clinical_trials_team"
RETRIES = 1
RETRY_DELAY_SECONDS = 300

POOLS: dict[str, int] = {
    "spark_jobs": 4,
    "mlflow_operations": 2,
    "kafka_operations": 3,
    "feature_engineering": 2,
    "data_validation": 5,
    "model_training": 1,
    "model_serving": 3,
    "alert_processing": 10,
    "backup_operations": 1,
    "monitoring_tasks": 8,
}


@dataclass(frozen=True)
class Pipeline:
    """One pipeline (an Airflow DAG, a Dagster job of the same name)."""

    name: str
    description: str
    tags: tuple[str, ...]
    cron: str | None
    """UTC cron expression of the schedule; None for a manual pipeline."""
    edges: tuple[tuple[str, str], ...] = field(repr=False)
    """(upstream task, downstream task)."""

    @property
    def tasks(self) -> tuple[str, ...]:
        """Return the task ids in the order of the edges."""
        return tuple(dict.fromkeys(task for edge in self.edges for task in edge))

    @property
    def steps(self) -> tuple[str, ...]:
        """Return the tasks that do work: all but the start and end markers."""
        return tuple(task for task in self.tasks if not task.startswith(("start_", "end_")))


def _chain(*stages: str | tuple[str, ...]) -> tuple[tuple[str, str], ...]:
    groups = [(stage,) if isinstance(stage, str) else stage for stage in stages]
    return tuple((a, b) for left, right in itertools.pairwise(groups) for a in left for b in right)


CLINICAL_DATA_PIPELINE = Pipeline(
    name="clinical_data_pipeline",
    description="End-to-end clinical data processing and model training",
    tags=("clinical_trials", "mlops", "data_pipeline"),
    cron="0 */6 * * *",
    edges=_chain(
        "start_pipeline",
        ("validate_clinical_data", "monitor_kafka_topics"),
        "spark_data_processing",
        "extract_features",
        "setup_mlflow_experiment",
        "train_model",
        "evaluate_model",
        "register_model",
        "deploy_model",
        "validate_data_quality",
        "end_pipeline",
    ),
)

DATA_QUALITY_MONITORING = Pipeline(
    name="data_quality_monitoring",
    description="Data quality and integrity",
    tags=("clinical_trials", "data_quality", "monitoring"),
    cron="0 */4 * * *",
    edges=_chain(
        "start_quality_check",
        ("check_data_completeness", "validate_data_schema", "check_data_consistency"),
        "monitor_data_freshness",
        "detect_anomalies",
        "generate_quality_report",
        "trigger_data_cleaning",
        "end_quality_check",
    ),
)

MODEL_MONITORING = Pipeline(
    name="model_monitoring",
    description="Model performance and drift",
    tags=("clinical_trials", "mlops", "monitoring"),
    cron="0 */2 * * *",
    edges=_chain(
        "start_monitoring",
        ("check_model_performance", "detect_data_drift", "check_concept_drift"),
        "validate_feature_distribution",
        "generate_monitoring_report",
        "send_alerts_if_needed",
        "end_monitoring",
    ),
)

SCHEDULED_RETRAINING = Pipeline(
    name="scheduled_retraining",
    description="Retraining on schedule, performance and data conditions",
    tags=("clinical_trials", "mlops", "retraining"),
    cron="0 0 * * 0",
    edges=(
        *_chain(
            "start_retraining",
            "check_retraining_conditions",
            "prepare_training_data",
            "retrain_model",
            "evaluate_retrained_model",
            "compare_models",
            "deploy_new_model",
            "rollback_if_needed",
            "end_retraining",
        ),
        *_chain("check_retraining_conditions", "skip_retraining", "end_retraining"),
    ),
)

FEATURE_BACKFILL = Pipeline(
    name="feature_backfill",
    description="Feature store backfill from historical data",
    tags=("clinical_trials", "feature_store", "backfill"),
    cron=None,
    edges=_chain(
        "start_backfill",
        "extract_historical_data",
        "validate_historical_data",
        "engineer_features",
        "validate_features",
        "load_to_feature_store",
        "verify_feature_store",
        "generate_backfill_report",
        "end_backfill",
    ),
)

PIPELINES = (
    CLINICAL_DATA_PIPELINE,
    MODEL_MONITORING,
    DATA_QUALITY_MONITORING,
    SCHEDULED_RETRAINING,
    FEATURE_BACKFILL,
)
