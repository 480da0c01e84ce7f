"""Airflow's REST API inside the page process, and what keeps it current without requests."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from starlette.responses import Response

if TYPE_CHECKING:
    from dagster._core.workspace.context import WorkspaceProcessContext
    from starlette.types import Receive, Scope, Send

API_PREFIX = "/api/v1"
PERIOD_SECONDS = 2.0

_logger = logging.getLogger("clinical_orchestration.page")


class AirflowApi:
    """ASGI application of ``/api/v1``, and a thread that takes up new runs and starts those that waited.

    Args:
        context: returns the open workspace, or None while it is not open.
        url: database of the instance; empty: every request is answered with 503.
    """

    def __init__(self, context: Callable[[], WorkspaceProcessContext | None], url: str) -> None:
        from clinical_orchestration.airflow.control import Control
        from clinical_orchestration.airflow.database import open_engine
        from clinical_orchestration.api.app import IdentityGate, create_api
        from clinical_orchestration.audit.trail import AuditTrail
        from clinical_orchestration.platform.store import PlatformStore
        from clinical_orchestration.users.store import UserStore

        self._context = context
        self._stop = threading.Event()
        self._engine = open_engine(url) if url else None
        self._starter = ThreadPoolExecutor(1, thread_name_prefix="start-runs")
        self.control = Control(context, self._engine, self._starter) if self._engine is not None else None
        self.trail = AuditTrail(url) if url else None
        self._app = (
            create_api(
                self.control,
                lambda: PlatformStore(url),
                settings=_settings,
                gate=IdentityGate(),
                trail=self.trail,
                users=UserStore(url),
            )
            if self.control
            else None
        )

    def start(self) -> None:
        """Begin to keep the view current."""
        if self.control is not None:
            threading.Thread(target=self._keep_current, name="airflow-view", daemon=True).start()

    def close(self) -> None:
        """End the thread and close the connections."""
        self._stop.set()
        self._starter.shutdown(wait=False, cancel_futures=True)
        if self._engine is not None:
            self._engine.dispose()

    def _keep_current(self) -> None:
        failing = False
        while not self._stop.wait(PERIOD_SECONDS):
            if self.control is None or self._context() is None:
                continue
            try:
                self.control.runs.take_up()
                self.control.runs.project()
                self.control.release_held()
                failing = False
            except Exception as error:
                if not failing:
                    _logger.warning("Airflow's view cannot be kept current: %s", type(error).__name__)
                failing = True

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if self._app is None:
            from clinical_orchestration.api.problems import Problem

            response: Response = Problem(
                503, "The API needs the platform's database: POSTGRES_URL is not set."
            ).response()
            await response(scope, receive, send)
            return
        await self._app(scope, receive, send)


def _settings() -> Mapping[str, Mapping[str, str]]:
    """Return the platform's variables as a section of ``/config``."""
    from clinical_orchestration.settings import Variables

    return {"clinical": {name: str(value) for name, value in Variables().model_dump().items()}}
