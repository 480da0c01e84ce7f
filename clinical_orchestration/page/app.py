"""The ASGI application of port 8085."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Request
from starlette.datastructures import Headers
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, RedirectResponse
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Receive, Scope, Send

from clinical_orchestration.page.airflow_api import API_PREFIX, AirflowApi
from clinical_orchestration.page.alerts import browser_link, read_alerts
from clinical_orchestration.page.bounded import Bounded
from clinical_orchestration.page.dagster_ui import PREFIX, DagsterUi, open_workspace, ping_code_servers
from clinical_orchestration.page.health import (
    DAEMON_SERVICES,
    HealthMonitor,
    instance_heartbeats,
    postgres_heartbeats,
)
from clinical_orchestration.page.models import (
    ModelView,
    RetrainingView,
    read_models,
    read_retraining,
    why_unread,
)
from clinical_orchestration.page.pipelines import PipelinesView, read_pipelines
from clinical_orchestration.page.settings import PageSettings
from clinical_orchestration.page.stack_state import Service, read_stack_state

if TYPE_CHECKING:
    import jinja2

    from clinical_orchestration.stores.alerts import AlertsView

LEVELS = (
    "infrastructure", "data ingestion", "data processing", "feature engineering", "ML pipeline", "orchestration",
)  # fmt: skip
PIPELINES_LIMIT_SECONDS = 4.0
MODELS_LIMIT_SECONDS = 4.0
ALERTS_LIMIT_SECONDS = 2.5

_FOLDER = Path(__file__).parent
_CONTENT_POLICY = "default-src 'none'; style-src 'self'; img-src 'self' data:; base-uri 'none'; form-action 'self'"

_logger = logging.getLogger("clinical_orchestration.page")


class SameSite:
    """Refuses what only a foreign web site would send to an address without a login.

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


@cache
def _templates() -> jinja2.Environment:
    import jinja2

    return jinja2.Environment(loader=jinja2.FileSystemLoader(_FOLDER / "templates"), autoescape=True)


def create_app(settings: PageSettings | None = None, ui: DagsterUi | None = None) -> FastAPI:
    """Build the application.

    Args:
        settings: default: from the environment.
        ui: the Dagster UI; default: the instance and workspace of ``DAGSTER_HOME``, opened in the background.
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

    def pipelines() -> PipelinesView | None:
        context = dagster_ui.context
        return None if context is None else read_pipelines(context, PREFIX)

    monitor = HealthMonitor(heartbeats, lambda: ping_code_servers(settings.workspace_file), daemon_process)
    bounded_pipelines = Bounded(pipelines, PIPELINES_LIMIT_SECONDS, fresh_seconds=1.0)
    bounded_alerts = Bounded(lambda: read_alerts(url), ALERTS_LIMIT_SECONDS, fresh_seconds=1.0)

    bounded_models = Bounded(lambda: read_models(settings.mlflow_url), MODELS_LIMIT_SECONDS, fresh_seconds=2.0)

    def retraining() -> dict[str, RetrainingView]:
        return {} if dagster_ui.instance is None else read_retraining(dagster_ui.instance)

    bounded_retraining = Bounded(retraining, PIPELINES_LIMIT_SECONDS, fresh_seconds=2.0)

    async def models_now() -> tuple[tuple[ModelView, ...] | None, str]:
        """Return the models, or None and why they cannot be told: that is not the same as none."""
        try:
            return await bounded_models(), ""
        except Exception as error:
            _logger.warning("the models cannot be read: %s", type(error).__name__)
            return None, why_unread(error)

    async def retraining_now() -> dict[str, RetrainingView]:
        """Return the newest retraining decisions; none where they cannot be read, which the pipelines' note says."""
        try:
            return await bounded_retraining()
        except Exception as error:
            _logger.warning("the retraining decisions cannot be read: %s", type(error).__name__)
            return {}

    async def alerts_now() -> AlertsView | None:
        """Return the alerts, or None where they cannot be read: that is not the same as none."""
        try:
            return await bounded_alerts()
        except Exception as error:
            _logger.warning("the alerts cannot be read: %s", type(error).__name__)
            return None

    # without a login, the API may be asked from this machine only
    airflow_api = None if settings.allow_remote else AirflowApi(lambda: dagster_ui.context, url)

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        dagster_ui.start()
        if airflow_api is not None:
            airflow_api.start()
        try:
            yield
        finally:
            if airflow_api is not None:
                airflow_api.close()
            dagster_ui.close()

    app = FastAPI(title="Clinical orchestration", docs_url=None, redoc_url=None, openapi_url=None, lifespan=lifespan)
    app.add_middleware(SameSite, host_names=frozenset() if settings.allow_remote else settings.host_names)

    @app.get("/health")
    async def health() -> JSONResponse:
        """Answer in Airflow's shape; the status is 200 whatever it says, as there."""
        return JSONResponse((await monitor.check()).as_airflow(), headers={"Cache-Control": "no-store"})

    @app.get("/alerts.json")
    async def alerts_json() -> JSONResponse:
        """Answer open alerts, those resolved in the last week, and how the channels do; 503 without database."""
        view = await alerts_now()
        headers = {"Cache-Control": "no-store"}
        if view is None:
            return JSONResponse({"error": "the alerts cannot be read: the database does not answer"}, 503, headers)
        return JSONResponse(view.as_dict(), headers=headers)

    @app.get("/", response_class=HTMLResponse)
    async def index(request: Request) -> HTMLResponse:
        """Show pipelines, alerts, models, health and services."""
        health_now, alerts, (models, models_note), decisions = await asyncio.gather(
            monitor.check(), alerts_now(), models_now(), retraining_now()
        )
        view: PipelinesView | None = None
        note = "The Dagster workspace is not open yet; this needs the database."
        try:
            view = await bounded_pipelines()
        except Exception as error:
            _logger.warning("the pipelines cannot be read: %s", type(error).__name__)
            note = "The pipelines cannot be read now; the database or the code server does not answer."
        if view is not None and not view.pipelines:
            note = "No pipeline is loaded."
        state = read_stack_state(settings.status_file)
        services = sorted(state.services, key=lambda service: service.level) if state else []
        levels = [
            (f"{level} {LEVELS[level] if 0 <= level < len(LEVELS) else ''}".strip(), list(members))
            for level, members in groupby(services, key=lambda service: service.level)
        ]
        values: dict[str, Any] = {
            "pipelines": view.pipelines if view else (),
            "problems": view.problems if view else (),
            "pipelines_note": note,
            "alerts": alerts,
            "link": browser_link,
            "models": models,
            "models_note": models_note,
            "retraining": decisions,
            "health": health_now.as_airflow(),
            "levels": levels,
            "stale": bool(state and state.stale),
            "age_seconds": state.age_seconds if state else 0.0,
            "mlflow_url": settings.mlflow_url,
            "serving_url": settings.serving_url.rstrip("/"),
            "now": datetime.now(UTC),
        }
        return HTMLResponse(
            _templates().get_template("index.html").render(values),
            headers={
                "Cache-Control": "no-store",
                "Content-Security-Policy": _CONTENT_POLICY,
                "X-Content-Type-Options": "nosniff",
                "X-Frame-Options": "DENY",
                "Referrer-Policy": "same-origin",
            },
        )

    @app.get(PREFIX, include_in_schema=False)
    async def dagster_root() -> RedirectResponse:
        """Add the slash."""
        return RedirectResponse(f"{PREFIX}/")

    if airflow_api is not None:
        # the same answer as at the address that dashboards and load balancers know
        app.add_api_route(f"{API_PREFIX}/health", health, methods=["GET"])
        app.mount(API_PREFIX, airflow_api, name="airflow")
    app.mount("/static", StaticFiles(directory=_FOLDER / "static"), name="static")
    app.mount(PREFIX, dagster_ui, name="dagster")
    return app
