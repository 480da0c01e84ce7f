"""A whole platform as its users meet it: started by its command, seen in a real Chromium, with a run to success."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from clinical_orchestration.audit.trail import AuditTrail
from clinical_orchestration.contract import CLINICAL_DATA_PIPELINE, PIPELINES
from clinical_orchestration.stack.settings import INTERNAL_PORTS, PUBLIC_PORTS, port_variable
from clinical_orchestration_tests.airflow.live import ADMIN, ROOT, VIEWER
from clinical_orchestration_tests.conftest import ADDRESSES
from clinical_orchestration_tests.page.test_browser import (
    DESKTOP,
    MAIN,
    PHONE,
    QUALITY,
    SIZES,
    chromium,
    expect_text,
    rgb,
)

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

__all__ = ["chromium"]
pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.timeout(1500)]

START_SECONDS, RUN_SECONDS = 400, 900


@dataclass
class Stack:
    """A running platform; `took` says how long what lasted, in seconds."""

    home: Path
    environment: dict[str, str]
    took: dict[str, float] = field(default_factory=dict)

    @property
    def url(self) -> str:
        return self.environment["AIRFLOW_URL"]

    def command(self, *words: str, seconds: float = 60, **variables: str) -> subprocess.CompletedProcess[str]:
        """Run a command in the environment of ``--env``."""
        return subprocess.run(
            [str(Path(sys.executable).parent / words[0]), *words[1:]],
            capture_output=True, text=True, timeout=seconds, check=False,
            env={**os.environ, **self.environment, **variables},
        )  # fmt: skip

    def client(self, user: str = ADMIN) -> httpx.Client:
        name, _, password = user.partition(":")
        return httpx.Client(base_url=self.url, auth=(name, password), timeout=60)

    def pid(self, service: str) -> int:
        """Return the process of a service."""
        services = json.loads((self.home / "run" / "status.json").read_text())["services"]
        return int(next(one["pid"] for one in services if one["name"] == service))

    @contextmanager
    def measured(self, what: str) -> Iterator[None]:
        began = time.monotonic()
        yield
        self.took[what] = round(time.monotonic() - began, 1)


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """A platform of its own, on free ports, with all levels; with a viewer beside the administrator."""
    home: Path = tmp_path_factory.mktemp("stack")
    for folder in (home, *home.parents):  # as root, PostgreSQL runs as another user and must get to its folder
        if os.geteuid() == 0 and folder.stat().st_uid == 0 and folder != Path(folder.anchor):
            folder.chmod(folder.stat().st_mode | 0o011)
    variables = {name: value for name, value in os.environ.items() if name not in ADDRESSES}
    variables |= {port_variable(name): "0" for name in (*PUBLIC_PORTS, *INTERNAL_PORTS)}
    variables |= {"CLINICAL_HOME": str(home)}

    def manage(*flags: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "clinical_orchestration.cli.main", *flags],
            cwd=ROOT, env=variables, capture_output=True, text=True, timeout=START_SECONDS, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    began = time.monotonic()
    try:
        manage("--start")
        made = Stack(home, json.loads(manage("--env", "--json"))["env"])
        made.took["start"] = round(time.monotonic() - began, 1)
        name, _, password = VIEWER.partition(":")
        done = made.command("airflow", "users", "create", "-u", name, "-e", "l@example.org", "-f", "L", "-l", "O",
                            "-r", "Viewer", "-p", password)  # fmt: skip
        assert done.returncode == 0, done.stderr
        yield made
        sys.stderr.write(f"\nseconds: {made.took}\n")
    finally:
        manage("--stop")


@contextmanager
def signed_in(browser: Browser, stack: Stack, size: tuple[int, int], user: str = ADMIN) -> Iterator[Page]:
    context = browser.new_context(viewport={"width": size[0], "height": size[1]}, has_touch=size == PHONE)
    context.set_default_timeout(60_000)
    page = context.new_page()
    name, _, password = user.partition(":")
    page.goto(stack.url)
    page.get_by_label("User name").fill(name)
    page.get_by_label("Password").fill(password)
    page.get_by_role("button", name="Log in").click()
    page.wait_for_selector("#pipelines-now .pipeline")
    yield page
    assert page.evaluate("document.documentElement.scrollWidth") <= size[0] or "/dagster" in page.url
    context.close()


def test_a_run_is_triggered_and_followed_to_success(chromium: Browser, stack: Stack) -> None:
    with signed_in(chromium, stack, DESKTOP) as page, signed_in(chromium, stack, PHONE) as phone:
        assert page.locator("#pipelines-now .pipeline").count() == len(PIPELINES)
        page.locator(f"#pipeline-{MAIN}").get_by_role("button", name=f"Trigger {MAIN}").click()
        dialog = page.get_by_role("dialog", name=f"Trigger {MAIN}")
        dialog.get_by_label("Configuration").fill('{"keep_model": true, "param1": "value1"}')
        dialog.get_by_label("Logical date").fill("2025-10-25T00:00:00")
        with stack.measured("trigger to success on the page"):
            with stack.measured("trigger to running on the page"):
                dialog.get_by_role("button", name="Trigger").click()
                page.get_by_role("link", name="Show the run").click()
                page.wait_for_selector("#run-head .s-running")
            phone.goto(page.url)
            page.wait_for_selector("#node-start_pipeline.s-success")
            assert '"param1": "value1"' in page.locator("#conf-now").inner_text()
            page.wait_for_selector("#run-head .state.s-success, #run-head .state.s-failed", timeout=RUN_SECONDS * 1000)
        for one in (page, phone):  # the phone has followed it, too
            one.wait_for_selector("#run-head .state.s-success")
            for task in CLINICAL_DATA_PIPELINE.tasks:
                assert one.locator(f"#node-{task}.s-success").count() == 1, task
            one.get_by_role("link", name="Log of spark_data_processing, try 1").click()
            expect_text(one, "#log", "STEP_SUCCESS")
    with stack.client() as api:
        run = api.get(f"/api/v1/dags/{MAIN}/dagRuns/manual__2025-10-25T00:00:00+00:00").json()
        assert (run["state"], run["conf"]["param1"]) == ("success", "value1")


@SIZES
def test_pausing_a_failing_service_and_the_dagster_ui(chromium: Browser, stack: Stack, size: tuple[int, int]) -> None:
    with signed_in(chromium, stack, size) as page:
        card = page.locator(f"#pipeline-{QUALITY}")
        card.get_by_role("switch").click()
        page.wait_for_selector(f"#pipeline-{QUALITY} [aria-checked=false]")
        card.get_by_role("switch").click()
        page.wait_for_selector(f"#pipeline-{QUALITY} [aria-checked=true]")

        page.wait_for_selector("#service-mlflow .s-success")
        os.kill(stack.pid("mlflow"), signal.SIGKILL)
        with stack.measured(f"kill to red at {size[0]}"):
            page.wait_for_selector("#service-mlflow .s-failed")
        red, green, blue = rgb(page, "#service-mlflow .state")
        assert red > 2 * max(green, blue)
        with stack.measured(f"red to green at {size[0]}"):
            page.wait_for_selector("#service-mlflow .s-success", timeout=120_000)

        page.get_by_role("link", name=f"Graph of {MAIN}").click()
        page.wait_for_url(re.compile("/dagster/locations/"))
        expect_text(page, "body", re.compile(r"Materialize|View \d+ assets"))  # drawn by Dagster's own script
    rows = [row for row in AuditTrail(stack.environment["POSTGRES_URL"]).rows() if row.event.startswith("patch_dag")]
    assert {(row.origin, row.who, row.dag_id) for row in rows} == {("page", "admin", QUALITY)}


LAUNCH = """mutation ($given: ExecutionParams!) { launchRun(executionParams: $given) { __typename } }"""


def test_a_viewer_can_change_nothing_in_any_way(chromium: Browser, stack: Stack) -> None:
    with signed_in(chromium, stack, DESKTOP, VIEWER) as page:
        buttons = page.locator("#pipelines-now button")
        assert buttons.count() == 2 * len(PIPELINES)
        assert all(one.is_disabled() for one in buttons.all())
    with stack.client() as api:
        before = switches_and_runs(api)
    with stack.client(VIEWER) as viewer:
        assert viewer.get("/api/v1/dags").status_code == 200
        for method, path, body in (
            ("PATCH", f"dags/{MAIN}", {"is_paused": True}),
            ("POST", f"dags/{MAIN}/dagRuns", {"conf": {}}),
            ("POST", f"dags/{MAIN}/clearTaskInstances", {"dry_run": False}),
            ("POST", "variables", {"key": "a", "value": "b"}),
            ("DELETE", f"dags/{MAIN}", None),
        ):
            assert viewer.request(method, f"/api/v1/{path}", json=body).status_code == 403, path
        selector = {"repositoryLocationName": "clinical_orchestration", "repositoryName": "__repository__"}
        given = {"selector": {**selector, "jobName": MAIN}, "runConfigData": {}, "mode": "default"}
        answer = viewer.post("/dagster/graphql", json={"query": LAUNCH, "variables": {"given": given}})
        assert answer.json()["data"]["launchRun"]["__typename"] == "UnauthorizedError", answer.text
    name, _, password = VIEWER.partition(":")
    as_viewer: dict[str, Any] = {"CLINICAL_USER": name, "CLINICAL_PASSWORD": password}
    assert stack.command("airflow", "dags", "list", **as_viewer).returncode == 0
    for words in (("dags", "trigger", MAIN), ("dags", "pause", MAIN), ("variables", "set", "a", "b")):
        done = stack.command("airflow", *words, **as_viewer)
        assert (done.returncode, "may not do this" in done.stderr) == (1, True), words
    with stack.client() as api:
        assert switches_and_runs(api) == before
        assert api.get("/api/v1/variables/a").status_code == 404


def switches_and_runs(api: httpx.Client) -> tuple[dict[str, bool], int]:
    paused = {dag["dag_id"]: dag["is_paused"] for dag in api.get("/api/v1/dags").json()["dags"]}
    return paused, api.get(f"/api/v1/dags/{MAIN}/dagRuns").json()["total_entries"]


def test_the_audit_trail_of_it_all_is_unbroken(stack: Stack) -> None:
    done = stack.command("clinical", "audit", "verify", "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(done.stdout)["finding"] is None
