"""The ASGI application of port 8085."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator

from fastapi import FastAPI
from starlette.datastructures import Headers
from starlette.responses import JSONResponse, PlainTextResponse, RedirectResponse
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Receive, Scope, Send

from clinical_orchestration.page.airflow_api import API_PREFIX, AirflowApi
from clinical_orchestration.page.airflow_links import add_airflow_links
from clinical_orchestration.page.auditing import AuditedUi
from clinical_orchestration.page.dagster_ui import PREFIX, DagsterUi, open_workspace, ping_code_servers
from clinical_orchestration.page.door import Door
from clinical_orchestration.page.front import FrontPage
from clinical_orchestration.page.health import (
    DAEMON_SERVICES,
    HealthMonitor,
    instance_heartbeats,
    postgres_heartbeats,
)
from clinical_orchestration.page.keeper import Doorkeeper, Keeper
from clinical_orchestration.page.metrics import Metrics
from clinical_orchestration.page.rendering import STATIC
from clinical_orchestration.page.settings import PageSettings
from clinical_orchestration.page.stack_state import Service, read_stack_state
from clinical_orchestration.page.views import add_views


class SameSite:
    """Refuses what only a foreign web site would send here.

    A request must name one of the hosts that the page answers for (no rebound DNS name), and where a browser says
    from which site a request comes, that site must be this one, except for plain navigation.

    Args:
        app: the application behind.
        host_names: names to answer for, lower case; empty answers for all.
    """

    def __init__(self, app: ASGIApp, host_names: frozenset[str]) -> None:
        self._app = app
        self._host_names = host_names

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or answer 400 or 403."""
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        host = headers.get("host", "").lower()
        name = host.rpartition(":")[0] if ":" in host and not host.endswith("]") else host
        refusal: PlainTextResponse | None = None
        if self._host_names and name.strip("[]") not in self._host_names:
            refusal = PlainTextResponse("unknown host name; add it to CLINICAL_PAGE_ALLOWED_HOSTS", status_code=400)
        elif _foreign(scope, headers, host):
            refusal = PlainTextResponse("requests from other sites are refused", status_code=403)
        if refusal is None:
            await self._app(scope, receive, send)
        elif scope["type"] == "websocket":
            await receive()
            await send({"type": "websocket.close", "code": 1008})
        else:
            await refusal(scope, receive, send)


def _foreign(scope: Scope, headers: Headers, host: str) -> bool:
    """Say whether a browser sends this for another site; following a link to a page is allowed."""
    origin = headers.get("origin")
    if scope.get("method") not in ("GET", "HEAD") and origin and origin.partition("://")[2].lower() != host:
        return True
    navigation = headers.get("sec-fetch-mode") == "navigate" and not scope["path"].rstrip("/").endswith("/graphql")
    return headers.get("sec-fetch-site") == "cross-site" and not navigation


def create_app(
    settings: PageSettings | None = None, ui: DagsterUi | None = None, door: Doorkeeper | None = None
) -> FastAPI:
    """Build the application.

    Args:
        settings: default: from the environment.
        ui: the Dagster UI; default: the instance and workspace of ``DAGSTER_HOME``, opened in the background.
        door: knows who asks; default: by the users of the database.
    """
    settings = settings or PageSettings()
    url = settings.postgres_url.get_secret_value()
    dagster_ui = ui or DagsterUi(lambda stack: open_workspace(settings.workspace_file, stack))

    def heartbeats() -> dict[str, float]:
        if url:
            return postgres_heartbeats(url)
        if dagster_ui.instance is None:
            raise ConnectionError("the instance is not open")
        return instance_heartbeats(dagster_ui.instance)

    def daemon_process() -> Service | None:
        state = read_stack_state(settings.status_file)
        found = (state.service(name) for name in DAEMON_SERVICES) if state else iter(())
        return next((service for service in found if service is not None), None)

    monitor = HealthMonitor(heartbeats, lambda: ping_code_servers(settings.workspace_file), daemon_process)
    airflow_api = AirflowApi(lambda: dagster_ui.context, url)
    front = FrontPage(settings, dagster_ui, airflow_api.control, monitor)

    keeper = door or Keeper.from_settings(settings, airflow_api.trail)

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        dagster_ui.start()
        airflow_api.start()
        keeper.open()
        try:
            yield
        finally:
            keeper.close()
            airflow_api.close()
            dagster_ui.close()

    app = FastAPI(title="Clinical orchestration", docs_url=None, redoc_url=None, openapi_url=None, lifespan=lifespan)
    app.add_middleware(Door, keeper=keeper)
    app.add_middleware(SameSite, host_names=frozenset() if settings.allow_remote else settings.host_names)

    @app.get("/health")
    async def health() -> JSONResponse:
        """Answer in Airflow's shape; the status is 200 whatever it says, as there."""
        return JSONResponse((await monitor.check()).as_airflow(), headers={"Cache-Control": "no-store"})

    app.add_route("/metrics", Metrics(lambda: airflow_api.control, url, settings.status_file).answer, methods=["GET"])

    @app.get("/alerts.json")
    async def alerts_json() -> JSONResponse:
        """Answer open alerts, those resolved in the last week, and how the channels do; 503 without database."""
        view = await front.alerts()
        headers = {"Cache-Control": "no-store"}
        if view is None:
            return JSONResponse({"error": "the alerts cannot be read: the database does not answer"}, 503, headers)
        return JSONResponse(view.as_dict(), headers=headers)

    add_views(app, front, airflow_api.control)
    add_airflow_links(app, airflow_api.control)

    @app.get(PREFIX, include_in_schema=False)
    async def dagster_root() -> RedirectResponse:
        """Add the slash."""
        return RedirectResponse(f"{PREFIX}/")

    # the same answer as at the address that dashboards and load balancers know
    app.add_api_route(f"{API_PREFIX}/health", health, methods=["GET"])
    app.mount(API_PREFIX, airflow_api, name="airflow")
    app.mount("/static", StaticFiles(directory=STATIC), name="static")
    trail = airflow_api.trail
    app.mount(PREFIX, dagster_ui if trail is None else AuditedUi(dagster_ui, trail), name="dagster")
    return app
