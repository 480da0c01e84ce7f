"""The pages for people: the front page and one page a run."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from starlette.requests import Request
from starlette.responses import HTMLResponse

from clinical_orchestration.airflow.control import RefusedError, UnknownError
from clinical_orchestration.airflow.logs import LogReader
from clinical_orchestration.page.bounded import Bounded
from clinical_orchestration.page.dagster_ui import PREFIX
from clinical_orchestration.page.front import NO_DATABASE, NOT_OPEN, FrontPage
from clinical_orchestration.page.rendering import render, render_error
from clinical_orchestration.page.run_view import read_run
from clinical_orchestration.page.visitor import visitor_of

if TYPE_CHECKING:
    from fastapi import FastAPI

    from clinical_orchestration.airflow.control import Control

RUN_LIMIT_SECONDS = 5.0
NOT_ALLOWED = "Your roles do not permit this; an administrator gives roles."

_logger = logging.getLogger("clinical_orchestration.page")


def add_views(app: FastAPI, front: FrontPage, control: Control | None) -> None:
    """Add the pages to an application.

    Args:
        app: the application of port 8085.
        front: reads what the front page shows.
        control: Airflow's view of the instance; None without a database.
    """
    logs = LogReader(control) if control is not None else None

    @app.get("/", response_class=HTMLResponse)
    async def index(request: Request) -> HTMLResponse:
        """Show pipelines, alerts, quality, models, health and services."""
        if not visitor_of(request).can("get_dags"):
            return render_error(request, 403, "Not allowed", NOT_ALLOWED)
        # the page's own script asks so after a change
        anew = "no-cache" in request.headers.get("cache-control", "")
        return render(request, "front.html", await front.values(anew=anew))

    @app.get("/runs/{dag_id}/{run_id}", response_class=HTMLResponse)
    async def run(request: Request, dag_id: str, run_id: str) -> HTMLResponse:
        """Show a run with its task graph; ``?task=`` and ``?try=`` choose a log."""
        visitor = visitor_of(request)
        if not (visitor.can("get_dag_run") and visitor.can("get_task_instances")):
            return render_error(request, 403, "Not allowed", NOT_ALLOWED)
        if control is None:
            return render_error(request, 503, "No database", NO_DATABASE)
        readable = logs if visitor.can("get_log") else None
        task, number = request.query_params.get("task", ""), request.query_params.get("try", "")
        chosen = int(number) if number.isascii() and number.isdigit() and int(number[:9]) > 0 else None
        try:
            view = await Bounded(
                lambda: read_run(control, readable, dag_id, run_id, task, chosen, PREFIX), RUN_LIMIT_SECONDS
            )()
        except UnknownError as error:
            return render_error(request, 404, "Not found", str(error))
        except RefusedError:
            return render_error(request, 503, "Not ready", NOT_OPEN)
        except Exception as error:
            _logger.warning("the run cannot be read: %s", type(error).__name__)
            return render_error(
                request, 503, "Not readable now", "The database or the code server does not answer; try again."
            )
        return render(request, "run.html", {"view": view, "task": task})
