"""The page: front page, Dagster UI under its prefix, what foreign sites may not do."""

from __future__ import annotations

import json
import os
import re
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from clinical_orchestration.page.__main__ import main
from clinical_orchestration.page.app import create_app
from clinical_orchestration.page.dagster_ui import DagsterUi
from clinical_orchestration.page.settings import PageSettings, is_loopback
from clinical_orchestration_tests.page.support import EverybodyIs


def test_the_prefix_without_slash_leads_to_the_ui(page: TestClient) -> None:
    answer = page.get("/dagster")
    assert answer.status_code == 307
    assert answer.headers["location"] == "/dagster/"


@pytest.mark.parametrize("path", ["/dagster/", "/dagster/runs", "/dagster/jobs"])
def test_every_view_of_the_ui_is_served_under_the_prefix(page: TestClient, path: str) -> None:
    answer = page.get(path)
    assert answer.status_code == 200
    assert '"pathPrefix": "/dagster"' in answer.text


def test_static_files_of_the_ui_are_found_where_its_page_says(page: TestClient) -> None:
    script = re.search(r'src="(/dagster/[^"]+\.js)"', page.get("/dagster/").text)
    assert script is not None
    answer = page.get(script[1])
    assert answer.status_code == 200
    assert "javascript" in answer.headers["content-type"]


def test_graphql_over_http_lists_the_jobs(page: TestClient) -> None:
    query = "{ repositoriesOrError { ... on RepositoryConnection { nodes { jobs { name } } } } }"
    answer = page.post("/dagster/graphql", json={"query": query}).json()
    names = {job["name"] for node in answer["data"]["repositoriesOrError"]["nodes"] for job in node["jobs"]}
    assert names == {"good_pipeline", "bad_pipeline", "long_pipeline"}


def test_graphql_over_websocket_is_acknowledged(page: TestClient) -> None:
    with page.websocket_connect("/dagster/graphql", subprotocols=["graphql-ws"]) as socket:
        socket.send_json({"type": "connection_init"})
        assert socket.receive_json()["type"] == "connection_ack"


def test_the_front_page_asks_nothing_of_the_outside(page: TestClient) -> None:
    answer = page.get("/")
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    assert not re.search(r'(src|href)="https?://(?!127\.0\.0\.1)', answer.text)
    assert "<script" not in re.sub(r'<script src="/static/page.js[^"]*" defer></script>', "", answer.text)
    assert not re.search(r' (style|on\w+)="', answer.text)  # the policy would block it
    assert page.get("/static/page.css").status_code == 200
    assert page.get("/static/page.js").status_code == 200


def test_an_unknown_host_name_is_refused(page: TestClient) -> None:
    assert page.get("/health", headers={"host": "evil.example"}).status_code == 400


@pytest.mark.parametrize(
    ("method", "path", "headers", "status"),
    [
        ("POST", "/dagster/graphql", {"origin": "http://evil.example"}, 403),
        ("POST", "/dagster/graphql", {"origin": "http://testserver"}, 400),  # reaches Dagster, which misses a query
        (
            "GET",
            "/dagster/graphql?query={version}",
            {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"},
            403,
        ),
        ("GET", "/", {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"}, 200),
        ("GET", "/health", {"sec-fetch-site": "cross-site", "sec-fetch-mode": "no-cors"}, 403),
    ],
)
def test_other_sites_cannot_act_here(
    page: TestClient, method: str, path: str, headers: dict[str, str], status: int
) -> None:
    assert page.request(method, path, headers=headers).status_code == status


def _never(_: object) -> Any:
    raise ConnectionError("no database")


def _page_without_instance(tmp_path: Path, **values: str) -> TestClient:
    settings = PageSettings(
        **{"DAGSTER_HOME": str(tmp_path), "POSTGRES_URL": "", "CLINICAL_PAGE_ALLOWED_HOSTS": "testserver", **values}
    )
    return TestClient(create_app(settings, DagsterUi(_never), EverybodyIs("Admin")))


def test_without_a_database_the_page_is_up_and_says_what_is_missing(tmp_path: Path) -> None:
    with _page_without_instance(tmp_path) as client:
        health = client.get("/health")
        assert health.status_code == 200
        assert {part["status"] for part in health.json().values()} == {"unhealthy"}
        assert "POSTGRES_URL is not set" in client.get("/").text
        starting = client.get("/dagster/", headers={"accept": "text/html"})
        assert starting.status_code == 503
        assert "is starting" in starting.text
        assert client.post("/dagster/graphql", json={"query": "{version}"}).status_code == 503


def test_nobody_gets_in_without_a_login(tmp_path: Path) -> None:
    settings = PageSettings(DAGSTER_HOME=str(tmp_path), POSTGRES_URL="", CLINICAL_PAGE_ALLOWED_HOSTS="testserver")
    app = create_app(settings, DagsterUi(_never))
    with TestClient(app, follow_redirects=False) as client:
        for path in ("/", "/dagster/", "/dagster/runs", "/runs/a/b"):
            answer = client.get(path, headers={"accept": "text/html"})
            assert (answer.status_code, answer.headers["location"].split("=")[0]) == (303, "/login?next"), path
        for path in ("/alerts.json", "/dagster/graphql", "/api/v1/dags", "/api/v1/nothing", "/openapi.json", "/docs"):
            assert client.get(path).status_code == 401, path
        for path in ("/health", "/api/v1/health", "/static/page.css", "/login"):
            assert client.get(path).status_code == 200, path


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("", ["POSTGRES_URL is not set", "POSTGRES_URL is not set"]),
        (
            "postgresql://u:hush-hush@127.0.0.1:9/none",
            ["The database or the code server does not answer", "workspace is not open yet"],
        ),
    ],
)
def test_a_run_that_cannot_be_read_is_not_called_absent(tmp_path: Path, url: str, said: list[str]) -> None:
    with _page_without_instance(tmp_path, POSTGRES_URL=url) as client:
        pages = [client.get("/runs/clinical_data_pipeline/r1?task=train_model&try=x"), client.get("/")]
    assert [page.status_code for page in pages] == [503, 200]
    for page, text in zip(pages, said, strict=True):
        assert text in page.text
        assert "hush-hush" not in page.text


def test_who_may_not_read_pipelines_is_told_so(tmp_path: Path) -> None:
    door = EverybodyIs("Public")
    door.identity = replace(door.identity, permissions=frozenset({("can_read", "Website")}))
    settings = PageSettings(DAGSTER_HOME=str(tmp_path), POSTGRES_URL="", CLINICAL_PAGE_ALLOWED_HOSTS="testserver")
    with TestClient(create_app(settings, DagsterUi(_never), door)) as client:
        for path in ("/", "/runs/p/r"):
            answer = client.get(path)
            assert answer.status_code == 403
            assert "Your roles do not permit this" in answer.text


def test_the_api_is_there_too_where_others_reach_the_page(tmp_path: Path) -> None:
    with _page_without_instance(tmp_path, CLINICAL_PAGE_ALLOW_REMOTE="true") as client:
        answer = client.get("/api/v1/dags")
        assert (answer.status_code, answer.json()["title"]) == (503, "Service Unavailable")
        assert client.get("/api/v1/health").status_code == 200


def test_services_are_shown_by_level_and_a_dead_process_is_not_healthy(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    services = [
        {"name": "kafka", "title": "Kafka", "level": 0, "state": "healthy", "pid": os.getpid(), "latency_ms": 3.2},
        {"name": "mlflow", "title": "MLflow <b>", "level": 4, "state": "healthy", "pid": 2**22 - 3, "port": 5000},
    ]
    (run / "status.json").write_text(json.dumps({"services": services, "level": 5}))
    with _page_without_instance(tmp_path, CLINICAL_HOME=str(tmp_path)) as client:
        text = client.get("/").text
    assert "0 infrastructure" in text
    assert "4 ML pipeline" in text
    rows = {
        match[1]: match[2]
        for match in re.finditer(r'<li id="service-(\w+)".*?<span class="state ([\w-]+)">', text, re.S)
    }
    assert rows == {"kafka": "s-success", "mlflow": "s-failed"}
    assert "3.2 ms" in text
    assert "MLflow &lt;b&gt;" in text


def test_a_report_of_a_dead_supervisor_is_called_old(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    status = run / "status.json"
    status.write_text(json.dumps({"services": [{"name": "s3", "level": 0, "state": "healthy"}]}))
    os.utime(status, (time.time() - 120, time.time() - 120))
    with _page_without_instance(tmp_path, CLINICAL_HOME=str(tmp_path)) as client:
        assert "may be out of date" in client.get("/").text


@pytest.mark.parametrize(
    ("host", "loopback"),
    [("127.0.0.1", True), ("localhost", True), ("::1", True), ("::", False), ("10.0.0.7", False), ("db", False)],
)
def test_loopback(host: str, loopback: bool) -> None:
    assert is_loopback(host) is loopback


def test_other_addresses_than_loopback_are_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("CLINICAL_PAGE_ALLOW_REMOTE", raising=False)
    assert main(["--host", "10.0.0.7", "--port", "1"]) == 2
    assert "CLINICAL_PAGE_ALLOW_REMOTE" in capsys.readouterr().err


def test_a_missing_instance_is_refused_with_the_cure(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("DAGSTER_HOME", raising=False)
    assert main([]) == 2
    assert "--env" in capsys.readouterr().err
