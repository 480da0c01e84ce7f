"""The Dagster UI inside the page process, under ``/dagster/``.

The instance needs the database and the workspace its code servers; both may come later than the page. They are opened
in the background and tried again, and until then ``/dagster/`` says so with status 503.
"""

from __future__ import annotations

import html
import logging
import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from starlette.responses import HTMLResponse, JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from clinical_orchestration.instance import ensure_pools

if TYPE_CHECKING:
    from dagster import DagsterInstance
    from dagster._core.workspace.context import WorkspaceProcessContext

PREFIX = "/dagster"
RETRY_SECONDS = 2.0
POOL_OVERFLOW = 20  # connections beyond the one kept: the UI's many small queries come in parallel
STATEMENT_TIMEOUT_MS = 15_000

_logger = logging.getLogger("clinical_orchestration.page")

# Dagster's modules import one another in circles: two threads that import different ones at once meet half-made ones
_IMPORTING = threading.Lock()

_STARTING = """<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Dagster is starting</title>
<meta http-equiv="refresh" content="3"><style>:root{{color-scheme:light dark}}body{{font:16px/1.5 system-ui,sans-serif;
max-width:40rem;margin:4rem auto;padding:0 1rem}}</style></head><body><h1>The Dagster UI is starting</h1>
<p>{reason}</p><p>This page tries again every 3 seconds. <a href="/">Back to the platform</a></p></body></html>"""


def open_workspace(workspace_file: Path, stack: ExitStack) -> WorkspaceProcessContext:
    """Open the instance of ``DAGSTER_HOME`` and the workspace of a ``workspace.yaml``.

    A code server that does not answer yet is no error: the workspace shows it as failed and takes it up when it does.
    Both are closed by `stack`.
    """
    from dagster import DagsterInstance
    from dagster import __version__ as version
    from dagster._core.workspace.context import WorkspaceProcessContext
    from dagster._core.workspace.load_target import WorkspaceFileTarget

    if not workspace_file.is_file():
        raise FileNotFoundError(f"{workspace_file} is missing; DAGSTER_HOME must name the folder that holds it")
    instance = stack.enter_context(DagsterInstance.get())
    instance.optimize_for_webserver(STATEMENT_TIMEOUT_MS, pool_recycle=3600, max_overflow=POOL_OVERFLOW)
    check_pooled_connections(instance)
    ensure_pools(instance)
    _store_defaults()
    return stack.enter_context(
        WorkspaceProcessContext(instance, WorkspaceFileTarget(paths=[str(workspace_file)]), version=version)
    )


def _store_defaults() -> None:
    """Store the defaults of variables and connections where they are absent; they act without being stored, too."""
    import os

    from clinical_orchestration.configuration import load_defaults
    from clinical_orchestration.platform.store import PlatformStore, StoreUnavailableError

    url = os.environ.get("POSTGRES_URL", "")
    if not url:
        return
    try:
        load_defaults(PlatformStore(url))
    except StoreUnavailableError as error:
        _logger.warning("the defaults of variables and connections could not be stored: %s", error)


def check_pooled_connections(instance: DagsterInstance) -> None:
    """Try each pooled connection before it is used, so that a restarted database costs no failed request.

    Dagster sets up its pools without this; a connection that fails the check is replaced by the pool. It costs one
    round trip, 0.1 ms on a local socket.
    """
    from sqlalchemy import event
    from sqlalchemy.exc import DisconnectionError

    def check(connection: Any, record: object, proxy: object) -> None:
        try:
            with connection.cursor() as cursor:
                cursor.execute("SELECT 1")
        except Exception as error:
            raise DisconnectionError("the database closed this connection") from error

    for storage in (instance.run_storage, instance.event_log_storage, instance.schedule_storage):
        engine = getattr(storage, "_engine", None)
        if engine is not None and engine.dialect.name == "postgresql":
            event.listen(engine, "checkout", check)


class DagsterUi:
    """ASGI application of the Dagster UI; mount it at :data:`PREFIX`.

    Args:
        opener: opens the workspace; called in the background until it succeeds.
    """

    def __init__(self, opener: Callable[[ExitStack], WorkspaceProcessContext]) -> None:
        self._opener = opener
        self._app: ASGIApp | None = None
        self._context: WorkspaceProcessContext | None = None
        self._reason = "Waiting for the database."
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._resources = ExitStack()

    @property
    def context(self) -> WorkspaceProcessContext | None:
        """The workspace, or None while it is not open yet."""
        return self._context

    @property
    def instance(self) -> DagsterInstance | None:
        """The instance, or None while it is not open yet."""
        return None if self._context is None else self._context.instance

    def start(self) -> None:
        """Begin to open the workspace; returns at once."""
        self._thread = threading.Thread(target=self._open, name="open-workspace", daemon=True)
        self._thread.start()

    def wait(self, timeout: float) -> bool:
        """Wait until the UI is there; False when `timeout` seconds were not enough."""
        if self._thread is not None:
            self._thread.join(timeout)
        return self._app is not None

    def close(self) -> None:
        """Close workspace and instance."""
        self._stop.set()
        self._app, self._context = None, None
        self._resources.close()

    def _open(self) -> None:
        with _IMPORTING:
            import dagster_webserver.webserver  # noqa: F401

            from clinical_orchestration.page.dagster_roles import create_ui

        while not self._stop.is_set():
            attempt = ExitStack()
            try:
                context = self._opener(attempt)
                app = create_ui(context, PREFIX)
            except Exception as error:
                attempt.close()
                # the text of a database error may carry what the user typed into a URL, so only its kind is shown
                self._reason = f"The instance cannot be opened yet ({type(error).__name__}). Is the database running?"
                if isinstance(error, FileNotFoundError):
                    self._reason = str(error)
                _logger.warning("the Dagster instance cannot be opened yet: %s", type(error).__name__)
                self._stop.wait(RETRY_SECONDS)
                continue
            if self._stop.is_set():
                attempt.close()
                return
            self._resources = attempt
            self._context, self._app = context, app
            _logger.info("the Dagster UI is ready")
            return

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request or websocket below the prefix."""
        app = self._app
        if app is None:
            await self._starting(scope, receive, send)
            return
        # Dagster's routes carry the prefix themselves, so that the mount must not take it off the path
        outer: str = scope.get("root_path", "")
        await app({**scope, "root_path": outer.removesuffix(PREFIX)}, receive, send)

    async def _starting(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await receive()
            await send({"type": "websocket.close", "code": 1013, "reason": "starting"})
            return
        headers = {"Retry-After": "3", "Cache-Control": "no-store"}
        wants_html = any(key == b"accept" and b"text/html" in value for key, value in scope["headers"])
        response: Any
        if wants_html:
            page = _STARTING.format(reason=html.escape(self._reason))
            response = HTMLResponse(page, status_code=503, headers=headers)
        else:
            response = JSONResponse({"detail": self._reason}, status_code=503, headers=headers)
        await response(scope, receive, send)


def ping_code_servers(workspace_file: Path) -> None:
    """Return when every code server of a workspace file answered.

    Raises:
        Exception: one does not, or the file names none.
    """
    with _IMPORTING:
        from dagster import DagsterInstance  # noqa: F401 - the package first, then its parts
        from dagster._core.remote_origin import GrpcServerCodeLocationOrigin
        from dagster._core.workspace.load_target import WorkspaceFileTarget

    origins = WorkspaceFileTarget(paths=[str(workspace_file)]).create_origins()
    servers: Sequence[GrpcServerCodeLocationOrigin] = [
        origin for origin in origins if isinstance(origin, GrpcServerCodeLocationOrigin)
    ]
    if not servers:
        raise LookupError(f"{workspace_file} names no code server")
    for origin in servers:
        origin.create_client().get_server_id(timeout=2)
