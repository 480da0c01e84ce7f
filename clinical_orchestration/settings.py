"""Typed settings, read from the environment when called and never at import.

Client settings use the names that the tools themselves know (``AWS_ENDPOINT_URL``, ``MLFLOW_TRACKING_URI``,
``REDIS_URL`` ...), so that a shell prepared by ``pipeline-manager.sh --env`` configures this package, the ``aws``
and ``mlflow`` commands and a notebook alike. Ports and folders of the embedded stack are in
:mod:`clinical_orchestration.stack.settings`.
"""

from __future__ import annotations

import contextlib
import contextvars
import json
import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import Field, SecretStr, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from clinical_orchestration.platform import reading
from clinical_orchestration.platform.clients import CLIENT_NAMES, STORED_FIRST, client_values
from clinical_orchestration.platform.connection import Connection
from clinical_orchestration.platform.crypto import Cipher, SecretKeyError

_without_database: contextvars.ContextVar[bool] = contextvars.ContextVar("without_database", default=False)


@contextlib.contextmanager
def environment_only() -> Iterator[None]:
    """Let settings and variables made in this block come from the environment and the defaults alone."""
    token = _without_database.set(True)
    try:
        yield
    finally:
        _without_database.reset(token)


def connection(conn_id: str) -> Connection | None:
    """Return a connection, secrets included: ``AIRFLOW_CONN_<ID>`` of the environment, else the stored one, else None.

    Raises:
        clinical_orchestration.platform.crypto.SecretKeyError: it is encrypted and ``CLINICAL_FERNET_KEY`` is missing
            or another.
        clinical_orchestration.platform.connection.ConnectionFormatError: the environment's cannot be read.
    """
    given = reading.environment_connection(conn_id)
    if given is not None:
        return given
    stored = None if _without_database.get() else reading.stored_connections().get(conn_id)
    return None if stored is None else stored.connection()


class ConnectionSource(PydanticBaseSettingsSource):
    """What connections say about clients, for fields that no source before this one has set.

    For any settings class whose fields have the environment variables of :data:`.platform.clients.CLIENT_NAMES`.

    Args:
        settings_cls: the settings.
        first: the source that goes before the environment, for the connections that ask for it; else the one behind.
    """

    def __init__(self, settings_cls: type[BaseSettings], *, first: bool) -> None:
        super().__init__(settings_cls)
        self._first = first

    def get_field_value(self, field: FieldInfo, field_name: str) -> tuple[Any, str, bool]:
        """Unused: all fields are read at once."""
        return None, field_name, False

    def __call__(self) -> dict[str, Any]:
        """Return values by alias, or by field where there is none."""
        if self._first and STORED_FIRST not in os.environ:
            return {}
        preferred = {name.strip() for name in os.environ.get(STORED_FIRST, "").split(",") if name.strip()}
        keys = self._keys()
        values: dict[str, Any] = {}
        for conn_id, names in CLIENT_NAMES.items():
            if names[0] not in keys or (self._first and not preferred & {conn_id, "all"}):
                continue
            # an address of another source: login and options of this connection belong to another server
            if keys[names[0]] in self.current_state:
                continue
            found = connection(conn_id)
            if found is not None:
                values |= {
                    keys[name]: _decoded(name, value)
                    for name, value in client_values(found).items()
                    if name in keys and keys[name] not in self.current_state
                }
        return values

    def _keys(self) -> dict[str, str]:
        prefix = str(self.config.get("env_prefix") or "")
        return {
            str(field.alias or f"{prefix}{name}".upper()): str(field.alias or name)
            for name, field in self.settings_cls.model_fields.items()
        }


def _decoded(alias: str, value: str) -> Any:
    return json.loads(value) if alias == "KAFKA_CLIENT_OPTIONS" else value


class ClientSettings(BaseSettings):
    """Where each external system answers. Defaults are the default ports of the embedded stack on loopback.

    An environment variable goes before a connection (``airflow connections ...``), which goes before the default;
    connections named in ``CLINICAL_STORED_CONNECTIONS`` go before the environment. PostgreSQL is asked only where the
    environment leaves something open.
    """

    # by alias only: else the field `home` would be read from HOME
    model_config = SettingsConfigDict(env_prefix="", extra="ignore", hide_input_in_errors=True)

    s3_endpoint: str = Field("http://127.0.0.1:9000", alias="AWS_ENDPOINT_URL")
    s3_access_key: str = Field("", alias="AWS_ACCESS_KEY_ID")
    s3_secret_key: SecretStr = Field(SecretStr(""), alias="AWS_SECRET_ACCESS_KEY")
    s3_region: str = Field("us-east-1", alias="AWS_REGION")
    mlflow_tracking_uri: str = Field("http://127.0.0.1:5000", alias="MLFLOW_TRACKING_URI")
    mlflow_username: str = Field("", alias="MLFLOW_TRACKING_USERNAME")
    mlflow_password: SecretStr = Field(SecretStr(""), alias="MLFLOW_TRACKING_PASSWORD")
    redis_url: SecretStr = Field(SecretStr("redis://127.0.0.1:6379/0"), alias="REDIS_URL")
    kafka_bootstrap_servers: str = Field("127.0.0.1:9092", alias="KAFKA_BOOTSTRAP_SERVERS")
    kafka_options: dict[str, str] = Field(
        default_factory=dict,
        alias="KAFKA_CLIENT_OPTIONS",
        repr=False,
        description="JSON object: further options of the client library, such as security.protocol and sasl.*",
    )
    spark_remote: str = Field("sc://127.0.0.1:15002", alias="SPARK_REMOTE")
    serving_url: str = Field("http://127.0.0.1:8000", alias="SERVING_URL")
    airflow_url: str = Field("http://127.0.0.1:8085", alias="AIRFLOW_URL")
    postgres_url: SecretStr = Field(SecretStr(""), alias="POSTGRES_URL")
    gateway_url: str = Field("http://127.0.0.1:8081", alias="GATEWAY_URL")
    fernet_key: SecretStr = Field(
        SecretStr(""),
        alias="CLINICAL_FERNET_KEY",
        description="Key of secrets in PostgreSQL; several, separated by commas, while it is changed.",
    )
    home: Path = Field(Path(".clinical"), alias="CLINICAL_HOME", description="Folder of the deployment's own state.")
    lake_root: str = Field("", alias="CLINICAL_LAKE_ROOT", description="Empty: s3://{clinical_data_bucket}.")
    trial: str = Field("cdisc-pilot", alias="CLINICAL_TRIAL", description="Default trial profile.")
    kafka_enabled: bool = Field(True, alias="CLINICAL_KAFKA_ENABLED", description="False where no broker is installed.")
    spark_connectors: bool = Field(
        True, alias="CLINICAL_SPARK_CONNECTORS", description="False where the Delta and S3A jars are not installed."
    )

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Put connections behind the environment, or before it where they are asked for."""
        return (
            init_settings,
            ConnectionSource(settings_cls, first=True),
            env_settings,
            ConnectionSource(settings_cls, first=False),
        )


class _StoredVariables(PydanticBaseSettingsSource):
    """Variables that somebody stored in PostgreSQL, for fields that no source before this one has set."""

    def get_field_value(self, field: FieldInfo, field_name: str) -> tuple[Any, str, bool]:
        """Unused: all fields are read at once."""
        return None, field_name, False

    def __call__(self) -> dict[str, Any]:
        """Return values by field; one that does not fit its field is left out, with a warning."""
        if _without_database.get():
            return {}
        cipher = Cipher.from_environment()
        values = {}
        for name, stored in reading.stored_variables().items():
            # a row that the platform wrote itself says no more than the default of this version
            if stored.is_default or name not in self.settings_cls.model_fields or name in self.current_state:
                continue
            key = f"variable {name}"
            try:
                values[name] = _adapter(self.settings_cls, name).validate_python(stored.value(cipher))
            except SecretKeyError as error:
                reading.warn_once(key, f"{error}; the default acts")
            except ValidationError as error:
                reasons = "; ".join(str(one["msg"]) for one in error.errors(include_input=False, include_url=False))
                reading.warn_once(key, f"the variable {name} in PostgreSQL does not fit ({reasons}); the default acts")
            else:
                reading.cleared(key)
        return values


@cache
def _adapter(model: type[BaseSettings], name: str) -> TypeAdapter[Any]:
    field = model.model_fields[name]
    kind: Any = field.annotation
    return TypeAdapter(Annotated[(kind, *field.metadata)] if field.metadata else kind)


class Variables(BaseSettings):
    """The platform's variables with the defaults that the Airflow deployment published.

    ``CLINICAL_VAR_<NAME>`` in the environment goes before the value in PostgreSQL (``airflow variables set``), which
    goes before the default. Read when called: a changed variable acts in the next run. Where PostgreSQL does not
    answer, environment and defaults act, with one warning.
    """

    model_config = SettingsConfigDict(
        env_prefix="CLINICAL_VAR_", extra="ignore", protected_namespaces=(), hide_input_in_errors=True
    )

    clinical_data_bucket: str = Field("clinical-mlops", min_length=3, description="Bucket of the lakehouse")
    mlflow_artifact_bucket: str = Field(
        "mlflow-artifacts", min_length=3, description="Bucket of MLflow's artifacts; read when MLflow starts"
    )
    feature_store_redis_prefix: str = Field("patient:", description="Prefix of the keys of online features")
    kafka_patient_vitals_topic: str = Field("patient-vitals", min_length=1, description="Topic of vital signs")
    kafka_lab_results_topic: str = Field("lab-results", min_length=1, description="Topic of laboratory results")
    kafka_medications_topic: str = Field("medications", min_length=1, description="Topic of medications")
    kafka_adverse_events_topic: str = Field("adverse-events", min_length=1, description="Topic of adverse events")
    kafka_subjects_topic: str = Field("subjects", min_length=1, description="Topic of subjects")
    model_name: str = Field(
        "adverse-event-predictor",
        min_length=1,
        description="Registered model; models of further trials have it as the beginning of their name",
    )
    model_stage: str = Field("production", description="Stage that a deployed version is tagged with in MLflow")
    spark_master_url: str = Field(
        "", description="Master that Spark computes on, such as spark://host:7077; empty: the cores of this machine"
    )
    data_processing_batch_size: int = Field(
        1000, ge=1, description="Records that Spark hands to Python functions at once"
    )
    feature_engineering_window_days: int = Field(
        30, ge=1, le=3650, description="Days of events that features look back over; 30: as the trial's profile says"
    )
    model_retraining_interval_days: int = Field(7, ge=1, description="Age in days at which a model is trained again")
    data_quality_threshold: float = Field(0.95, ge=0, le=1, description="Lowest quality score of a table that passes")
    data_cleaning_enabled: bool = Field(
        False, description="Whether data_quality_monitoring applies its safe corrections; proposals are always made"
    )
    model_performance_threshold: float = Field(
        0.85, ge=0, le=1, description="Lowest share of its AUROC at training that a model in use may have"
    )
    alert_email_recipients: str = Field("", description="Addresses that get alerts, separated by commas; empty: none")
    slack_webhook_url: SecretStr = Field(SecretStr(""), description="Slack webhook that gets alerts; empty: none")
    max_retry_attempts: int = Field(
        3, ge=0, le=20, description="How often a run tries a failed request to a store again"
    )
    retry_delay_minutes: float = Field(
        5, gt=0, description="Longest pause between two of these tries; the first is 1 s, each next twice as long"
    )
    execution_timeout_hours: float = Field(2, gt=0, description="Hours after which a run is ended")
    clinical_data_schema_version: str = Field(
        "1.2", description="Version of the message contract that messages should have"
    )
    feature_count_threshold: int = Field(137, ge=0, description="Fewest features that a trial should have")
    hpo_trials: int = Field(
        0, ge=0, le=500, description="Trials of the search for hyper-parameters, a member; 0: none at retraining"
    )
    hpo_timeout_seconds: float = Field(600, gt=0, description="Seconds after which that search ends")
    retraining_min_new_share: float = Field(
        0.1, ge=0, description="New labelled rows, as a share of the champion's, that ask for retraining"
    )
    retraining_holdout_share: float = Field(
        0.25, gt=0, lt=1, description="Share of subjects held out to compare champion and challenger"
    )
    rollback_watch_seconds: float = Field(
        10, ge=0, le=600, description="How long a retraining run watches a new champion's serving metrics"
    )
    rollback_max_error_rate: float = Field(
        0.05, ge=0, le=1, description="Share of failed answers above which a champion is rolled back"
    )
    rollback_max_p95_seconds: float = Field(
        0.5, gt=0, description="95th percentile of a model call above which a champion is rolled back"
    )
    rollback_min_answers: int = Field(50, ge=1, description="Answers below which errors and latency decide nothing")
    rollback_max_auroc_drop: float = Field(
        0.05, ge=0, le=1, description="Drop of AUROC on outcomes below the evaluation that rolls a champion back"
    )
    rollback_max_brier_rise: float = Field(
        0.02, ge=0, le=1, description="Rise of the Brier score on outcomes that rolls a champion back"
    )
    rollback_min_outcomes: int = Field(
        100, ge=1, description="Known outcomes below which the live error decides nothing"
    )
    clinical_data_minimum_records: int = Field(
        1000, ge=1, description="New records at which a sensor starts clinical_data_pipeline"
    )
    kafka_lag_alert_messages: int = Field(
        10_000, ge=1, description="Messages of a topic beyond the raw tables above which an alert is raised"
    )
    retraining_pause_hours: float = Field(
        24, ge=0, description="Hours in which a sensor asks only once for retraining for the same kind of reason"
    )

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Put PostgreSQL behind the environment."""
        return init_settings, env_settings, _StoredVariables(settings_cls)

    @classmethod
    def from_environment(cls) -> Self:
        """Return the variables of environment and defaults, where the database is not up yet or not to be asked."""
        with environment_only():
            return cls()

    @classmethod
    def check(cls, name: str, value: str) -> str | None:
        """Return why a value does not fit a variable of the platform, or None; names of others fit always."""
        if name not in cls.model_fields:
            return None
        try:
            _adapter(cls, name).validate_python(value)
        except ValidationError as error:
            return "; ".join(str(one["msg"]) for one in error.errors(include_input=False, include_url=False))
        return None

    @property
    def longest_pause_seconds(self) -> float:
        """Longest pause between two tries of a request, in seconds."""
        return self.retry_delay_minutes * 60

    def registered_model(self, name: str) -> str:
        """Return the registered model of a trial: `name` of its profile, begun as the variable ``model_name`` says."""
        begin = str(type(self).model_fields["model_name"].default)
        return self.model_name + name.removeprefix(begin) if name.startswith(begin) else name

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
