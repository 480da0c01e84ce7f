"""What the roles permit in the Dagster UI, over its GraphQL."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from clinical_orchestration.page.app import create_app
from clinical_orchestration.page.dagster_ui import DagsterUi
from clinical_orchestration.page.settings import PageSettings
from clinical_orchestration_tests.page.support import EverybodyIs, open_tiny_workspace

SELECTOR = {"repositoryLocationName": "tiny", "repositoryName": "__repository__"}
PARAMS = {"selector": {**SELECTOR, "jobName": "good_pipeline"}, "runConfigData": {}}
LAUNCH = ("mutation($p: ExecutionParams!) { launchRun(executionParams: $p) { __typename } }", {"p": PARAMS})
LAUNCH_MANY = (
    "mutation($p: [ExecutionParams!]!) { launchMultipleRuns(executionParamsList: $p) {"
    " ... on LaunchMultipleRunsResult { launchMultipleRunsResult { __typename } } } }",
    {"p": [PARAMS]},
)
START_SCHEDULE = (
    "mutation($s: ScheduleSelector!) { startSchedule(scheduleSelector: $s) { __typename } }",
    {"s": {**SELECTOR, "scheduleName": "good_pipeline_schedule"}},
)
DELETE_RUN = ('mutation { deletePipelineRun(runId: "none") { __typename } }', {})
WIPE = ('mutation { wipeAssets(assetPartitionRanges: [{assetKey: {path: ["silver"]}}]) { __typename } }', {})
RELOAD = ("mutation { reloadWorkspace { __typename } }", {})
POOL = ('mutation { setConcurrencyLimit(concurrencyKey: "p", limit: 2) }', {})
LOOK = "{ repositoriesOrError { ... on RepositoryConnection { nodes { name } } } permissions { permission value } }"

Ask = Callable[..., Any]


@pytest.fixture(scope="module")
def ask(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ask]:
    """Ask the Dagster UI as a user with one role."""
    home: Path = tmp_path_factory.mktemp("dagster")
    ui = DagsterUi(lambda stack: open_tiny_workspace(home, stack))
    settings = PageSettings(
        DAGSTER_HOME=str(home), POSTGRES_URL="", CLINICAL_HOME="", CLINICAL_PAGE_ALLOWED_HOSTS="testserver"
    )
    door = EverybodyIs("Admin")
    with ExitStack() as stack:
        client = stack.enter_context(TestClient(create_app(settings, ui, door), follow_redirects=False))
        assert ui.wait(60)

        def graphql(role: str, query: str, variables: dict[str, Any] | None = None) -> Any:
            door.identity = EverybodyIs(role).identity
            answer = client.post("/dagster/graphql", json={"query": query, "variables": variables or {}})
            return answer.json()

        yield graphql


def kind(body: Any) -> str:
    """Return the type of the answer of a mutation, or the error's text."""
    if body.get("errors"):
        return str(body["errors"][0]["message"])
    (value,) = body["data"].values()
    return str(value["__typename"])


@pytest.mark.parametrize("mutation", [LAUNCH, START_SCHEDULE, DELETE_RUN, WIPE, RELOAD])
def test_a_viewer_changes_nothing(ask: Ask, mutation: tuple[str, dict[str, Any]]) -> None:
    assert kind(ask("Viewer", *mutation)) == "UnauthorizedError"


def test_a_viewer_launches_nothing_by_the_list_and_changes_no_pool(ask: Ask) -> None:
    many = ask("Viewer", *LAUNCH_MANY)["data"]["launchMultipleRuns"]["launchMultipleRunsResult"]
    assert [one["__typename"] for one in many] == ["UnauthorizedError"]
    assert "GrapheneUnauthorizedError" in ask("Viewer", *POOL)["errors"][0]["message"]


def test_a_viewer_sees_everything(ask: Ask) -> None:
    data = ask("Viewer", LOOK)["data"]
    assert data["repositoriesOrError"]["nodes"]
    assert data["permissions"]
    assert not any(one["value"] for one in data["permissions"])


def test_a_user_launches_and_switches_but_does_not_administer(ask: Ask) -> None:
    assert kind(ask("User", *LAUNCH)) == "LaunchRunSuccess"
    assert kind(ask("User", *START_SCHEDULE)) == "ScheduleStateResult"
    assert kind(ask("User", *DELETE_RUN)) == "RunNotFoundError"
    for mutation in (WIPE, RELOAD):
        assert kind(ask("User", *mutation)) == "UnauthorizedError"


@pytest.mark.parametrize("role", ["Op", "Admin"])
def test_an_op_and_an_admin_administer(ask: Ask, role: str) -> None:
    assert kind(ask(role, *RELOAD)) == "Workspace"
    assert kind(ask(role, *WIPE)) != "UnauthorizedError"
    assert ask(role, *POOL)["data"]["setConcurrencyLimit"] is True
