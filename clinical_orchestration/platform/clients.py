"""What a connection means for the clients: from its fields to the values that they are configured with, and back."""

from __future__ import annotations

import json
from collections.abc import Callable
from urllib.parse import quote, urlsplit

from clinical_orchestration.platform.connection import Connection

STORED_FIRST = "CLINICAL_STORED_CONNECTIONS"
"""Ids of connections, separated by commas, or ``all``: these go before the environment variables of the clients."""

CLIENT_NAMES: dict[str, tuple[str, ...]] = {
    "minio_storage": ("AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_REGION"),
    "redis_features": ("REDIS_URL",),
    "kafka_clinical": ("KAFKA_BOOTSTRAP_SERVERS", "KAFKA_CLIENT_OPTIONS"),
    "mlflow_tracking": ("MLFLOW_TRACKING_URI", "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"),
    "spark_cluster": ("SPARK_REMOTE",),
    "model_serving": ("SERVING_URL",),
    "clinical_gateway": ("GATEWAY_URL",),
    "lab_processor": (
        "CLINICAL_MQ_URL",
        "CLINICAL_MQ_USER",
        "CLINICAL_MQ_PASSWORD",
        "CLINICAL_MQ_QUEUE_MANAGER",
        "CLINICAL_MQ_QUEUE",
    ),
}
"""Connection -> the environment variables that it takes the place of."""

_KAFKA_OPTIONS = ("security.", "sasl.", "ssl.")
"""Keys of a Kafka connection's extra that go to the client library as they are."""


def client_values(connection: Connection) -> dict[str, str]:
    """Return what a connection says, by the environment variable that would say the same; only what it says.

    A connection that no client is configured by gives nothing.
    """
    read = _READERS.get(connection.conn_id)
    return {} if read is None else {name: value for name, value in read(connection).items() if value}


def with_default_port(connection: Connection, port: int) -> str:
    """Return ``host:port``; IPv6 hosts are bracketed."""
    host = connection.host or ""
    if ":" in host and not host.startswith("["):
        host = f"[{host}]"
    return f"{host}:{connection.port or port}"


def http_url(connection: Connection, port: int | None = None) -> str:
    """Return the URL of an HTTP service, without login: scheme from the host, the schema, or the extra."""
    host = connection.host or ""
    if not host:
        return ""
    extra = connection.extra_dejson
    scheme, path = "https" if extra.get("secure") is True or extra.get("use_ssl") is True else "http", ""
    if (connection.schema or "").lower() in ("http", "https"):
        scheme = str(connection.schema).lower()
    if "://" in host:
        parts = urlsplit(host)
        scheme, host, path = parts.scheme, parts.netloc, parts.path.rstrip("/")
        host = host.rpartition("@")[2]
        if parts.port:
            return f"{scheme}://{host}{path}"
    elif ":" in host and not host.startswith("["):
        # host:port in the host field, or an IPv6 address
        host = host if host.count(":") == 1 else f"[{host}]"
        if host.count(":") == 1:
            return f"{scheme}://{host}"
    wanted = connection.port or port
    return f"{scheme}://{host}{f':{wanted}' if wanted else ''}{path}"


def _minio(connection: Connection) -> dict[str, str]:
    extra = connection.extra_dejson
    endpoint = str(extra.get("endpoint_url") or extra.get("host") or "") or http_url(connection)
    if endpoint and "://" not in endpoint:
        endpoint = f"http://{endpoint}"
    return {
        "AWS_ENDPOINT_URL": endpoint.rstrip("/"),
        "AWS_ACCESS_KEY_ID": connection.login or str(extra.get("aws_access_key_id") or ""),
        "AWS_SECRET_ACCESS_KEY": connection.password or str(extra.get("aws_secret_access_key") or ""),
        "AWS_REGION": str(extra.get("region_name") or extra.get("region") or ""),
    }


def _redis(connection: Connection) -> dict[str, str]:
    if not connection.host:
        return {}
    extra = connection.extra_dejson
    scheme = "rediss" if extra.get("ssl") in (True, "true", "True") else "redis"
    login = ""
    if connection.password:
        login = f"{quote(connection.login or '', safe='')}:{quote(connection.password, safe='')}@"
    database = extra.get("db", connection.schema or 0)
    return {"REDIS_URL": f"{scheme}://{login}{with_default_port(connection, 6379)}/{database}"}


def _kafka(connection: Connection) -> dict[str, str]:
    extra = connection.extra_dejson
    servers = str(extra.get("bootstrap.servers") or extra.get("bootstrap_servers") or "")
    if not servers and connection.host:
        # several brokers may be written into the host field, each with its port
        servers = connection.host if ":" in connection.host else with_default_port(connection, 9092)
    options = {
        name: str(value).lower() if isinstance(value, bool) else str(value)
        for name, value in extra.items()
        if name.startswith(_KAFKA_OPTIONS)
    }
    if connection.login and connection.password:
        options = {
            "security.protocol": "SASL_PLAINTEXT",
            "sasl.mechanism": "PLAIN",
            "sasl.username": connection.login,
            "sasl.password": connection.password,
            **options,
        }
    return {"KAFKA_BOOTSTRAP_SERVERS": servers, "KAFKA_CLIENT_OPTIONS": json.dumps(options) if options else ""}


def _mlflow(connection: Connection) -> dict[str, str]:
    return {
        "MLFLOW_TRACKING_URI": http_url(connection),
        "MLFLOW_TRACKING_USERNAME": connection.login or "",
        "MLFLOW_TRACKING_PASSWORD": connection.password or "",
    }


def _spark(connection: Connection) -> dict[str, str]:
    remote = str(connection.extra_dejson.get("remote") or "")
    host = connection.host or ""
    if not remote and host.startswith("sc://"):
        remote = host if urlsplit(host).port else f"{host.rstrip('/')}:{connection.port or 15002}"
    if not remote and host and "://" not in host and not host.startswith(("local", "yarn", "k8s")):
        remote = f"sc://{with_default_port(connection, 15002)}"
    # spark://, yarn and k8s name a cluster's master, which a Spark Connect client cannot talk to: nothing then
    return {"SPARK_REMOTE": remote}


def _mq(connection: Connection) -> dict[str, str]:
    """Read the queue that laboratory results arrive on; a plain HTTP service without ``queue_manager`` is none."""
    extra = connection.extra_dejson
    if not extra.get("queue_manager"):
        return {}
    return {
        "CLINICAL_MQ_URL": http_url(connection, 9443),
        "CLINICAL_MQ_USER": connection.login or "",
        "CLINICAL_MQ_PASSWORD": connection.password or "",
        "CLINICAL_MQ_QUEUE_MANAGER": str(extra["queue_manager"]),
        "CLINICAL_MQ_QUEUE": str(extra.get("queue") or ""),
    }


def _http(name: str) -> Callable[[Connection], dict[str, str]]:
    return lambda connection: {name: http_url(connection)}


_READERS: dict[str, Callable[[Connection], dict[str, str]]] = {
    "minio_storage": _minio,
    "redis_features": _redis,
    "kafka_clinical": _kafka,
    "mlflow_tracking": _mlflow,
    "spark_cluster": _spark,
    "model_serving": _http("SERVING_URL"),
    "clinical_gateway": _http("GATEWAY_URL"),
    "lab_processor": _mq,
}


def connection_of_url(conn_id: str, conn_type: str, url: str, description: str) -> Connection:
    """Return the connection that a URL describes, without login and password.

    Of several hosts, as Kafka may have them, all are kept in the host field.
    """
    if not url:
        return Connection(conn_id, conn_type, description)
    rest = url.partition("://")[2] or url
    if "," in rest:
        return Connection(conn_id, conn_type, description, host=rest)
    parts = urlsplit(url if "://" in url else f"//{url}")
    schema = parts.path.strip("/") or None
    if parts.scheme == "https":
        schema = "https"
    return Connection(conn_id, conn_type, description, host=parts.hostname, port=parts.port, schema=schema)
