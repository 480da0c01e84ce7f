"""Launching and following runs: against a real Dagster through the page, and with a page that comes and goes."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.testclient import TestClient

from clinical_orchestration.page.app import create_app
from clinical_orchestration.page.dagster_ui import DagsterUi
from clinical_orchestration.page.settings import PageSettings
from clinical_orchestration.stack import cli
from clinical_orchestration.stack import runs as runs_module
from clinical_orchestration.stack.console import Display, UserError
from clinical_orchestration.stack.runs import Runs, RunState, run_config, take_event
from clinical_orchestration.stack.settings import StackSettings
from clinical_orchestration_tests.page.support import EverybodyIs, open_tiny_workspace
from clinical_orchestration_tests.stack.test_cli import FakeClient

URL = "http://testserver"


DOOR = EverybodyIs("Admin")


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    home: Path = tmp_path_factory.mktemp("dagster")
    ui = DagsterUi(lambda stack: open_tiny_workspace(home, stack))
    settings = PageSettings(
        DAGSTER_HOME=str(home), POSTGRES_URL="", CLINICAL_HOME="", CLINICAL_PAGE_ALLOWED_HOSTS="testserver"
    )
    with ExitStack() as stack:
        client = stack.enter_context(TestClient(create_app(settings, ui, DOOR)))
        assert ui.wait(60)
        yield client


def _commands(page: TestClient, home: Path, *arguments: str) -> tuple[cli.Commands, io.StringIO]:
    err = io.StringIO()
    commands = cli.Commands(
        cli.parse(arguments),
        Display(io.StringIO(), err),
        FakeClient(home),
        StackSettings.load,
        lambda _: Runs(URL, page),
    )
    return commands, err


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CLINICAL_HOME", str(tmp_path))
    return tmp_path


def test_a_run_is_followed_to_its_end_with_steps_and_counts(page: TestClient, home: Path) -> None:
    commands, err = _commands(page, home, "--run", "good_pipeline", "--trial", "simulated", "--conf", '{"a": "b"}')
    assert commands.execute() == 0
    run = commands.result["run"]
    assert run["status"] == "SUCCESS"
    steps = {step["step"]: step for step in run["steps"]}
    assert set(steps) == {"count_rows", "use", "show_trial"}
    assert steps["count_rows"]["assets"] == {"silver/patient_vitals": {"rows": "3", "note": "all there"}}
    assert steps["show_trial"]["assets"]["trial"]["trial"] == "simulated"
    assert steps["show_trial"]["assets"]["trial"]["conf"] == "{'a': 'b'}"
    assert all(step["outcome"] == "success" and step["seconds"] >= 0 for step in steps.values())
    assert "good_pipeline succeeded" in err.getvalue()
    assert "count_rows  rows 3" in err.getvalue()
    json.dumps(run)


def test_a_failed_run_fails_the_command_and_shows_the_innermost_cause(page: TestClient, home: Path) -> None:
    commands, err = _commands(page, home, "--run", "bad_pipeline")
    assert commands.execute() == 1
    assert "bad_pipeline failed" in err.getvalue()
    assert "3 rows are not enough" in err.getvalue()
    assert "/dagster/runs/" in err.getvalue()


def test_the_run_carries_the_trial_as_a_tag(page: TestClient, home: Path) -> None:
    commands, _ = _commands(page, home, "--run", "good_pipeline")
    assert commands.execute() == 0
    query = "query ($id: ID!) { runOrError(runId: $id) { ... on Run { tags { key value } } } }"
    variables = {"id": commands.result["run"]["run_id"]}
    answer = page.post("/dagster/graphql", json={"query": query, "variables": variables}).json()
    tags = {tag["key"]: tag["value"] for tag in answer["data"]["runOrError"]["tags"]}
    assert tags["clinical/trial"] == "cdisc-pilot"
    assert tags["clinical/started_by"] == "pipeline-manager"


def test_an_unknown_job_lists_those_there_are(page: TestClient) -> None:
    with pytest.raises(UserError) as error:
        Runs(URL, page).find_job("clinical_pipeline")
    assert error.value.status == 2
    assert error.value.why == "the loaded jobs are: bad_pipeline, good_pipeline, long_pipeline"


def test_a_wrong_configuration_is_refused_with_dagsters_words(page: TestClient) -> None:
    client = Runs(URL, page)
    with pytest.raises(UserError) as error:
        client.launch(client.find_job("good_pipeline"), {"resources": {"nothing": {}}}, {})
    assert "nothing" in error.value.why


def test_an_unknown_run_is_an_error(page: TestClient) -> None:
    with pytest.raises(UserError, match="there is no run"):
        list(Runs(URL, page).follow("00000000-0000-0000-0000-000000000000"))


def test_a_viewer_starts_no_run(page: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    client = Runs(URL, page)
    job = client.find_job("good_pipeline")
    monkeypatch.setattr(DOOR, "identity", EverybodyIs("Viewer").identity)
    with pytest.raises(UserError, match="UnauthorizedError"):
        client.launch(job, {}, {})


def test_the_page_is_asked_as_the_stack_or_as_the_named_user(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    def handle(request: httpx.Request) -> httpx.Response:
        seen.append(request.headers["authorization"])
        return httpx.Response(401, json={"title": "Unauthorized"})

    make = httpx.Client
    monkeypatch.setattr(httpx, "Client", lambda **options: make(transport=httpx.MockTransport(handle), **options))
    monkeypatch.delenv("CLINICAL_USER", raising=False)
    with pytest.raises(UserError, match="does not let this command in") as error:
        Runs(URL, token="stack-token").find_job("j")
    assert "CLINICAL_USER" in (error.value.cure or "")
    monkeypatch.setenv("CLINICAL_USER", "ann")
    monkeypatch.setenv("CLINICAL_PASSWORD", "right")
    with pytest.raises(UserError):
        Runs(URL, token="stack-token").find_job("j")
    assert seen == ["Bearer stack-token", "Basic " + base64.b64encode(b"ann:right").decode()]


# ------------------------------------------------------------------------------------------- a page that comes and goes


class Script:
    """A page that answers what a test gives it, one answer a request."""

    def __init__(self, *answers: dict[str, Any] | Exception) -> None:
        self.answers = list(answers)
        self.requests: list[dict[str, Any]] = []

    def client(self) -> httpx.Client:
        def handle(request: httpx.Request) -> httpx.Response:
            self.requests.append(json.loads(request.content))
            answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
            if isinstance(answer, Exception):
                raise answer
            return httpx.Response(200, json={"data": answer})

        return httpx.Client(transport=httpx.MockTransport(handle))


def _log(status: str, *events: dict[str, Any], more: bool = False) -> dict[str, Any]:
    run = {"__typename": "Run", "status": status, "jobName": "j", "creationTime": 1.0, "startTime": 2.0, "endTime": 9.0}
    return {
        "runOrError": run,
        "logsForRun": {"__typename": "EventConnection", "cursor": "c", "hasMore": more, "events": list(events)},
    }


def _event(kind: str, key: str | None = "a", at: float = 3.0, **more: Any) -> dict[str, Any]:
    return {"__typename": kind, "stepKey": key, "timestamp": str(at * 1000), "message": "m", **more}


def test_a_page_that_restarts_does_not_end_the_following() -> None:
    script = Script(
        _log("STARTED", _event("ExecutionStepStartEvent")),
        httpx.ConnectError("refused"),
        httpx.ConnectError("refused"),
        _log("SUCCESS", _event("ExecutionStepSuccessEvent", at=5.0)),
    )
    states = list(Runs(URL, script.client(), sleep=lambda _: None).follow("r"))
    assert states[-1].status == "SUCCESS"
    assert states[-1].steps["a"].seconds == pytest.approx(2.0)
    assert [request["variables"]["cursor"] for request in script.requests] == [None, "c", "c", "c"]


def test_a_page_that_stays_away_is_an_error_with_a_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs_module, "PATIENCE_SECONDS", 0.0)
    with pytest.raises(UserError) as error:
        list(Runs(URL, Script(httpx.ConnectError("refused")).client(), sleep=lambda _: None).follow("r"))
    assert "does not answer" in error.value.what
    assert "--health-check" in error.value.cure


def test_a_launch_is_never_repeated_by_itself() -> None:
    script = Script(httpx.ReadTimeout("slow"))
    with pytest.raises(UserError, match="could not be started"):
        Runs(URL, script.client()).launch(runs_module.Job("j", "r", "l"), {}, {})
    assert len(script.requests) == 1


def _workspace(loaded: dict[str, Any] | None, status: str = "LOADED") -> dict[str, Any]:
    entry = {"name": "clinical", "loadStatus": status, "locationOrLoadError": loaded}
    return {"workspaceOrError": {"__typename": "Workspace", "locationEntries": [entry]}}


LOADED = {"__typename": "RepositoryLocation", "repositories": [{"name": "r", "jobs": [{"name": "j"}]}]}
UNREACHABLE = {"__typename": "PythonError", "className": "DagsterUserCodeUnreachableError", "message": "refused"}
BROKEN = {"__typename": "PythonError", "className": "SyntaxError", "message": "invalid syntax"}


def test_a_code_server_that_is_still_starting_is_waited_for() -> None:
    script = Script(_workspace(None, "LOADING"), _workspace(UNREACHABLE), _workspace(LOADED))
    job = Runs(URL, script.client(), sleep=lambda _: None).find_job("j")
    assert (job.location, job.repository) == ("clinical", "r")


def test_code_that_does_not_load_is_an_error_at_once() -> None:
    script = Script(_workspace(BROKEN))
    with pytest.raises(UserError) as error:
        Runs(URL, script.client(), sleep=lambda _: None).find_job("j")
    assert "invalid syntax" in error.value.why
    assert len(script.requests) == 1


class Interrupted:
    """A client of a run that is interrupted by Ctrl-C `times` times while it is followed."""

    def __init__(self, times: int) -> None:
        self.times = times
        self.terminated: list[str] = []

    def run_url(self, run_id: str) -> str:
        return f"{URL}/{run_id}"

    def find_job(self, name: str) -> runs_module.Job:
        return runs_module.Job(name, "r", "l")

    def launch(self, job: runs_module.Job, config: object, tags: object, assets: object = None) -> str:
        return "run-1"

    def terminate(self, run_id: str) -> None:
        self.terminated.append(run_id)

    def follow(self, run_id: str, job: str = "") -> Iterator[RunState]:
        yield RunState(run_id, job, "STARTED", started=1.0)
        if self.times:
            self.times -= 1
            raise KeyboardInterrupt
        yield RunState(run_id, job, "CANCELED", started=1.0, ended=2.0)


@pytest.mark.parametrize(("times", "leaves"), [(1, False), (2, True)])
def test_ctrl_c_cancels_the_run_and_a_second_one_leaves(home: Path, times: int, leaves: bool) -> None:
    fake = Interrupted(times)
    make: Callable[[str], Any] = lambda _: fake  # noqa: E731
    commands = cli.Commands(
        cli.parse(["--run", "j"]), Display(io.StringIO(), io.StringIO()), FakeClient(home), StackSettings.load, make
    )
    if leaves:
        with pytest.raises(UserError) as error:
            commands.execute()
        assert error.value.status == 130
    else:
        assert commands.execute() == 130
        assert commands.result["run"]["status"] == "CANCELED"
    assert fake.terminated == ["run-1"]


# ---------------------------------------------------------------------------------------------------------- small parts


def test_a_step_that_is_tried_again_counts_its_attempts() -> None:
    state = RunState("r", "j")
    take_event(state, _event("ExecutionStepStartEvent", at=1))
    take_event(state, _event("ExecutionStepUpForRetryEvent", at=2, error={"message": "late", "causes": []}))
    assert (state.steps["a"].outcome, state.steps["a"].why) == ("retry", "late")
    take_event(state, _event("ExecutionStepRestartEvent", at=3))
    assert (state.steps["a"].outcome, state.steps["a"].attempts) == ("running", 2)
    take_event(state, _event("ExecutionStepSuccessEvent", at=4))
    assert state.steps["a"].outcome == "success"


def test_checks_and_skipped_steps_are_noted() -> None:
    state = RunState("r", "j")
    take_event(state, _event("ExecutionStepStartEvent"))
    evaluation = {"checkName": "accounted", "success": False}
    take_event(state, _event("AssetCheckEvaluationEvent", evaluation=evaluation))
    take_event(state, _event("ExecutionStepSkippedEvent", key="b"))
    assert state.steps["a"].checks == [("accounted", False)]
    assert state.steps["b"].outcome == "skipped"
    assert "not passed: accounted" in cli._step_line(state.steps["a"])


def test_of_several_assets_rows_are_named_and_records_are_summed() -> None:
    step = runs_module.Step("s", 0.0)
    step.assets = {
        "silver/patient_vitals": {"dagster/row_count": "29000", "records_received": "300", "delta_version": "3"},
        "silver/lab_results": {"dagster/row_count": "59000", "records_received": "200", "delta_version": "4"},
    }
    assert runs_module.outline(step) == ["patient_vitals 29000", "lab_results 59000", "records_received 500"]
    step.assets = {
        "gold/x": {"trial": "t", "note": "n", "dagster/row_count": "7", "auroc": "0.71", "delta_version": "2"}
    }
    assert runs_module.outline(step) == ["row_count 7", "auroc 0.71", "note n"]


def test_run_configuration_is_the_pipeline_resource() -> None:
    assert run_config("simulated", "/data", {"force_training": True}) == {
        "resources": {
            "pipeline": {"config": {"trial": "simulated", "source": "/data", "conf": {"force_training": True}}}
        }
    }
    assert run_config(None, None, {}) == {}
