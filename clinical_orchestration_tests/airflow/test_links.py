"""Addresses of Airflow's web page, as people have bookmarked them and tools link to them."""

from __future__ import annotations

from collections.abc import Iterator
from urllib.parse import quote

import httpx
import pytest

from clinical_orchestration_tests.airflow.live import ADMIN, live_page
from clinical_orchestration_tests.databases import new_database

pytestmark = pytest.mark.integration

DAG, RUN = "model_monitoring", "manual__2025-10-25T00:00:00+00:00"
PLACE = f"/runs/{DAG}/{quote(RUN, safe='')}"


@pytest.fixture(scope="module")
def browser(postgres_env: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """Somebody who has logged in, on a page with one run."""
    database = new_database(postgres_env["POSTGRES_URL"], "links")
    name, _, password = ADMIN.partition(":")
    with live_page(database, tmp_path_factory.mktemp("links")) as live:
        made = httpx.post(
            f"{live.url}/api/v1/dags/{DAG}/dagRuns",
            auth=(name, password),
            json={"logical_date": "2025-10-25T00:00:00Z"},
        )
        assert made.json()["dag_run_id"] == RUN
        with httpx.Client(base_url=live.url, headers={"accept": "text/html"}, timeout=30) as client:
            client.post("/login", data={"username": name, "password": password})
            yield client


@pytest.mark.parametrize(
    ("address", "place"),
    [
        ("/home", "/"),
        (f"/dags/{DAG}", f"/#pipeline-{DAG}"),
        (f"/dags/{DAG}/grid", f"/#pipeline-{DAG}"),
        (f"/dags/{DAG}/graph", f"/#pipeline-{DAG}"),
        (f"/dags/{DAG}/runs", f"/#pipeline-{DAG}"),
        (f"/dags/{DAG}/grid?dag_run_id={quote(RUN)}", PLACE),
        (f"/dags/{DAG}/graph?run_id={quote(RUN)}&tab=graph", PLACE),
        (f"/dags/{DAG}/grid?dag_run_id={quote(RUN)}&task_id=detect_data_drift&tab=logs",
         f"{PLACE}?task=detect_data_drift#task"),
        (f"/log?dag_id={DAG}&task_id=detect_data_drift&execution_date=2025-10-25T00%3A00%3A00%2B00%3A00",
         f"{PLACE}?task=detect_data_drift#task"),
        (f"/graph?dag_id={DAG}&execution_date=2025-10-25T00:00:00Z", PLACE),
        (f"/grid?dag_id={DAG}&execution_date=1999-01-01", f"/#pipeline-{DAG}"),
        (f"/tree?dag_id={DAG}&execution_date=never", f"/#pipeline-{DAG}"),
        ("/graph", "/"),
        ("/dags/%2F%2Fevil.example", "/#pipeline-"),
        ("/log?dag_id=//evil.example&dag_run_id=//x", "/runs/%2F%2Fevil.example/%2F%2Fx"),
    ],
)  # fmt: skip
def test_they_lead_to_their_places_here(browser: httpx.Client, address: str, place: str) -> None:
    answer = browser.get(address)
    if "%2F%2Fevil" in address:  # starlette decodes the path before it looks for a route
        assert answer.status_code in (302, 404)
        assert not answer.headers.get("location", "/").startswith("//")
        return
    assert (answer.status_code, answer.headers["location"]) == (302, place)


def test_the_places_are_there(browser: httpx.Client) -> None:
    shown = browser.get(f"/dags/{DAG}/grid?dag_run_id={quote(RUN)}&task_id=detect_data_drift", follow_redirects=True)
    assert shown.status_code == 200
    assert 'id="row-detect_data_drift"' in shown.text
    assert f'id="pipeline-{DAG}"' in browser.get("/").text


def test_who_is_not_logged_in_comes_back_after_the_login(browser: httpx.Client) -> None:
    with httpx.Client(base_url=browser.base_url, headers={"accept": "text/html"}) as stranger:
        answer = stranger.get(f"/dags/{DAG}/grid?dag_run_id=a%2Bb")
    assert answer.headers["location"] == f"/login?next=%2Fdags%2F{DAG}%2Fgrid%3Fdag_run_id%3Da%252Bb"
