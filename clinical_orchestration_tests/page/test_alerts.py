"""Alerts on the page and as JSON."""

from __future__ import annotations

import re
import socket
import time
from dataclasses import replace
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from clinical_orchestration.alerts.model import Alert, Severity
from clinical_orchestration.page.alerts import browser_link
from clinical_orchestration.page.app import create_app
from clinical_orchestration.page.dagster_ui import DagsterUi
from clinical_orchestration.page.settings import PageSettings
from clinical_orchestration.stores.alert_channels import ChannelError
from clinical_orchestration.stores.alerts import AlertCenter, PostgresAlertStore
from clinical_orchestration_tests.page.support import EverybodyIs

ALERT = Alert(
    key="run:page",
    severity=Severity.ERROR,
    title="clinical_data_pipeline failed <b>",
    what="The step train_model failed.",
    where="/dagster/runs/1",
    action="Look at the log of the step.",
    source="run_failure_sensor",
    trial="simulated",
)


def page_of(tmp_path: Path, url: str) -> TestClient:
    def never(_: object) -> object:
        raise ConnectionError("no database")

    settings = PageSettings(
        DAGSTER_HOME=str(tmp_path), POSTGRES_URL=url, CLINICAL_HOME="", CLINICAL_PAGE_ALLOWED_HOSTS="testserver"
    )
    return TestClient(create_app(settings, DagsterUi(never), EverybodyIs("Admin")))  # type: ignore[arg-type]


@pytest.fixture
def database(postgres_env: dict[str, str]) -> str:
    return postgres_env["POSTGRES_URL"]


@pytest.mark.integration
def test_the_page_shows_open_and_resolved_alerts_and_failing_channels(tmp_path: Path, database: str) -> None:
    class Down:
        name = "slack"

        def send(self, message: object) -> None:
            raise ChannelError("Slack does not answer: ConnectError")

    notifier = AlertCenter(PostgresAlertStore(database), [Down()])
    notifier.send(ALERT)
    notifier.send(replace(ALERT, key="run:other", title="over already"))
    notifier.resolve("run:other", "it succeeded")
    with page_of(tmp_path, database) as client:
        text = client.get("/").text
        answer = client.get("/alerts.json")
    assert re.search(r'<a href="/dagster/runs/1">clinical_data_pipeline failed &lt;b&gt;</a>', text)
    assert "Look at the log of the step." in text
    assert "over already" in text
    assert "it succeeded" in text
    assert "The channel slack fails" in text
    assert answer.status_code == 200
    body = answer.json()
    assert [alert["key"] for alert in body["open"]] == ["run:page"]
    assert body["open"][0]["severity"] == "error"
    assert [alert["note"] for alert in body["resolved"]] == ["it succeeded"]
    assert body["channels"][0]["failing"] is True
    assert body["channels"][0]["waiting"] == 3


@pytest.mark.parametrize("url", ["", "postgresql://u:hush-hush@127.0.0.1:9/none"])
def test_without_the_database_the_page_does_not_claim_that_all_is_well(tmp_path: Path, url: str) -> None:
    with page_of(tmp_path, url) as client:
        page, json = client.get("/"), client.get("/alerts.json")
    assert page.status_code == 200
    assert "The alerts cannot be read now" in page.text
    assert "No alert is open" not in page.text
    assert json.status_code == 503
    assert "hush-hush" not in json.text + page.text


def test_a_database_that_hangs_does_not_hang_the_page(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"postgresql://u:p@127.0.0.1:{silent.getsockname()[1]}/none"
        with page_of(tmp_path, url) as client:
            began = time.monotonic()
            assert client.get("/alerts.json").status_code == 503
            assert time.monotonic() - began < 4


@pytest.mark.parametrize(
    ("where", "link"),
    [("/dagster/runs/1", "/dagster/runs/1"), ("//evil.example/x", None), ("javascript:alert(1)", None)],
)
def test_only_what_a_browser_may_open_becomes_a_link(where: str, link: str | None) -> None:
    assert browser_link(where) == link
