"""Addresses of Airflow's own web page lead to their places here: people have them as bookmarks, tools link to them."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING
from urllib.parse import quote, urlencode

from starlette.requests import Request
from starlette.responses import RedirectResponse

from clinical_orchestration.page.pipelines import run_link
from clinical_orchestration.page.visitor import visitor_of

if TYPE_CHECKING:
    from fastapi import FastAPI

    from clinical_orchestration.airflow.control import Control

OLD_VIEWS = ("calendar", "code", "dag_details", "duration", "gantt", "graph", "grid", "landing_times", "log",
             "rendered-templates", "task", "tree", "tries", "xcom")  # fmt: skip
"""Views that Airflow had, and to some extent still has, at its root, with the DAG as parameter ``dag_id``."""

_logger = logging.getLogger("clinical_orchestration.page")


def add_airflow_links(app: FastAPI, control: Control | None) -> None:
    """Add the redirects to an application.

    Args:
        app: the application of port 8085.
        control: Airflow's view of the instance; None without a database.
    """

    @app.get("/home", include_in_schema=False)
    def home() -> RedirectResponse:
        """Lead to the front page."""
        return RedirectResponse("/", 302)

    @app.get("/dags/{dag_id}", include_in_schema=False)
    @app.get("/dags/{dag_id}/{view}", include_in_schema=False)
    def dag(request: Request, dag_id: str) -> RedirectResponse:
        """Lead to the run that the parameters name, else to the pipeline."""
        return RedirectResponse(_place(request, control, dag_id), 302)

    def old_view(request: Request) -> RedirectResponse:
        return RedirectResponse(_place(request, control, request.query_params.get("dag_id", "")), 302)

    for name in OLD_VIEWS:
        app.add_route(f"/{name}", old_view, methods=["GET"], include_in_schema=False)


def _place(request: Request, control: Control | None, dag_id: str) -> str:
    params = request.query_params
    run_id = params.get("dag_run_id") or params.get("run_id")
    at = params.get("execution_date") or params.get("logical_date")
    if not run_id and at and dag_id and control is not None and visitor_of(request).can("get_dag_run"):
        run_id = _run_at(control, dag_id, at)
    if not dag_id:
        return "/"
    if not run_id:
        return f"/#pipeline-{quote(dag_id, safe='')}"
    task = params.get("task_id")
    return run_link(dag_id, run_id) + (f"?{urlencode({'task': task})}#task" if task else "")


def _run_at(control: Control, dag_id: str, text: str) -> str | None:
    from clinical_orchestration.airflow.runs import RunFilter
    from clinical_orchestration.api.call import parse_time

    try:
        at = parse_time(text)
        wanted = RunFilter([dag_id], ranges={("execution_date", "gte"): at, ("execution_date", "lte"): at})
        runs, _ = control.runs.list_runs(wanted, limit=1)
    except ValueError:
        return None
    except Exception as error:  # the front page says what does not answer
        _logger.warning("a run cannot be looked up: %s", type(error).__name__)
        return None
    return runs[0].run_id if runs else None
