"""The whole page over a real Dagster: who launches a run in its UI stands in the audit trail."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from clinical_orchestration.audit.trail import AuditTrail, Filter
from clinical_orchestration.page.app import create_app
from clinical_orchestration.page.dagster_ui import DagsterUi
from clinical_orchestration.page.settings import PageSettings
from clinical_orchestration.platform.crypto import new_key
from clinical_orchestration_tests.databases import temporary_database
from clinical_orchestration_tests.page.support import EverybodyIs, open_tiny_workspace

pytestmark = pytest.mark.integration

LAUNCH = """mutation Launch($p: ExecutionParams!) {
  launchRun(executionParams: $p) { __typename ... on LaunchRunSuccess { run { runId } } } }"""
PARAMS = {
    "selector": {
        "repositoryLocationName": "tiny", "repositoryName": "__repository__", "jobName": "good_pipeline",
    },
    "runConfigData": "resources: {pipeline: {config: {conf: {api_key: tiger}}}}",
}  # fmt: skip


@pytest.fixture(scope="module")
def deployment(
    postgres_env: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[TestClient, EverybodyIs, AuditTrail]]:
    """The page, who asks it, and the trail that it writes."""
    home = tmp_path_factory.mktemp("home")
    with ExitStack() as stack:
        database = stack.enter_context(temporary_database(postgres_env["POSTGRES_URL"], "ui"))
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        patch.setenv("CLINICAL_HOME", str(home))
        patch.setenv("CLINICAL_FERNET_KEY", new_key())
        folder: Path = tmp_path_factory.mktemp("dagster")
        ui = DagsterUi(lambda opened: open_tiny_workspace(folder, opened))
        settings = PageSettings(
            DAGSTER_HOME=str(folder), POSTGRES_URL=database, CLINICAL_HOME="",
            CLINICAL_PAGE_ALLOWED_HOSTS="testserver",
        )  # fmt: skip
        door = EverybodyIs("Admin")
        client = stack.enter_context(TestClient(create_app(settings, ui, door), raise_server_exceptions=False))
        assert ui.wait(60), "the workspace did not open"
        yield client, door, AuditTrail(database)


def launch(client: TestClient) -> Any:
    return client.post("/dagster/graphql", json={"query": LAUNCH, "variables": {"p": PARAMS}}).json()["data"][
        "launchRun"
    ]


def test_a_launch_by_an_admin(deployment: tuple[TestClient, EverybodyIs, AuditTrail]) -> None:
    client, _, trail = deployment
    answer = launch(client)
    assert answer["__typename"] == "LaunchRunSuccess", answer
    begun, done = trail.page(Filter(), "-event_log_id", 2)[0][::-1]
    assert (begun.event, begun.who, begun.origin, begun.dag_id) == ("launchRun", "somebody", "graphql", "good_pipeline")
    assert (done.event, done.run_id) == ("launchRun.done", answer["run"]["runId"])
    assert "tiger" not in f"{vars(begun)}{vars(done)}"
    assert "api_key" in str(begun.new)
    assert trail.verify().ok


def test_a_launch_by_a_viewer_is_recorded_as_failed(deployment: tuple[TestClient, EverybodyIs, AuditTrail]) -> None:
    client, door, trail = deployment
    door.identity = EverybodyIs("Viewer").identity
    try:
        answer = launch(client)
    finally:
        door.identity = EverybodyIs("Admin").identity
    assert answer["__typename"] == "UnauthorizedError"
    failed = trail.page(Filter(), "-event_log_id", 1)[0][0]
    assert (failed.event, "UnauthorizedError" in str(failed.extra)) == ("launchRun.failed", True)


def test_queries_leave_no_row_and_getting_does_not_change(
    deployment: tuple[TestClient, EverybodyIs, AuditTrail],
) -> None:
    client, _, trail = deployment
    _, before = trail.page(Filter())
    assert "version" in client.post("/dagster/graphql", json={"query": "{ version }"}).json()["data"]
    assert client.get("/dagster/graphql", params={"query": "mutation { setNuxSeen }"}).status_code < 500
    assert (
        client.get("/dagster/graphql", params={"query": "mutation { reloadWorkspace { __typename } }"}).status_code
        == 405
    )
    assert trail.page(Filter())[1] == before
