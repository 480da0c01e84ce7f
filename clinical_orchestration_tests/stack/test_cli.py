"""The command line: what it understands, in which order it answers, its JSON, its exit status, its errors."""

from __future__ import annotations

import io
import json
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from clinical_orchestration.stack import cli, report
from clinical_orchestration.stack import client as real_client
from clinical_orchestration.stack.console import Display, UserError, seconds
from clinical_orchestration.stack.model import Event, OnEvent, ServiceStatus, StackError, StackStatus, State
from clinical_orchestration.stack.settings import StackSettings


class FakeClient:
    """A stack of two services that notes what it is asked to do."""

    def __init__(self, home: Path, running: bool = True, broken: str | None = None) -> None:
        self.home, self.running, self.broken = home, running, broken
        self.calls: list[tuple[Any, ...]] = []

    def _status(self) -> StackStatus:
        services = [ServiceStatus("kafka", 0, title="Kafka"), ServiceStatus("page", 5, title="Page")]
        for service in services:
            service.state = State.HEALTHY if self.running else State.STOPPED
            if service.name == self.broken:
                service.state, service.error, service.cure = State.UNHEALTHY, "connection refused", "--logs kafka"
        return StackStatus(str(self.home), 5 if self.running else -1, services, 4711 if self.running else None)

    def start(self, settings: StackSettings, level: int = 5, on_event: OnEvent | None = None) -> StackStatus:
        self.calls.append(("start", level))
        self.running = True
        if on_event:
            on_event(Event("service", "Kafka is healthy", time.time(), "kafka", State.HEALTHY))
        return self._status()

    def stop(self, settings: StackSettings, level: int | None = None, on_event: OnEvent | None = None) -> StackStatus:
        self.calls.append(("stop", level))
        return self._status()

    def status(self, settings: StackSettings) -> StackStatus:
        return self._status()

    def health(self, settings: StackSettings, level: int = 5) -> StackStatus:
        self.calls.append(("health", level))
        return self._status()

    def clean(self, settings: StackSettings) -> None:
        self.calls.append(("clean",))

    def install_jars(self, settings: StackSettings, on_event: OnEvent | None = None) -> bool:
        raise StackError("repo.example cannot be reached", "set CLINICAL_MAVEN_URL")


Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CLINICAL_HOME", str(tmp_path))
    for name in ("CLINICAL_TRIAL", "CLINICAL_DEBUG"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


@pytest.fixture
def run(home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    def call(*arguments: str, fake: FakeClient | None = None) -> tuple[int, str, str]:
        fake = fake or FakeClient(home)
        for name in ("start", "stop", "status", "health", "clean", "install_jars"):
            monkeypatch.setattr(real_client, name, getattr(fake, name))
        status = cli.main(arguments)
        out, err = capsys.readouterr()
        return status, out, err

    return call


# ------------------------------------------------------------------------------------------------------ understanding


def test_information_flags_keep_their_order_and_combine() -> None:
    assert cli.parse(["-s", "-h", "-o"]).information == ["summary", "health", "open"]
    assert cli.parse(["-oh"]).information == ["open", "health"]
    assert cli.parse(["--start", "-h", "-h"]).information == ["health"]


def test_h_is_the_health_check_and_help_is_long() -> None:
    assert cli.parse(["-h"]).information == ["health"]
    assert cli.parse(["--help"]).action == "help"
    assert cli.parse([]).action == "help"


def test_logs_take_an_optional_service() -> None:
    assert cli.parse(["-l"]).service is None
    assert cli.parse(["-l", "kafka"]).service == "kafka"
    options = cli.parse(["-l", "-s"])
    assert (options.service, options.information) == (None, ["logs", "summary"])


def test_everything_after_test_belongs_to_pytest() -> None:
    options = cli.parse(["--test", "-k", "cli", "--json", "-x"])
    assert options.action == "test"
    assert options.pytest_arguments == ["-k", "cli", "--json", "-x"]
    assert not options.json


def test_run_takes_configuration(tmp_path: Path) -> None:
    options = cli.parse(["--run", "j", "--conf", '{"a": 1}', "--trial", "simulated", "--source", str(tmp_path)])
    assert (options.action, options.job, options.conf, options.trial) == ("run", "j", {"a": 1}, "simulated")
    assert options.source == str(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["--strat"], "did you mean --st"),
        (["--start", "--stop"], "not allowed with"),
        (["--start", "--level", "9"], "use 0 to 5"),
        (["--start", "--level", "x"], "use 0 to 5"),
        (["--conf", "{}"], "--conf belongs to --run"),
        (["--run", "j", "--conf", "[1]"], "JSON object"),
        (["--run", "j", "--conf", "{"], "no JSON"),
        (["--start", "--trial", "simulated"], "--trial belongs to --run and --demo"),
        (["--run", "j", "--source", "/nowhere/at/all"], "does not exist"),
        (["--follow"], "--logs"),
        (["--level", "3"], "neither an action"),
        (["start"], "start"),
        (["--run"], "expected one argument"),
    ],
)
def test_a_wrong_command_line_exits_2_and_says_how_it_is_right(run: Run, arguments: list[str], hint: str) -> None:
    status, out, err = run(*arguments)
    assert status == 2
    assert hint in err
    assert err.startswith("error: ")
    assert out == ""


def test_help_names_every_flag(run: Run) -> None:
    status, out, _ = run("--help")
    assert status == 0
    for flag in ("--demo", "--start", "--stop", "--restart-rebuild", "--clean", "--level", "--yes", "--health-check",
                 "--summary", "--open", "--visualize", "--stats", "--logs", "--json", "--run", "--conf", "--trial",
                 "--source", "--env", "--test"):  # fmt: skip
        assert flag in out


# ------------------------------------------------------------------------------------------------------------ actions


@pytest.mark.parametrize(
    ("arguments", "call"),
    [
        (["--start"], ("start", 5)),
        (["--start", "--level", "2"], ("start", 2)),
        (["--stop"], ("stop", None)),
        (["--stop", "--level", "3"], ("stop", 3)),
        (["--clean", "--yes"], ("clean",)),
        (["--clean", "--yes", "--level", "4"], ("stop", 4)),
        (["-h", "--level", "0"], ("health", 0)),
        (["-h"], ("health", 5)),
    ],
)
def test_actions_reach_the_stack(run: Run, home: Path, arguments: list[str], call: tuple[Any, ...]) -> None:
    fake = FakeClient(home)
    assert run(*arguments, fake=fake)[0] == 0
    assert fake.calls == [call]


def test_clean_without_anybody_to_ask_removes_nothing(run: Run, home: Path) -> None:
    fake = FakeClient(home)
    status, _, err = run("--clean", fake=fake)
    assert status == 2
    assert "--yes" in err
    assert fake.calls == []


def test_clean_of_upper_levels_keeps_the_lower_ones(run: Run, home: Path) -> None:
    for name in ("kafka", "page"):
        (home / "data" / name).mkdir(parents=True)
        (home / "logs").mkdir(exist_ok=True)
        (home / "logs" / f"{name}.log").write_text("x")
    assert run("--clean", "--yes", "--level", "4")[0] == 0
    assert (home / "data" / "kafka").exists()
    assert (home / "logs" / "kafka.log").exists()
    assert not (home / "data" / "page").exists()
    assert not (home / "logs" / "page.log").exists()


def test_a_start_that_leaves_a_service_down_fails_and_names_it(run: Run, home: Path) -> None:
    status, _, err = run("--start", fake=FakeClient(home, broken="kafka"))
    assert status == 1
    assert "kafka is unhealthy" in err
    assert "connection refused" in err


def test_an_error_of_the_stack_is_one_block_with_its_cure(run: Run) -> None:
    status, out, err = run("--fetch-jars")
    assert status == 1
    assert out == ""
    assert err == "error: repo.example cannot be reached\n  cure: set CLINICAL_MAVEN_URL\n"


def test_a_defect_is_one_block_too(run: Run, home: Path) -> None:
    fake = FakeClient(home)
    fake.health = lambda settings, level=5: 1 / 0  # type: ignore[method-assign,assignment,return-value]
    status, _, err = run("-h", fake=fake)
    assert status == 1
    assert "ZeroDivisionError" in err
    assert "Traceback" not in err


def test_env_prints_only_export_lines_on_standard_output(run: Run, home: Path) -> None:
    status, out, err = run("--env", fake=FakeClient(home, running=False))
    assert status == 0
    assert all(line.startswith("export ") for line in out.splitlines())
    for name in ("AWS_ENDPOINT_URL", "MLFLOW_TRACKING_URI", "DAGSTER_HOME", "POSTGRES_URL", "PATH", "SPARK_REMOTE"):
        assert f"export {name}=" in out
    assert "not running" in err


@pytest.mark.parametrize("flag", ["--summary", "--run"])
def test_what_needs_a_running_stack_says_so(run: Run, home: Path, flag: str) -> None:
    arguments = [flag, "clinical_data_pipeline"] if flag == "--run" else [flag]
    status, _, err = run(*arguments, fake=FakeClient(home, running=False))
    assert status == 1
    assert "the stack is not running" in err
    assert "--start" in err


def test_an_unknown_trial_is_refused_with_those_there_are(run: Run) -> None:
    status, _, err = run("--run", "clinical_data_pipeline", "--trial", "nothing")
    assert status == 2
    assert "cdisc-pilot" in err


def test_tests_run_in_the_checkout_with_the_fast_suite_by_default(
    run: Run, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[list[str], dict[str, str]]] = []

    class FakeProcess:
        def __init__(self, command: list[str], cwd: Path, env: dict[str, str]) -> None:
            assert (cwd / "pyproject.toml").is_file()
            seen.append((command, env))

        def wait(self) -> int:
            return 5

    monkeypatch.setattr(cli.subprocess, "Popen", FakeProcess)
    for name in StackSettings.load().environment():
        monkeypatch.setenv(name, "of the real stack")
    monkeypatch.setenv("CLINICAL_HOME", str(home))
    assert run("--test")[0] == 5
    assert run("--test", "-k", "x")[0] == 5
    assert seen[0][0][1:5] == ["-m", "pytest", "-m", "not slow"]
    assert seen[0][0][5] == "-n"
    assert seen[1][0][1:] == ["-m", "pytest", "-k", "x"]
    exported = {line.removeprefix("export ").partition("=")[0] for line in run("--env")[1].splitlines()}
    assert set(seen[0][1]) & (exported - {"PATH"}) == set()


# -------------------------------------------------------------------------------------------------------- information


def test_json_is_one_object_with_a_member_a_flag(run: Run) -> None:
    status, out, err = run("-h", "-o", "-v", "--json")
    result = json.loads(out)
    assert status == 0
    assert err == ""
    assert list(result) == ["ok", "health", "open", "visualize"]
    assert result["health"]["healthy"] is True
    assert result["health"]["services"][0]["name"] == "kafka"
    assert result["open"]["page"].endswith("/")
    assert result["visualize"]["levels"]["5"] == {"page": "healthy"}


def test_json_of_a_failure_is_still_one_object(run: Run, home: Path) -> None:
    status, out, _ = run("-h", "--json", fake=FakeClient(home, broken="kafka"))
    result = json.loads(out)
    assert status == 1
    assert result["ok"] is False
    assert result["health"]["healthy"] is False
    status, out, _ = run("--fetch-jars", "--json")
    assert status == 1
    assert json.loads(out)["error"]["cure"] == "set CLINICAL_MAVEN_URL"
    for arguments, why in ((["--strat"], "unknown: --strat"), (["-l", "-f"], "never ends")):
        status, out, _ = run(*arguments, "--json")
        assert status == 2
        assert why in json.loads(out)["error"]["why"]


def test_health_says_which_service_and_what_to_do(run: Run, home: Path) -> None:
    status, out, _ = run("-h", fake=FakeClient(home, broken="kafka"))
    assert status == 1
    assert "not healthy: kafka" in out
    assert "connection refused" in out
    assert "--logs kafka" in out


def test_a_service_that_cannot_be_had_does_not_make_the_stack_unhealthy(home: Path) -> None:
    out = io.StringIO()
    service = ServiceStatus("kafka", 0, State.NOT_INSTALLED, title="Kafka", error="no jars", cure="--fetch-jars")
    status = StackStatus(str(home), 5, [service, ServiceStatus("page", 5, State.HEALTHY)])
    report.show_health(Display(out, io.StringIO()), status, 5)
    assert "all healthy" in out.getvalue()
    assert "no jars" in out.getvalue()


def test_the_picture_marks_every_service(home: Path) -> None:
    fake = FakeClient(home, broken="kafka")
    text = "\n".join(report.picture(fake.status(StackSettings.load())))
    assert "[✗ Kafka]" in text
    assert "[✓ page :8085]" in text
    assert "level 0 infrastructure       ✗ kafka" in text


def test_logs_show_the_end_of_one_service(run: Run, home: Path) -> None:
    (home / "logs").mkdir()
    (home / "logs" / "kafka.log").write_text("".join(f"line {number}\n" for number in range(100)))
    (home / "logs" / "page.log").write_text("page line\n")
    status, out, _ = run("-l", "kafka", "-n", "2")
    assert status == 0
    assert "line 98\nline 99\n" in out
    assert "line 97" not in out
    assert "page line" not in out
    assert json.loads(run("-l", "--json", "-n", "1")[1])["logs"] == {"kafka": ["line 99"], "page": ["page line"]}
    status, _, err = run("-l", "kafak")
    assert status == 2
    assert "did you mean kafka?" in err


def test_following_a_log_shows_what_is_added_and_survives_rotation(tmp_path: Path) -> None:
    log = tmp_path / "kafka.log"
    log.write_text("old\n")
    lines: list[str] = []
    stop = threading.Event()
    thread = threading.Thread(
        target=cli.follow_files,
        args=({"kafka": log}, lines.append, False),
        kwargs={"keep_on": lambda: not stop.is_set()},
    )
    thread.start()
    time.sleep(0.2)

    def wait_for(count: int) -> None:
        deadline = time.monotonic() + 10
        while len(lines) < count and time.monotonic() < deadline:
            time.sleep(0.05)

    with log.open("a") as stream:
        stream.write("one\ntwo\nhal")
    wait_for(2)
    with log.open("a") as stream:
        stream.write("f\n")
    wait_for(3)
    log.rename(tmp_path / "kafka.log.1")
    log.write_text("new file\n")
    wait_for(4)
    stop.set()
    thread.join(10)
    assert lines == ["one", "two", "half", "new file"]


def test_tail_reads_only_the_end(tmp_path: Path) -> None:
    log = tmp_path / "big.log"
    log.write_text("".join(f"{number:08d}\n" for number in range(50_000)))
    assert report.tail(log, 3) == ["00049997", "00049998", "00049999"]
    assert report.tail(log, 0) == []
    assert report.tail(tmp_path / "absent.log", 3) == []


def test_a_summary_shows_rows_model_metrics_and_addresses(home: Path) -> None:
    out = io.StringIO()
    settings = StackSettings.load()
    model = report.Model(
        "adverse-event-predictor", "3", "champion", "cdisc-pilot", "r1", "xgboost",
        {"auroc": 0.71, "auroc_lower": 0.68, "auroc_upper": 0.74, "subjects": 254.0},
    )  # fmt: skip
    summary = report.Summary(
        "cdisc-pilot", [report.TableRows("silver/patient_vitals", 1234567, 4), report.TableRows("gold/x", None, None)],
        [model], 254, "01-701-1015", {"SUCCESS": 2}, report.urls(settings), [],
    )  # fmt: skip
    report.show_summary(Display(out, io.StringIO()), summary)
    text = out.getvalue()
    assert "silver/patient_vitals  1,234,567" in text
    assert "gold/x" not in text
    assert "adverse-event-predictor version 3, alias champion, xgboost, trial cdisc-pilot" in text
    assert "0.710  (95 % interval 0.680 to 0.740)" in text
    assert '{"patient_id": "01-701-1015"}' in text
    assert settings.url("page") in text
    assert summary.as_dict()["tables"]["gold/x"] == {"rows": None, "version": None}


def test_a_summary_of_services_that_are_down_says_so_and_ends(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ports = dict.fromkeys(("postgres", "redis", "s3", "mlflow"), 1)
    settings = StackSettings.load()
    settings = replace_ports(settings, ports)
    for name, value in settings.environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(report, "read_tables", lambda: (_ for _ in ()).throw(ConnectionError("refused")))
    summary = report.read_summary(settings, "cdisc-pilot")
    assert len(summary.problems) == 4
    password = settings.secrets().postgres_password.get_secret_value()
    assert not any(password in problem for problem in summary.problems)


def replace_ports(settings: StackSettings, ports: dict[str, int]) -> StackSettings:
    return settings.model_copy(update={"ports": {**settings.ports, **ports}})


# --------------------------------------------------------------------------------------------------------------- words


@pytest.mark.parametrize(("value", "text"), [(0.42, "0.4 s"), (12.3, "12 s"), (185, "3 min 05 s")])
def test_durations(value: float, text: str) -> None:
    assert seconds(value) == text


def test_an_error_block_has_what_why_and_cure() -> None:
    error = UserError("it failed", "first\nsecond", "do this")
    assert str(error) == "error: it failed\n  why:  first\n        second\n  cure: do this"
    assert str(replace(error, why="", cure="")) == "error: it failed"


def test_the_command_line_imports_nothing_heavy() -> None:
    import subprocess
    import sys

    heavy = ("dagster", "pyspark", "mlflow", "pandas", "deltalake", "httpx", "rich")
    code = (
        "import sys, clinical_orchestration.stack.cli as cli\n"
        "cli.parse(['-h'])\n"
        f"print([name for name in {heavy!r} if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
