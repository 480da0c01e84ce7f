"""What the deployment is configured with: its own defaults in PostgreSQL, and which value acts from which source."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from pydantic import SecretStr

from clinical_orchestration.contract import POOLS
from clinical_orchestration.platform import reading
from clinical_orchestration.platform.clients import CLIENT_NAMES, STORED_FIRST, client_values, connection_of_url
from clinical_orchestration.platform.connection import Connection, ConnectionFormatError
from clinical_orchestration.platform.crypto import SecretKeyError
from clinical_orchestration.platform.masking import MASK, is_sensitive, mask_url, redact
from clinical_orchestration.platform.store import PlatformStore, PoolInfo, StoredConnection, VariableWrite
from clinical_orchestration.settings import ClientSettings, Variables, environment_only

_logger = logging.getLogger(__name__)

POOL_DESCRIPTIONS: dict[str, str] = {
    "spark_jobs": "Steps that compute in Spark",
    "mlflow_operations": "Steps that write to MLflow",
    "kafka_operations": "Steps that read or watch Kafka topics",
    "feature_engineering": "Steps that compute or load features",
    "data_validation": "Steps that check data",
    "model_training": "Steps that train models",
    "model_serving": "Steps that deploy models",
    "alert_processing": "Steps that send alerts",
    "backup_operations": "Steps that copy or restore data",
    "monitoring_tasks": "Steps that watch data and models",
}

CONNECTION_TYPES: dict[str, tuple[str, str]] = {
    "minio_storage": ("s3", "Object store of the lakehouse and of MLflow's artifacts"),
    "redis_features": ("redis", "Online features"),
    "kafka_clinical": ("kafka", "Topics of clinical records"),
    "mlflow_tracking": ("http", "Experiments and registered models"),
    "spark_cluster": ("spark", "Spark Connect server"),
    "model_serving": ("http", "Model server"),
    "postgres_mlflow": ("postgres", "Database of MLflow"),
    "postgres_airflow": ("postgres", "Database of the orchestration: runs, variables, connections"),
    "clinical_gateway": ("http", "Gateway that takes records by HTTP"),
    "lab_processor": ("http", "IBM MQ web server that laboratory results arrive at; extra: queue_manager, queue"),
}
"""The connections that the Airflow deployment published: id -> type and description."""

Source = Literal["environment", "PostgreSQL", "default"]


@dataclass(frozen=True)
class Acting:
    """One value that acts, as it may be shown.

    `setting` names the environment variable that would set it; `note` says what is there beside and does not act, and
    why.
    """

    kind: Literal["variable", "connection"]
    name: str
    setting: str
    value: str
    source: Source
    description: str = ""
    note: str = ""

    def as_dict(self) -> dict[str, str]:
        """Return the fields as plain JSON types."""
        return asdict(self)


def default_variables() -> list[VariableWrite]:
    """Return the platform's variables with their defaults and descriptions."""
    return [
        VariableWrite(name, _plain(field.default), field.description or "")
        for name, field in Variables.model_fields.items()
    ]


def default_connections(settings: ClientSettings) -> list[Connection]:
    """Return the contract's connections as they describe the deployment of `settings`; without passwords.

    Secrets stay where they are, in the environment: a default must not need a key, nor be worth stealing.
    """
    postgres = settings.postgres_url.get_secret_value() or "postgresql://127.0.0.1:5433/clinical"
    base, _, database = postgres.partition("?")[0].rpartition("/")
    urls = {
        "minio_storage": settings.s3_endpoint,
        "redis_features": settings.redis_url.get_secret_value(),
        "kafka_clinical": settings.kafka_bootstrap_servers,
        "mlflow_tracking": settings.mlflow_tracking_uri,
        "spark_cluster": settings.spark_remote.partition("/;")[0].partition(";")[0],
        "model_serving": settings.serving_url,
        "postgres_mlflow": f"{base}/mlflow",
        "postgres_airflow": f"{base}/{database}",
        "clinical_gateway": settings.gateway_url,
        "lab_processor": "",  # off until somebody says where the queue is
    }
    return [connection_of_url(conn_id, *_typed(conn_id, urls[conn_id])) for conn_id in CONNECTION_TYPES]


def _typed(conn_id: str, url: str) -> tuple[str, str, str]:
    conn_type, description = CONNECTION_TYPES[conn_id]
    return conn_type, url, description


def default_pools() -> dict[str, PoolInfo]:
    """Return what is known of the contract's pools."""
    return {name: PoolInfo(POOL_DESCRIPTIONS[name], include_deferred=False) for name in POOLS}


def load_defaults(store: PlatformStore, settings: ClientSettings | None = None) -> list[str]:
    """Store the defaults of variables, connections and pools where nobody has stored a value.

    Defaults that nobody has changed are brought up to date, so that connections describe the running deployment; one
    that was deleted stays deleted. Slots of pools are set by :func:`clinical_orchestration.instance.ensure_pools`.

    Args:
        store: where to.
        settings: of the deployment; default: the environment's, without what is stored.

    Returns:
        What was stored or changed now.

    Raises:
        clinical_orchestration.platform.store.StoreUnavailableError: the database does not answer.
    """
    if settings is None:
        with environment_only():
            settings = ClientSettings()
    return store.load_defaults(default_variables(), default_connections(settings), default_pools())


def explain() -> list[Acting]:
    """Return for every variable and connection the value that acts, masked, and where it comes from.

    Variables that users stored for themselves come behind the platform's own. Connections come as the settings of the
    clients that they act on; ``postgres_*`` act on none and describe only.
    """
    return [*_explain_variables(), *_explain_connections()]


def _explain_variables() -> Iterable[Acting]:
    stored = reading.stored_variables()
    acting = Variables()
    for name, field in Variables.model_fields.items():
        setting = f"CLINICAL_VAR_{name.upper()}"
        value = _shown(name, _plain(getattr(acting, name)))
        row = stored.get(name)
        by_user = row is not None and not row.is_default
        note = ""
        source: Source = "default"
        if _in_environment(setting):
            source = "environment"
            note = "a value in PostgreSQL does not act: the environment goes before it" if by_user else ""
        elif row is not None and by_user:
            problem = _problem(name, row.value)
            if problem is None:
                source = "PostgreSQL"
            else:
                note = f"the value in PostgreSQL does not act: {problem}"
        yield Acting("variable", name, setting, value, source, field.description or "", note)
    for key, row in stored.items():
        if key not in Variables.model_fields:
            try:
                value, note = _shown(key, row.value() if not row.is_encrypted else MASK), "not one of the platform's"
            except SecretKeyError as error:  # pragma: no cover - a row that is not encrypted needs no key
                value, note = MASK, str(error)
            yield Acting("variable", key, "", value, "PostgreSQL", row.description or "", note)


def _problem(name: str, read: Any) -> str | None:
    try:
        return Variables.check(name, read())
    except SecretKeyError as error:
        return str(error)


def _explain_connections() -> Iterable[Acting]:
    stored = reading.stored_connections()
    try:
        settings: ClientSettings | None = ClientSettings()
        failure = ""
    except (SecretKeyError, ConnectionFormatError) as error:
        settings, failure = None, str(error)
    fields = {str(field.alias): name for name, field in ClientSettings.model_fields.items() if field.alias}
    first = {name.strip() for name in os.environ.get(STORED_FIRST, "").split(",")}
    for conn_id, (_, description) in CONNECTION_TYPES.items():
        row = stored.get(conn_id)
        names = CLIENT_NAMES.get(conn_id, ())
        said, source, problem = _said(conn_id, row)
        if not names:
            yield Acting("connection", conn_id, "", said.get("", ""), source, description, problem)
            continue
        preferred = bool(first & {conn_id, "all"})
        for setting in names:
            if settings is not None and setting in fields:
                value = _shown(setting, _plain(getattr(settings, fields[setting])))
            else:
                value = _shown(setting, os.environ.get(setting, said.get(setting, "")))
            acts: Source = "default"
            note = failure or problem
            by_user = source != "default" and not (row is not None and row.is_default and source == "PostgreSQL")
            if preferred and setting in said:
                acts = source
            elif _in_environment(setting):
                acts = "environment"
                if by_user and setting in said:
                    note = f"the connection does not act: the environment goes before it, see {STORED_FIRST}"
            elif setting in said and not _in_environment(names[0]):
                acts = source
            elif setting in said and by_user:
                note = f"the connection does not act: {names[0]} is another server's, from the environment"
            if by_user and setting == names[0] and not said and not note:
                note = "the connection says nothing that this client understands"
            yield Acting("connection", conn_id, setting, value, acts, description, note)


def _said(conn_id: str, row: StoredConnection | None) -> tuple[Mapping[str, str], Source, str]:
    """Return what a connection gives, from where, and why nothing where it cannot be read."""
    try:
        given = reading.environment_connection(conn_id)
        source: Source = "environment" if given is not None else "PostgreSQL" if row is not None else "default"
        found = given if given is not None else row.connection() if row is not None else None
    except (SecretKeyError, ConnectionFormatError) as error:
        return {}, "PostgreSQL" if row is not None else "environment", str(error)
    if found is None:
        return {}, "default", ""
    return (client_values(found) if conn_id in CLIENT_NAMES else {"": found.masked_uri()}), source, ""


def _in_environment(name: str) -> bool:
    wanted = name.lower()
    return any(key.lower() == wanted for key in os.environ)


def _plain(value: Any) -> str:
    if isinstance(value, SecretStr):
        return value.get_secret_value()
    return f"{value:g}" if isinstance(value, float) else str(value)


def _shown(name: str, value: str) -> str:
    if is_sensitive(name) or name in ("AWS_ACCESS_KEY_ID", "KAFKA_CLIENT_OPTIONS"):
        return MASK if value not in ("", "{}") else ""
    return str(redact(mask_url(value)))
