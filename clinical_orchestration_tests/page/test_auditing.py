"""Changes in the Dagster UI: which are recorded, in which order, and what is refused."""

from __future__ import annotations

import json
from typing import Any
from urllib.parse import quote

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Mount, Route, WebSocketRoute
from starlette.testclient import TestClient
from starlette.websockets import WebSocket

from clinical_orchestration.page.auditing import AuditedUi, Mutation, mutations
from clinical_orchestration.users.identity import Identity
from clinical_orchestration_tests.audit.memory import TrailInMemory

LAUNCH = """mutation Launch($p: ExecutionParams!) {
  launchRun(executionParams: $p) { __typename ... on LaunchRunSuccess { run { runId } } } }"""
SUCCESS = {"launchRun": {"__typename": "LaunchRunSuccess", "run": {"runId": "r-1"}}}
PARAMS = {
    "selector": {"jobName": "model_monitoring"},
    "runConfigData": "resources:\n  db:\n    password: tiger\n    host: h\n",
}


class Ui:
    """Stands for the Dagster UI: keeps what it was asked and answers what it is told to."""

    def __init__(self) -> None:
        self.asked: list[Any] = []
        self.answer: Any = {"data": SUCCESS}
        self.status = 200
        self.recorded_before: list[int] = []
        self.trail = TrailInMemory()
        routes = [
            Route("/dagster/graphql", self.graphql, methods=["GET", "POST"]),
            Route("/dagster/report_asset_materialization/{path:path}", self.graphql, methods=["POST"]),
            WebSocketRoute("/dagster/graphql", self.websocket),
        ]
        app = Starlette(routes=routes)

        async def dagster(scope: Any, receive: Any, send: Any) -> None:  # its routes carry the prefix themselves
            await app({**scope, "root_path": ""}, receive, send)

        async def with_identity(scope: Any, receive: Any, send: Any) -> None:
            scope.setdefault("state", {})["identity"] = Identity("ada", (), frozenset(), "session")
            await AuditedUi(dagster, self.trail)(scope, receive, send)

        mounted = Starlette(routes=[Mount("/dagster", with_identity)])
        self.client = TestClient(mounted, raise_server_exceptions=False)

    async def graphql(self, request: Request) -> JSONResponse:
        self.recorded_before.append(len(self.trail.entries))
        self.asked.append(json.loads(await request.body() or b"null"))
        if isinstance(self.answer, Exception):
            raise self.answer
        return JSONResponse(self.answer, self.status)

    async def websocket(self, websocket: WebSocket) -> None:
        await websocket.accept()
        async for message in websocket.iter_json():
            self.asked.append(message)
            await websocket.send_json({"type": "data", "id": message.get("id")})


@pytest.fixture
def ui() -> Ui:
    return Ui()


def post(ui: Ui, query: str = LAUNCH, **more: Any) -> Any:
    return ui.client.post("/dagster/graphql", json={"query": query, **more})


def test_a_launch_is_recorded_before_and_after(ui: Ui) -> None:
    answer = post(ui, variables={"p": PARAMS}, operationName="Launch")
    assert (answer.status_code, answer.json()) == (200, ui.answer)
    assert ui.asked[0]["variables"] == {"p": PARAMS}
    assert ui.recorded_before == [1]
    first, last = ui.trail.entries
    assert (first.event, first.who, first.origin, first.dag_id) == ("launchRun", "ada", "graphql", "model_monitoring")
    assert first.address == "testclient"
    assert (last.event, last.run_id) == ("launchRun.done", "r-1")
    assert last.new == {"status": 200, "result": ["LaunchRunSuccess"]}
    assert "tiger" not in str([entry.values() for entry in ui.trail.entries])
    assert '"host":"h"' in str(first.values()["new"])


@pytest.mark.parametrize(
    ("status", "answer", "why"),
    [
        (200, {"data": {"launchRun": {"__typename": "UnauthorizedError"}}}, "UnauthorizedError"),
        (200, {"data": {"launchRun": {"__typename": "RunConfigValidationInvalid"}}}, "RunConfigValidationInvalid"),
        (400, {"data": None, "errors": [{"message": "no"}]}, "status 400"),
        (200, {"data": {"launchRun": None}}, "status 200"),
        (200, ["what is this"], "status 200"),
        (500, ValueError("a secret"), "ValueError"),
    ],
)
def test_a_launch_that_failed_is_recorded_as_failed(ui: Ui, status: int, answer: Any, why: str) -> None:
    ui.status, ui.answer = status, answer
    assert post(ui).status_code == status
    assert [entry.event for entry in ui.trail.entries] == ["launchRun", "launchRun.failed"]
    assert ui.trail.entries[1].extra == {"begun": 1, "error": why}


def test_the_members_of_a_list_count(ui: Ui) -> None:
    results = [{"__typename": "LaunchRunSuccess"}, {"__typename": "RunConflict"}]
    ui.answer = {"data": {"m": {"__typename": "LaunchMultipleRunsResult", "launchMultipleRunsResult": results}}}
    post(ui, "mutation { m: launchMultipleRuns(executionParamsList: []) { __typename } }")
    assert ui.trail.entries[1].event == "launchMultipleRuns.failed"


def test_queries_are_passed_on_unrecorded(ui: Ui) -> None:
    post(ui, "query { mutationless: version }")
    post(ui, "{ version }")
    post(ui, "mutation { setNuxSeen }")
    post(ui, "mutation {")
    assert ui.client.get("/dagster/graphql", params={"query": "{ version }"}).status_code == 200
    assert (len(ui.asked), ui.trail.entries) == (5, [])


@pytest.mark.parametrize("send", ["query string", "graphql"])
def test_other_ways_to_post_are_recorded_too(ui: Ui, send: str) -> None:
    query = 'mutation { launchRun(executionParams: {selector: {jobName: "d"}}) { __typename } }'
    if send == "query string":
        ui.client.post(f"/dagster/graphql?query={quote(query)}")
    else:
        ui.client.post("/dagster/graphql", content=query, headers={"content-type": "application/graphql"})
    assert [entry.event for entry in ui.trail.entries][:1] == ["launchRun"]
    assert ui.trail.entries[0].extra == {"query": query}


def test_a_mutation_by_get_or_websocket_does_not_reach_dagster(ui: Ui) -> None:
    answer = ui.client.get("/dagster/graphql", params={"query": LAUNCH})
    assert (answer.status_code, ui.asked) == (405, [])
    with ui.client.websocket_connect("/dagster/graphql") as websocket:
        websocket.send_json({"type": "start", "id": "1", "payload": {"query": LAUNCH, "operationName": "Other"}})
        assert websocket.receive_json() == {
            "type": "error", "id": "1", "payload": {"message": "mutations are taken by POST only"},
        }  # fmt: skip
        websocket.send_json({"type": "start", "id": "2", "payload": {"query": "subscription { a }"}})
        assert websocket.receive_json()["id"] == "2"
    assert [entry.event for entry in ui.trail.entries] == ["launchRun.refused"]
    assert len(ui.asked) == 1


def test_what_cannot_be_recorded_does_not_reach_dagster(ui: Ui) -> None:
    ui.trail.broken = True
    assert post(ui).status_code == 503
    assert ui.client.post("/dagster/report_asset_materialization/a/b", json={}).status_code == 503
    assert ui.asked == []


def test_fragments_aliases_and_operations_are_seen_through() -> None:
    query = """
    query Read { version }
    mutation Change { a: startSensor(x: 1) { __typename } ...More ... on Mutation { stopSensor { id } } }
    fragment More on Mutation { b: deleteRun(runId: "x") { __typename } ...More }
    """
    found = [Mutation("startSensor", "a"), Mutation("deleteRun", "b"), Mutation("stopSensor", "stopSensor")]
    assert mutations(query, "Change") == found
    assert mutations(query, "Read") == []
    assert mutations(query, "absent") == found
    assert mutations(query) == found


def test_reports_to_the_ui_are_recorded(ui: Ui) -> None:
    ui.answer = {}
    answer = ui.client.post("/dagster/report_asset_materialization/a/b", json={"token": "tiger", "x": 1})
    assert answer.status_code == 200
    assert ui.asked == [{"token": "tiger", "x": 1}]
    first, last = ui.trail.entries
    assert (first.event, first.extra) == ("report_asset_materialization", {"path": "a/b"})
    assert last.event == "report_asset_materialization.done"
    assert "tiger" not in str(first.values())
