"""A Dagster instance on PostgreSQL whose runs execute at once, in this process, and Airflow's view of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from dagster._core.test_utils import instance_for_test
from dagster._core.workspace.context import WorkspaceProcessContext
from dagster._core.workspace.load_target import ModuleTarget

from clinical_orchestration.airflow.control import Control
from clinical_orchestration.airflow.database import open_engine
from clinical_orchestration.instance import ensure_pools
from clinical_orchestration_tests.airflow import tiny_definitions
from clinical_orchestration_tests.databases import new_database

TINY = "clinical_orchestration_tests.airflow.tiny_definitions"


@pytest.fixture(scope="package")
def database(postgres_env: dict[str, str]) -> str:
    """A database of its own; return its URL."""
    return new_database(postgres_env["POSTGRES_URL"], "airflow_view")


@pytest.fixture(scope="package")
def workspace(database: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[WorkspaceProcessContext]:
    with ExitStack() as stack:
        instance = stack.enter_context(
            instance_for_test(
                temp_dir=str(tmp_path_factory.mktemp("dagster")),
                overrides={
                    "storage": {
                        "custom": {
                            "module": "clinical_orchestration.execution.storage",
                            "class": "PooledPostgresStorage",
                            "config": {"postgres_url": database},
                        }
                    },
                    "run_launcher": {
                        "module": "dagster._core.launcher.sync_in_memory_run_launcher",
                        "class": "SyncInMemoryRunLauncher",
                    },
                    "run_coordinator": {
                        "module": "dagster._core.run_coordinator.default_run_coordinator",
                        "class": "DefaultRunCoordinator",
                    },
                    "compute_logs": {
                        "module": "dagster._core.storage.noop_compute_log_manager",
                        "class": "NoOpComputeLogManager",
                    },
                },
            )
        )
        instance.optimize_for_webserver(15_000, pool_recycle=3600, max_overflow=10)  # connections are kept
        ensure_pools(instance)
        target = ModuleTarget(
            TINY, attribute="defs", working_directory=str(Path(__file__).resolve().parents[2]), location_name="tiny"
        )
        yield stack.enter_context(WorkspaceProcessContext(instance, target))


@pytest.fixture(scope="package")
def control(workspace: WorkspaceProcessContext, database: str) -> Iterator[Control]:
    engine = open_engine(database)
    yield Control(lambda: workspace, engine)
    engine.dispose()


@pytest.fixture(autouse=True)
def nothing_fails() -> Iterator[None]:
    yield
    tiny_definitions.failing.clear()
    tiny_definitions.conf_seen.clear()
