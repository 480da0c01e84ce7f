"""The section of models: what MLflow says, what it shows when MLflow is down, and the newest retraining decisions."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import dagster as dg
import httpx
import pytest
from starlette.testclient import TestClient

from clinical_orchestration.page.app import create_app
from clinical_orchestration.page.dagster_ui import DagsterUi
from clinical_orchestration.page.models import model_view, read_models, read_retraining, why_unread
from clinical_orchestration.page.settings import PageSettings
from clinical_orchestration_tests.page.support import EverybodyIs


def version(number: int, **tags: str) -> dict[str, Any]:
    return {
        "version": str(number), "creation_timestamp": 1_760_000_000_000 + number,
        "tags": [{"key": key, "value": value} for key, value in tags.items()],
    }  # fmt: skip


VERSIONS = [
    version(4, decision="refuse", decision_reasons="auroc_floor: 0.5012, must be >= 0.6", promotion="refused",
            decided_at="2026-02-20T08:30:00+00:00"),
    version(3, decision="challenger", decision_reasons="no benefit <b>shown", decided_at="2026-03-01T00:00:00+00:00",
            auroc="0.690 (0.650 to 0.730)"),
    version(2, decision="promote", decided_at="2026-02-01T00:00:00+00:00", rolled_back_at="2026-02-02T10:00:00+00:00",
            rollback_reason="error_rate: 0.9, must be <= 0.05", promotion="rolled back"),
    version(1, promoted_at="2026-02-02T10:00:00+00:00", auroc="0.700 (0.660 to 0.740)", ece="0.030",
            candidate="random_forest"),
]  # fmt: skip
ALIASES = {"champion": "1", "challenger": "3"}


class FakeMlflow(BaseHTTPRequestHandler):
    """The two calls of MLflow's REST API that the page makes; the pilot's model is there, no other."""

    def do_GET(self) -> None:
        asked = urlsplit(self.path)
        query = parse_qs(asked.query)
        body: dict[str, Any] = {"error_code": "RESOURCE_DOES_NOT_EXIST"}
        status = 404
        if query.get("name") == ["adverse-event-predictor"]:
            aliases = [{"alias": name, "version": number} for name, number in ALIASES.items()]
            status, body = 200, {"registered_model": {"name": "adverse-event-predictor", "aliases": aliases}}
        elif query.get("filter") == ["name = 'adverse-event-predictor'"]:
            status, body = 200, {"model_versions": VERSIONS}
        content = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        return


@pytest.fixture
def mlflow() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), FakeMlflow)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def page(tmp_path: Path, mlflow_url: str) -> str:
    def never(_: object) -> object:
        raise ConnectionError("no database")

    settings = PageSettings(
        DAGSTER_HOME=str(tmp_path), POSTGRES_URL="", CLINICAL_PAGE_ALLOWED_HOSTS="testserver",
        MLFLOW_TRACKING_URI=mlflow_url,
    )  # fmt: skip
    with TestClient(create_app(settings, DagsterUi(never), EverybodyIs("Admin"))) as client:  # type: ignore[arg-type]
        return client.get("/").text


def test_both_stories_are_on_the_page(tmp_path: Path, mlflow: str) -> None:
    text = page(tmp_path, mlflow)
    section = text[text.index('id="models"') :]
    assert 'versions/1">version 1</a>' in section
    assert "AUROC 0.700 (0.660 to 0.740)" in section
    assert "since" in section
    assert 'versions/3">version 3</a> waits as challenger' in section
    assert "no benefit &lt;b&gt;shown" in section
    assert "rolled back</span>" in section
    assert "2026-02-02 10:00" in section
    assert "error_rate: 0.9, must be &lt;= 0.05" in section
    # refused before the last decision, and still told
    refused = section[section.index("<h4>Refused</h4>") : section.index("<h4>Rolled back</h4>")]
    assert 'versions/4">version 4</a> <span class="state s-failed">refused</span>' in refused
    assert "2026-02-20 08:30" in refused
    assert "auroc_floor: 0.5012, must be &gt;= 0.6" in refused
    assert "version 2" not in refused
    assert "none yet" in section  # the other trial has no model


def test_without_mlflow_the_page_says_that_it_does_not_know(tmp_path: Path) -> None:
    text = page(tmp_path, "http://127.0.0.1:9")
    assert "MLflow does not answer: which version is champion cannot be told now" in text
    with pytest.raises(httpx.HTTPError):
        read_models("http://127.0.0.1:9")


def test_only_an_absent_mlflow_is_called_absent(tmp_path: Path, mlflow: str) -> None:
    assert why_unread(TimeoutError()) == "MLflow does not answer"
    assert "ValidationError" in why_unread(type("ValidationError", (ValueError,), {})("x"))
    text = page(tmp_path, f"{mlflow}/no%20json?")
    assert "does not answer: which version" not in text


def test_the_last_decision_is_the_latest_in_time_and_links_show_no_password() -> None:
    late = [version(5, decision="refuse", decided_at="2026-01-01T00:00:00+00:00"), *VERSIONS]
    view = model_view("t", "T", "m", ALIASES, late, "http://user:secret@mlflow:5000/")
    assert view.decision is not None
    assert view.decision.version == "3"
    assert view.champion is not None
    assert view.champion.link == "http://mlflow:5000/#/models/m/versions/1"
    assert view.champion.since == datetime(2026, 2, 2, 10, tzinfo=UTC)
    assert [item.version for item in view.rollbacks] == ["2"]
    assert [item.version for item in view.refused] == ["4"]
    promoted = model_view("t", "T", "m", ALIASES, VERSIONS[2:], "http://mlflow:5000").decision
    assert promoted is not None
    assert promoted.outcome == "promoted, later rolled back"
    empty = model_view("t", "T", "m", {}, [], "http://mlflow:5000")
    assert (empty.champion, empty.challenger, empty.decision) == (None, None, None)
    assert (empty.refused, empty.rollbacks) == ((), ())
    odd = model_view("t", "T", "m", {"champion": "9"}, [version(1, rolled_back_at="yesterday")], "http://mlflow:5000")
    assert odd.champion is not None
    assert odd.champion.since is None
    assert odd.rollbacks[0].at is None


def test_the_newest_decision_of_each_trial() -> None:
    with dg.DagsterInstance.ephemeral() as instance:
        for trial, retrain in (("one", True), ("two", True), ("one", False)):
            result = {"retrain": retrain, "reasons": ["because"]}
            instance.report_runless_asset_event(
                dg.AssetMaterialization(
                    dg.AssetKey(["retraining", "decision"]),
                    metadata={"trial": trial, "result": dg.MetadataValue.json(result)},
                )
            )
        found = read_retraining(instance)
    assert {trial: view.retrain for trial, view in found.items()} == {"one": False, "two": True}
    assert found["one"].reasons == ("because",)
