"""Typed settings, read from the environment when called and never at import.

Client settings use the names that the tools themselves know (``AWS_ENDPOINT_URL``, ``MLFLOW_TRACKING_URI``,
``REDIS_URL`` ...), so that a shell prepared by ``pipeline-manager.sh --env`` configures this package, the ``aws``
and ``mlflow`` commands and a notebook alike. Ports and folders of the embedded stack are in
:mod:`clinical_orchestration.stack.settings`.
"""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, SecretStr
from pydantic_settings import BaseSettings, SettingsConfigDict


class ClientSettings(BaseSettings):
    """Where each external system answers. Defaults are the default ports of the embedded stack on loopback."""

    model_config = SettingsConfigDict(env_prefix="", extra="ignore", populate_by_name=True)

    s3_endpoint: str = Field("http://127.0.0.1:9000", alias="AWS_ENDPOINT_URL")
    s3_access_key: str = Field("", alias="AWS_ACCESS_KEY_ID")
    s3_secret_key: SecretStr = Field(SecretStr(""), alias="AWS_SECRET_ACCESS_KEY")
    s3_region: str = Field("us-east-1", alias="AWS_REGION")
    mlflow_tracking_uri: str = Field("http://127.0.0.1:5000", alias="MLFLOW_TRACKING_URI")
    redis_url: SecretStr = Field(SecretStr("redis://127.0.0.1:6379/0"), alias="REDIS_URL")
    kafka_bootstrap_servers: str = Field("127.0.0.1:9092", alias="KAFKA_BOOTSTRAP_SERVERS")
    spark_remote: str = Field("sc://127.0.0.1:15002", alias="SPARK_REMOTE")
    serving_url: str = Field("http://127.0.0.1:8000", alias="SERVING_URL")
    airflow_url: str = Field("http://127.0.0.1:8085", alias="AIRFLOW_URL")
    postgres_url: SecretStr = Field(SecretStr(""), alias="POSTGRES_URL")
    gateway_url: str = Field("http://127.0.0.1:8081", alias="GATEWAY_URL")
    home: Path = Field(Path(".clinical"), alias="CLINICAL_HOME", description="Folder of the deployment's own state.")
    lake_root: str = Field("", alias="CLINICAL_LAKE_ROOT", description="Empty: s3://{clinical_data_bucket}.")
    trial: str = Field("cdisc-pilot", alias="CLINICAL_TRIAL", description="Default trial profile.")
    kafka_enabled: bool = Field(True, alias="CLINICAL_KAFKA_ENABLED", description="False where no broker is installed.")
    spark_connectors: bool = Field(
        True, alias="CLINICAL_SPARK_CONNECTORS", description="False where the Delta and S3A jars are not installed."
    )


class Variables(BaseSettings):
    """The platform's variables with the defaults that the Airflow deployment published.

    Each is overridden by ``CLINICAL_VAR_<NAME>`` and read when a run starts.
    """

    model_config = SettingsConfigDict(env_prefix="CLINICAL_VAR_", extra="ignore", protected_namespaces=())

    clinical_data_bucket: str = "clinical-mlops"
    mlflow_artifact_bucket: str = "mlflow-artifacts"
    feature_store_redis_prefix: str = "patient:"
    kafka_patient_vitals_topic: str = "patient-vitals"
    kafka_lab_results_topic: str = "lab-results"
    kafka_medications_topic: str = "medications"
    kafka_adverse_events_topic: str = "adverse-events"
    kafka_subjects_topic: str = "subjects"
    model_name: str = "adverse-event-predictor"
    model_stage: str = "production"
    data_processing_batch_size: int = 1000
    data_quality_threshold: float = 0.95
    model_performance_threshold: float = 0.85
    max_retry_attempts: int = 3
    retry_delay_minutes: int = 5
    execution_timeout_hours: int = 2
    clinical_data_schema_version: str = "1.2"
    feature_count_threshold: int = 137

    def topics(self) -> dict[str, str]:
        """Map each bronze table to the Kafka topic that feeds it."""
        return {
            "patient_vitals": self.kafka_patient_vitals_topic,
            "lab_results": self.kafka_lab_results_topic,
            "medications": self.kafka_medications_topic,
            "adverse_events": self.kafka_adverse_events_topic,
            "subjects": self.kafka_subjects_topic,
        }


def lake_root(settings: ClientSettings | None = None, variables: Variables | None = None) -> str:
    """Return the root URI of the Delta tables, without a trailing slash."""
    settings = settings or ClientSettings()
    return (settings.lake_root or f"s3://{(variables or Variables()).clinical_data_bucket}").rstrip("/")
