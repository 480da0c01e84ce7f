"""Fixtures that give real services on free ports, one each for the whole session.

Each returns the environment of the service's clients (the names of ``settings.ClientSettings``). The variables are not
set in the process: a test sets them with ``monkeypatch.setenv`` or passes them on. Services start when first used.
"""

from __future__ import annotations

import gc
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from clinical_orchestration.stack.testing import NotInstalledError, embedded

Environment = dict[str, str]


ADDRESSES = {
    "AWS_ENDPOINT_URL": "http://127.0.0.1:9",
    "AWS_ACCESS_KEY_ID": "",
    "AWS_SECRET_ACCESS_KEY": "",
    "MLFLOW_TRACKING_URI": "http://127.0.0.1:9",
    "REDIS_URL": "redis://127.0.0.1:9/0",
    "KAFKA_BOOTSTRAP_SERVERS": "127.0.0.1:9",
    "SPARK_REMOTE": "sc://127.0.0.1:9",
    "SERVING_URL": "http://127.0.0.1:9",
    "AIRFLOW_URL": "http://127.0.0.1:9",
    "GATEWAY_URL": "http://127.0.0.1:9",
    "POSTGRES_URL": "",
    "CLINICAL_FERNET_KEY": "",
    "CLINICAL_STORED_CONNECTIONS": "",
    "CLINICAL_USER": "",
    "CLINICAL_ADMIN_PASSWORD": "",
    "CLINICAL_SERVICE_TOKEN": "",
}


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """Give root's tests a folder of their own.

    Pytest closes the folder that all of root's test runs share to everybody else whenever another run begins, and a
    PostgreSQL that works there as another user would lose its files.
    """
    if os.geteuid() == 0 and config.option.basetemp is None:
        config.option.basetemp = config._own_basetemp = tempfile.mkdtemp(prefix="clinical-tests-")  # type: ignore[attr-defined]


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Remove the folder, unless somebody has to look at it."""
    own = getattr(session.config, "_own_basetemp", None)
    if own is not None and exitstatus == 0:
        shutil.rmtree(own, ignore_errors=True)


@pytest.fixture(scope="session", autouse=True)
def no_running_stack() -> Iterator[None]:
    """Point every client at a closed port: no test may work on a stack that happens to run on this machine."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ADDRESSES.items():
            patch.setenv(name, value)
        yield


@pytest.fixture(scope="session", autouse=True)
def retries_come_at_once() -> Iterator[None]:
    """Let a step that fails in a test be tried again without the minutes that the platform's retry rule waits."""
    from dagster import RetryPolicy

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RetryPolicy, "calculate_delay", lambda self, attempt_num: 0.0)
        yield


def _service(factory: pytest.TempPathFactory, *names: str) -> Iterator[Environment]:
    home = factory.mktemp("-".join(names))
    if os.geteuid() == 0:
        # root's services that run as another user must get to their folders: enter, not list
        for folder in (home, *home.parents):
            if folder.stat().st_uid == 0 and folder != Path(folder.anchor) and not folder.stat().st_mode & 0o001:
                folder.chmod(folder.stat().st_mode | 0o011)
    try:
        with embedded(home, *names) as environment:
            yield environment
    except NotInstalledError as reason:
        pytest.skip(f"{reason}")


@pytest.fixture(scope="session")
def s3_env(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Environment]:
    """S3 with the buckets ``clinical-mlops`` and ``mlflow-artifacts``."""
    yield from _service(tmp_path_factory, "s3")


@pytest.fixture(scope="session")
def redis_env(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Environment]:
    """Redis (Valkey)."""
    yield from _service(tmp_path_factory, "redis")


@pytest.fixture(scope="session")
def kafka_env(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Environment]:
    """Kafka with the five topics."""
    yield from _service(tmp_path_factory, "kafka")


@pytest.fixture(scope="session")
def postgres_env(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Environment]:
    """PostgreSQL with the databases ``clinical`` (``POSTGRES_URL``) and ``mlflow``."""
    yield from _service(tmp_path_factory, "postgres")


@pytest.fixture(scope="session")
def spark_env(s3_env: Environment, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Environment]:
    """Spark Connect with Delta and S3A, working on the S3 of ``s3_env``."""
    home = tmp_path_factory.mktemp("spark")
    try:
        with embedded(home, "spark", use=s3_env) as environment:
            if environment["CLINICAL_SPARK_CONNECTORS"] != "true":
                pytest.skip("Spark's Delta and S3 connectors are not downloaded and Maven Central cannot be reached")
            yield environment
            end_spark_sessions()
    except NotInstalledError as reason:
        pytest.skip(f"{reason}")


def end_spark_sessions() -> None:
    """End the sessions that tests left open: at exit, their clients would try for minutes to reach the ended server."""
    if "pyspark.sql.connect.session" not in sys.modules:
        return
    from pyspark.sql.connect.session import SparkSession

    # sessions are kept per thread and nowhere together
    for session in [found for found in gc.get_objects() if isinstance(found, SparkSession)]:
        if not session.is_stopped:
            session.stop()


@pytest.fixture(scope="session")
def mlflow_env(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Environment]:
    """MLflow with PostgreSQL and an S3 of its own (both are in the environment that it gives)."""
    yield from _service(tmp_path_factory, "mlflow")
