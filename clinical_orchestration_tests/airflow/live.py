"""The whole page on a port of this machine: door, API and Dagster UI, over tiny definitions that really run."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography.fernet import Fernet
from dagster._core.launcher import LaunchRunContext
from dagster._core.launcher.sync_in_memory_run_launcher import SyncInMemoryRunLauncher
from dagster._core.test_utils import instance_for_test
from dagster._core.workspace.context import WorkspaceProcessContext
from dagster._core.workspace.load_target import WorkspaceFileTarget

from clinical_orchestration.instance import ensure_pools
from clinical_orchestration.page.dagster_ui import DagsterUi
from clinical_orchestration.page.settings import PageSettings

ROOT = Path(__file__).resolve().parents[2]
LAUNCHER = "clinical_orchestration_tests.airflow.live"
ADMIN, VIEWER = "admin:admin", "looker:only-looks-at-it-1"

_WORKSPACE = """
load_from:
  - python_module:
      module_name: clinical_orchestration_tests.airflow.tiny_definitions
      working_directory: {root}
      location_name: tiny
"""
_BROKEN = """
  - python_module:
      module_name: clinical_orchestration_tests.airflow.broken_definitions
      working_directory: {root}
      location_name: broken
"""


class ThreadLauncher(SyncInMemoryRunLauncher):
    """Executes runs one after the other in a thread, so that whoever triggers one has to wait for it as usual.

    While `executing` is off, runs stay as they were accepted.
    """

    executing = True
    _workers = ThreadPoolExecutor(1, thread_name_prefix="runs")

    def launch_run(self, context: LaunchRunContext) -> None:
        """Put the run behind those that wait."""
        if self.executing:
            self._workers.submit(super().launch_run, context)

    def terminate(self, run_id: str) -> bool:
        """No thread can be stopped."""
        return False


@dataclass(frozen=True)
class Live:
    """A page that listens. `url` is its address, `context` its workspace, `app` the application."""

    url: str
    context: WorkspaceProcessContext
    app: Any
    database: str


@contextmanager
def live_page(database: str, home: Path, *, broken: bool = False, stack: str = "") -> Iterator[Live]:
    """Run the page in a thread of this process.

    Args:
        database: URL of an empty database.
        home: an empty folder.
        broken: with a second code location that does not load.
        stack: folder of the stack whose supervisor says how its services are; empty: there is none.
    """
    import uvicorn

    from clinical_orchestration.page.app import create_app
    from clinical_orchestration.users.store import UserStore

    (home / "workspace.yaml").write_text((_WORKSPACE + (_BROKEN if broken else "")).format(root=ROOT))
    settings = PageSettings(DAGSTER_HOME=str(home), POSTGRES_URL=database, CLINICAL_HOME=stack)

    def open_workspace(stack: ExitStack) -> WorkspaceProcessContext:
        instance = stack.enter_context(
            instance_for_test(
                temp_dir=str(home),
                overrides={
                    "storage": {
                        "custom": {
                            "module": "clinical_orchestration.execution.storage",
                            "class": "PooledPostgresStorage",
                            "config": {"postgres_url": database},
                        }
                    },
                    "run_launcher": {"module": LAUNCHER, "class": "ThreadLauncher"},
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
        instance.optimize_for_webserver(15_000, pool_recycle=3600, max_overflow=10)
        ensure_pools(instance)
        target = WorkspaceFileTarget(paths=[str(home / "workspace.yaml")])
        return stack.enter_context(WorkspaceProcessContext(instance, target))

    set_here = {
        "POSTGRES_URL": database,
        "CLINICAL_FERNET_KEY": Fernet.generate_key().decode(),
        "DAGSTER_EVENT_BATCH_SIZE": "1000",  # as the stack has it
    }
    before = {name: os.environ.get(name) for name in set_here}
    os.environ.update(set_here)
    ui = DagsterUi(open_workspace)
    listener = socket.create_server(("127.0.0.1", 0))
    app = create_app(settings, ui)
    server = uvicorn.Server(
        uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=2, timeout_keep_alive=60)
    )
    thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
    thread.start()
    try:
        end = time.monotonic() + 60
        while not (ui.context is not None and server.started):
            if time.monotonic() > end:
                raise TimeoutError("the page did not start")
            time.sleep(0.05)
        users = UserStore(database)
        name, _, password = ADMIN.partition(":")
        users.create_first_user(name, password)
        name, _, password = VIEWER.partition(":")
        users.create_user(name, password, ["Viewer"], email="looker@example.org")
        yield Live(f"http://127.0.0.1:{listener.getsockname()[1]}", ui.context, app, database)
    finally:
        server.should_exit = True
        thread.join(20)
        listener.close()
        for variable, value in before.items():
            if value is None:
                os.environ.pop(variable, None)
            else:
                os.environ[variable] = value
