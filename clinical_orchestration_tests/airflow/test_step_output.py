"""Logs of task instances with what the step printed, while it runs and afterwards."""

from __future__ import annotations

import ast
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from cryptography.fernet import Fernet
from dagster._core.test_utils import instance_for_test
from dagster._core.workspace.context import WorkspaceProcessContext
from dagster._core.workspace.load_target import ModuleTarget
from starlette.applications import Starlette
from starlette.routing import Mount
from starlette.testclient import TestClient

from clinical_orchestration.airflow import step_output
from clinical_orchestration.airflow.control import Control
from clinical_orchestration.airflow.database import open_engine
from clinical_orchestration.airflow.logs import LogPosition, LogReader
from clinical_orchestration.airflow.runs import TaskTry
from clinical_orchestration.airflow.step_output import OutputPosition, read_output
from clinical_orchestration.api.app import create_api
from clinical_orchestration.execution import compute_logs
from clinical_orchestration.execution.compute_logs import DirectComputeLogManager
from clinical_orchestration.platform.crypto import Cipher
from clinical_orchestration.platform.store import PlatformStore
from clinical_orchestration_tests.airflow import talking_definitions
from clinical_orchestration_tests.airflow.live import LAUNCHER
from clinical_orchestration_tests.databases import new_database

STOCK = ("dagster._core.storage.local_compute_log_manager", "LocalComputeLogManager")
DIRECT = (compute_logs.__name__, "DirectComputeLogManager")


@pytest.fixture(params=[STOCK, DIRECT], ids=["stock", "direct"])
def api(request: pytest.FixtureRequest, postgres_env: dict[str, str], tmp_path: Path) -> Iterator[TestClient]:
    """The API over an instance that keeps the output of steps."""
    module, name = request.param
    database = new_database(postgres_env["POSTGRES_URL"], f"output_{name.lower()}")
    storage = {"module": "clinical_orchestration.execution.storage", "class": "PooledPostgresStorage"}
    coordinator = {"module": "dagster._core.run_coordinator.default_run_coordinator", "class": "DefaultRunCoordinator"}
    talking_definitions.began.clear()
    talking_definitions.go_on.clear()
    with ExitStack() as stack:
        instance = stack.enter_context(
            instance_for_test(
                temp_dir=str(tmp_path),
                overrides={
                    "storage": {"custom": {**storage, "config": {"postgres_url": database}}},
                    "run_launcher": {"module": LAUNCHER, "class": "ThreadLauncher"},
                    "run_coordinator": coordinator,
                    "compute_logs": {"module": module, "class": name, "config": {"base_dir": str(tmp_path / "output")}},
                },
            )
        )
        target = ModuleTarget(
            talking_definitions.__name__,
            attribute="defs",
            working_directory=str(Path(__file__).resolve().parents[2]),
            location_name="talking",
        )
        workspace = stack.enter_context(WorkspaceProcessContext(instance, target))
        engine = open_engine(database)
        stack.callback(engine.dispose)
        store = PlatformStore(database, Cipher(Fernet.generate_key().decode()))
        routes = create_api(Control(lambda: workspace, engine), lambda: store)
        client = stack.enter_context(TestClient(Starlette(routes=[Mount("/api/v1", routes)])))
        client.base_url = client.base_url.join("/api/v1/")
        stack.callback(talking_definitions.go_on.set)
        yield client


def _part(api: TestClient, place: str, token: str | None = None) -> tuple[str, str]:
    """Return the text of the next part of a log, and the token of the part after it."""
    params = {"token": token} if token else {}
    answer = api.get(place, params=params, headers={"Accept": "application/json"}).json()
    return "".join(text for _, text in ast.literal_eval(answer["content"])), answer["continuation_token"]


def _run_to(api: TestClient, state: str) -> None:
    deadline = time.monotonic() + 20
    while api.get("dags/talking/dagRuns/said").json()["state"] != state:
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.integration
def test_a_log_has_what_the_step_prints_while_it_runs(
    api: TestClient, request: pytest.FixtureRequest, capfd: pytest.CaptureFixture[str]
) -> None:
    with capfd.disabled():  # what is printed goes where it goes outside of tests
        _talk(api, knows_parts=request.node.callspec.id == "direct")


def _talk(api: TestClient, *, knows_parts: bool) -> None:
    assert api.post("dags/talking/dagRuns", json={"dag_run_id": "said"}).status_code == 200
    assert talking_definitions.began.wait(20)
    place = "dags/talking/dagRuns/said/taskInstances/talks/logs/1"

    deadline = time.monotonic() + 10
    text, token = _part(api, place)
    while "[stdout] first words\n" not in text or "[stderr] a warning\n" not in text:  # stock: by way of a process
        assert time.monotonic() < deadline, text
        text, token = _part(api, place)
    assert "it talks 1" in text
    assert ("*** Output of the process that also ran: prepares\n" in text) is not knows_parts
    assert ("all is prepared" in text) is not knows_parts
    assert "half" not in text
    assert text.count("it talks 1") == 1, "what Dagster prints of its events is not output of the step"
    assert _part(api, place, token)[0] == ""

    talking_definitions.go_on.set()
    _run_to(api, "success")
    text, token = _part(api, place, token)
    assert "[stdout] half a line\n[stdout] last words\n" in text
    assert "STEP_SUCCESS" in text
    assert "first words" not in text
    assert "***" not in text
    assert _part(api, place, token)[0] == ""

    above = api.get(place.replace("talks", "prepares")).text
    assert "[stdout] all is prepared\n" in above
    assert ("words" in above) is not knows_parts
    whole = api.get(place).text
    assert whole.index("it talks 1") < whole.index("[stdout] first words") < whole.index("[stdout] last words")


class Instance:
    """An instance that captured one step in one file."""

    def __init__(self, folder: Path) -> None:
        self.compute_log_manager: Any = DirectComputeLogManager(str(folder))

    def print(self, text: str) -> None:
        path = Path(self.compute_log_manager.get_captured_local_path(["run", "compute_logs", "file"], "out"))
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as file:
            file.write(text)


@pytest.fixture
def instance(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Instance:
    monkeypatch.setattr(step_output, "_capture", lambda *_: ("file", []))
    return Instance(tmp_path)


def _read(instance: Instance, position: OutputPosition, most: int, *, ended: bool) -> tuple[str, OutputPosition]:
    from datetime import UTC, datetime

    attempt = TaskTry("step", 1, "running", datetime.now(UTC), None, "run")
    lines, position = read_output(instance, "step", attempt, position, most, ended)  # type: ignore[arg-type]
    return "".join(lines), position


def test_much_output_comes_in_parts(instance: Instance) -> None:
    instance.print("one\ntwo\n" + "x" * 30 + "\nlast")
    position, parts = OutputPosition(), []
    while not position.complete:
        text, position = _read(instance, position, 10, ended=True)
        parts.append(text)
    assert parts[0] == "[stdout] one\n[stdout] two\n"
    assert "".join(parts).replace("[stdout] ", "").replace("\n", "") == "onetwo" + "x" * 30 + "last"
    assert _read(instance, position, 10, ended=True) == ("", position)


def test_output_that_cannot_be_read_is_said(instance: Instance, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise ConnectionError("secret")

    monkeypatch.setattr(instance.compute_log_manager, "get_log_data", fails)
    text, _ = _read(instance, OutputPosition(), 10, ended=False)
    assert text == "*** The output of this task cannot be read: ConnectionError\n"


def test_a_token_of_before_is_still_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    import json

    from clinical_orchestration.airflow.logs import _encode

    reader = LogReader(None)  # type: ignore[arg-type]
    body = json.dumps({"position": 7}).encode()
    old = f"{_encode(body)}.{_encode(reader._sign(body))}"
    assert reader.position_of(old) == LogPosition(7)
    position = LogPosition(8, OutputPosition("file", 1, 2, titled=True))
    assert reader.position_of(reader.token(position)) == position
    assert reader.position_of("forged") is None
