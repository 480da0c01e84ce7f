"""The stack as its users meet it: start, stop, restart, errors, two homes. A light one of Redis and S3."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from clinical_orchestration.ingestion.status_file import StatusFile
from clinical_orchestration.stack import client, control, engine, jars, java, paths, probes, services, supervisor
from clinical_orchestration.stack.engine import Engine
from clinical_orchestration.stack.model import Event, StackError, StackStatus, State
from clinical_orchestration.stack.ports import LOOPBACK
from clinical_orchestration.stack.services import Context, ServiceSpec, with_needs
from clinical_orchestration.stack.settings import INTERNAL_PORTS, PUBLIC_PORTS, StackSettings
from clinical_orchestration.stack.testing import NotInstalledError, embedded


def free_settings(home: Path) -> StackSettings:
    return StackSettings.load(home, ports=dict.fromkeys((*PUBLIC_PORTS, *INTERNAL_PORTS), 0))


def wait_for(condition: Callable[[], bool], seconds: float) -> float:
    """Wait for a condition; return how long it took, or fail."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < seconds, f"did not happen within {seconds} s"
        time.sleep(0.05)
    return time.monotonic() - began


def processes_of(home: Path) -> list[psutil.Process]:
    """Return live processes that name the home in their command line or work in it."""
    found = []
    for process in psutil.process_iter():
        try:
            text = " ".join(process.cmdline())
            if str(home) in text and process.pid != os.getpid() and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:
            continue
    return found


# ------------------------------------------------------------------------------------- the engine, with tiny services


def sleeper(name: str, *needs: str, code: str = "import time; time.sleep(600)", **fields: object) -> ServiceSpec:
    values: dict[str, object] = {
        "needs": needs,
        "command": lambda context: [sys.executable, "-S", "-c", code],
        "probe": lambda context, timeout: None,
        "probe_every": 0.2,
        "stop_timeout": 2.0,
    }
    return ServiceSpec(name, name.title(), 0, **{**values, **fields})  # type: ignore[arg-type]


@pytest.fixture
def run_engine(tmp_path: Path) -> Iterator[Callable[..., Engine]]:
    engines: list[Engine] = []

    def build(*specs: ServiceSpec, events: list[Event] | None = None) -> Engine:
        made = Engine(free_settings(tmp_path), specs, events.append if events is not None else None)
        engines.append(made)
        return made

    yield build
    for one in engines:
        one.stop()


def test_services_start_after_their_needs_and_stop_before_them(run_engine: Callable[..., Engine]) -> None:
    events: list[Event] = []
    made = run_engine(sleeper("page", "store"), sleeper("store", "disk"), sleeper("disk"), events=events)

    made.start()
    states = made.wait_ready(["page", "store", "disk"], 20)
    made.stop()

    assert [state.state for state in states] == [State.HEALTHY] * 3
    healthy = [event.service for event in events if event.state is State.HEALTHY]
    stopped = [event.service for event in events if event.state is State.STOPPED]
    assert healthy == ["disk", "store", "page"]
    assert stopped == ["page", "store", "disk"]


def test_stopping_a_service_stops_what_needs_it_and_nothing_else(run_engine: Callable[..., Engine]) -> None:
    made = run_engine(sleeper("disk"), sleeper("store", "disk"), sleeper("other"))
    made.start()
    made.wait_ready(["disk", "store", "other"], 20)

    made.stop(["disk"])

    assert {name: unit.status.state for name, unit in made.units.items()} == {
        "disk": State.STOPPED,
        "store": State.STOPPED,
        "other": State.HEALTHY,
    }


def test_starting_one_service_starts_only_its_needs(run_engine: Callable[..., Engine]) -> None:
    made = run_engine(sleeper("disk"), sleeper("store", "disk"), sleeper("other"))

    made.start(["store"])
    made.wait_ready(["store"], 20)

    assert made.units["disk"].status.state is State.HEALTHY
    assert made.units["other"].status.state is State.STOPPED


def test_a_killed_service_is_back_at_once_and_the_reason_is_kept(run_engine: Callable[..., Engine]) -> None:
    made = run_engine(sleeper("store"))
    made.start()
    made.wait_ready(["store"], 20)
    status = made.units["store"].status
    first = status.pid
    assert first is not None

    os.kill(first, signal.SIGKILL)

    wait_for(lambda: status.pid not in (None, first) and status.state is State.HEALTHY, 15)
    assert status.restarts == 1
    assert status.error is not None
    assert "SIGKILL" in status.error


def test_a_service_that_does_not_answer_is_shown_and_replaced(run_engine: Callable[..., Engine]) -> None:
    answers = {"ok": True}

    def probe(context: Context, timeout: float) -> None:
        if not answers["ok"]:
            raise OSError("timed out")

    events: list[Event] = []
    made = run_engine(sleeper("store", probe=probe, probe_timeout=0.3, hung_after=4.0), events=events)
    made.start()
    made.wait_ready(["store"], 20)
    status = made.units["store"].status
    first = status.pid

    answers["ok"] = False
    shown = wait_for(lambda: status.state is State.UNHEALTHY, 5)
    wait_for(lambda: status.pid not in (None, first), 10)
    answers["ok"] = True
    wait_for(lambda: status.state is State.HEALTHY, 10)

    assert shown < 5
    assert any("did not answer" in event.message for event in events)


def test_a_service_that_ends_again_and_again_is_reported_with_its_last_words(
    run_engine: Callable[..., Engine],
) -> None:
    def never(context: Context, timeout: float) -> None:
        raise OSError("refused")

    made = run_engine(sleeper("store", code="import sys; sys.exit('the disk is upside down')", probe=never))
    made.start()

    (state,) = made.wait_ready(["store"], 20)

    assert state.state is not State.HEALTHY
    assert "ended with status 1: the disk is upside down" in str(state.error)


def test_a_program_that_ignores_the_polite_signal_is_killed_with_its_children(
    run_engine: Callable[..., Engine],
) -> None:
    code = (
        "import signal, subprocess, sys, time; signal.signal(signal.SIGTERM, signal.SIG_IGN);"
        "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']); time.sleep(600)"
    )
    made = run_engine(sleeper("store", code=code, stop_timeout=0.5))
    made.start()
    made.wait_ready(["store"], 20)
    pid = made.units["store"].status.pid
    assert pid is not None
    wait_for(lambda: len(psutil.Process(pid).children()) == 1, 20)
    family = [psutil.Process(pid), *psutil.Process(pid).children()]

    made.stop()

    wait_for(lambda: not any(one.is_running() and one.status() != psutil.STATUS_ZOMBIE for one in family), 5)


def test_what_left_its_process_group_is_ended_at_the_stop_too(run_engine: Callable[..., Engine]) -> None:
    code = (
        "import subprocess, sys, time;"
        "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'], start_new_session=True);"
        "time.sleep(600)"
    )
    made = run_engine(sleeper("store", code=code))
    made.start()
    made.wait_ready(["store"], 20)
    pid = made.units["store"].status.pid
    assert pid is not None
    wait_for(lambda: len(psutil.Process(pid).children()) == 1, 20)
    stray = psutil.Process(pid).children()[0]

    made.stop()

    wait_for(lambda: not stray.is_running() or stray.status() == psutil.STATUS_ZOMBIE, 5)


def test_a_service_without_its_files_is_not_installed_and_hinders_nobody(run_engine: Callable[..., Engine]) -> None:
    broker = sleeper("broker", installed=lambda settings: StackError("the jars are missing", "fetch them"))
    made = run_engine(broker, sleeper("gateway", "broker"))
    made.start()

    states = {state.name: state for state in made.wait_ready(["broker", "gateway"], 20)}

    assert states["broker"].state is State.NOT_INSTALLED
    assert states["broker"].cure == "fetch them"
    assert states["gateway"].state is State.HEALTHY


def test_a_service_that_nobody_asked_for_is_off_and_no_failure(
    run_engine: Callable[..., Engine], tmp_path: Path
) -> None:
    wanted = False

    def off(_: StackSettings) -> StackError | None:
        return None if wanted else StackError("off: not configured", "configure it")

    bridge = sleeper("bridge", "broker", off=off)
    made = run_engine(sleeper("broker"), bridge)
    made.start(["bridge"])

    states = {state.name: state for state in made.wait_ready(["broker", "bridge"], 20)}

    assert (states["bridge"].state, states["bridge"].ok) == (State.OFF, True)
    assert (states["bridge"].error, states["bridge"].cure) == ("off: not configured", "configure it")
    asked = control._ask_service(made.settings, bridge, states["bridge"])
    assert (asked.state, asked.error, asked.cure) == (State.OFF, "off: not configured", "configure it")
    wanted = True
    made.start(["bridge"])
    wait_for(lambda: made.units["bridge"].status.state is State.HEALTHY, 20)


@pytest.mark.parametrize(
    ("name", "level", "variable", "value"),
    [
        ("mq_bridge", 1, "CLINICAL_MQ_URL", "https://mq:9443"),
        ("mq_bridge", 1, "CLINICAL_MQ", "true"),
        ("streaming", 2, "CLINICAL_STREAMING", "true"),
    ],
)
def test_optional_workers_are_off_until_they_are_configured(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, level: int, variable: str, value: str
) -> None:
    spec, settings = services.spec(name), free_settings(tmp_path)
    assert spec.level == level
    assert spec.off is not None
    monkeypatch.delenv(variable, raising=False)
    absent = spec.off(settings)
    assert absent is not None
    assert variable in absent.cure
    monkeypatch.setenv(variable, value)
    assert spec.off(settings) is None


def test_a_worker_is_healthy_while_its_status_is_young_and_its_own(tmp_path: Path) -> None:
    settings, probe = free_settings(tmp_path), services.spec("mq_bridge").probe
    with pytest.raises(probes.ProbeError, match="not told"):
        probe(Context(settings, os.getpid()), 1.0)
    written = StatusFile(settings.home, "mq_bridge")
    written.write({"state": "running"}, now=True)
    assert probe(Context(settings, os.getpid()), 1.0)
    with pytest.raises(probes.ProbeError, match="not told"):
        probe(Context(settings, os.getpid() + 1), 1.0)
    old = json.loads(written.path.read_text())
    written.path.write_text(json.dumps({**old, "written_at": old["written_at"] - 1000}))
    with pytest.raises(probes.ProbeError, match="for 1000 s"):
        probe(Context(settings, os.getpid()), 1.0)


def test_the_log_is_rotated_while_the_program_writes(run_engine: Callable[..., Engine]) -> None:
    from clinical_orchestration.stack.process import rotate

    code = "import time\nwhile True: print('x' * 1000, flush=True); time.sleep(0.005)"
    made = run_engine(sleeper("store", code=code))
    made.start()
    made.wait_ready(["store"], 20)
    log = paths.log_file(made.settings.home, "store")
    wait_for(lambda: log.exists() and log.stat().st_size > 50_000, 20)

    assert rotate(log, limit=40_000)

    assert log.with_name("store.log.1").stat().st_size > 40_000
    wait_for(lambda: log.stat().st_size > 2_000, 10)
    assert b"\0" not in log.read_bytes()  # no hole: the program appends


def test_every_need_is_a_service_and_no_service_needs_a_higher_level() -> None:
    known = {one.name: one for one in services.specs()}

    for one in known.values():
        for need in one.needs:
            assert known[need].level <= one.level
    assert sorted({one.level for one in known.values()}) == list(range(6))


# ---------------------------------------------------------------------------------------------------- errors at start


def test_a_taken_port_names_port_holder_and_setting(tmp_path: Path) -> None:
    with socket.create_server((LOOPBACK, 0)) as other:
        port = other.getsockname()[1]
        settings = StackSettings.load(tmp_path, ports={"redis": port})
        with pytest.raises(StackError, match=rf"port {port} \(redis\) is taken by pid {os.getpid()} ") as raised:
            control.check_ports(settings, [services.spec("redis")])

    assert "CLINICAL_PORT_REDIS" in raised.value.cure


def test_a_port_that_is_just_being_given_back_is_waited_for(tmp_path: Path) -> None:
    other = socket.create_server((LOOPBACK, 0))
    settings = StackSettings.load(tmp_path, ports={"redis": other.getsockname()[1]})
    threading.Timer(0.3, other.close).start()

    control.check_ports(settings, [services.spec("redis")])


def test_a_full_disk_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control, "NEEDED_MB", 10**9)

    with pytest.raises(StackError, match="MB left") as raised:
        client.start(free_settings(tmp_path / "home"), 0)

    assert "CLINICAL_HOME" in raised.value.cure


def test_a_home_that_is_no_folder_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")

    with pytest.raises(StackError, match="cannot be used"):
        control.prepare_home(tmp_path / "file" / "home")


def test_without_java_kafka_is_not_installed_and_the_cure_is_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(java, "candidates", list)
    settings = free_settings(tmp_path)

    absent = services.spec("kafka").installed

    assert absent is not None
    error = absent(settings)
    assert error is not None
    assert "no Java 17" in str(error)
    assert "openjdk" in error.cure
    assert settings.environment()["CLINICAL_KAFKA_ENABLED"] == "false"


def test_an_old_java_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = tmp_path / "java"
    old.write_text("#!/bin/sh\necho 'openjdk version \"11.0.2\" 2019' >&2\n")
    old.chmod(0o755)
    monkeypatch.setattr(java, "candidates", lambda: [str(old)])

    with pytest.raises(StackError, match="version 11"):
        java.find_java()


def test_only_the_folder_of_a_stack_is_cleaned(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")

    with pytest.raises(StackError, match="no folder of a stack"):
        client.clean(free_settings(tmp_path))

    assert (tmp_path / "thesis.txt").exists()


def test_a_stopped_home_has_only_stopped_services(tmp_path: Path) -> None:
    found = client.status(free_settings(tmp_path))

    assert found.level == -1
    assert {one.state for one in found.services} <= {State.STOPPED, State.NOT_INSTALLED, State.OFF}
    assert StackStatus.from_dict(found.as_dict()) == found


# -------------------------------------------------------------------------------------------- real services, one home


@pytest.mark.integration
def test_two_homes_run_side_by_side(tmp_path: Path) -> None:
    with embedded(tmp_path / "a", "redis") as one, embedded(tmp_path / "b", "redis") as two:
        import redis

        redis.Redis.from_url(one["REDIS_URL"]).set("where", "a")
        assert redis.Redis.from_url(two["REDIS_URL"]).get("where") is None


@pytest.mark.integration
def test_without_the_repository_the_stack_says_so_and_other_services_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CLINICAL_JARS", str(tmp_path / "jars"))
    monkeypatch.setenv("CLINICAL_MAVEN_URL", "http://127.0.0.1:9/maven2")
    monkeypatch.setattr(jars, "ATTEMPTS", 1)

    with pytest.raises(NotInstalledError, match="cannot be reached"), embedded(tmp_path / "home", "kafka", "redis"):
        pass

    settings = free_settings(tmp_path / "home")
    assert settings.environment()["CLINICAL_KAFKA_ENABLED"] == "false"
    assert settings.environment()["CLINICAL_SPARK_CONNECTORS"] == "false"
    connectors = engine.connectors_status(settings, State.HEALTHY)
    assert connectors.state is State.NOT_INSTALLED
    assert "CLINICAL_MAVEN_URL" in str(connectors.cure)


@pytest.fixture
def light_stack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StackSettings]:
    """A home whose supervisor only knows Redis, S3 and the feature store."""
    # the supervisor is another process: it gets its short list of services by a start-up file
    site = tmp_path / "site"
    site.mkdir()
    (site / "light_supervisor.py").write_text(
        "from clinical_orchestration.stack import services, supervisor\n"
        "light = services.with_needs(['feature_store'])\n"
        "supervisor.specs = lambda: light\n"
        "supervisor.main()\n"
    )
    light = tuple(with_needs(["feature_store"]))
    for module in (control, supervisor):
        monkeypatch.setattr(module, "specs", lambda: light)
    blank = control._blank
    monkeypatch.setattr(
        control,
        "_blank",
        lambda settings: StackStatus(
            home=str(settings.home), level=-1, services=[engine.blank_status(settings, one) for one in light]
        ),
    )
    spawn = control.spawn_detached

    def spawn_light(command: list[str], **options: object) -> subprocess.Popen[bytes]:
        module = command.index("-m")
        changed = [*command[:module], str(site / "light_supervisor.py"), *command[module + 2 :]]
        return spawn(changed, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(control, "spawn_detached", spawn_light)
    settings = free_settings(tmp_path / "home")
    yield settings
    assert blank
    client.stop(settings)
    assert processes_of(settings.home) == []


@pytest.mark.integration
def test_a_stack_starts_restarts_what_dies_and_stops_without_remains(light_stack: StackSettings) -> None:
    settings = light_stack
    events: list[Event] = []

    started = client.start(settings, 5, events.append)

    assert started.healthy_up_to(5)
    assert [event.service for event in events if event.state is State.HEALTHY][-1] == "feature_store"
    assert client.health(settings, 5).healthy_up_to(5)
    # a second start changes nothing
    pids = {one.name: one.pid for one in started.services}
    assert {one.name: one.pid for one in client.start(settings, 5).services} == pids

    # a killed service is told and comes back with its data
    import redis

    connection = redis.Redis.from_url(settings.environment()["REDIS_URL"])
    connection.set("kept", "yes")
    time.sleep(1.2)  # the append-only file is written every second
    victim = started.service("redis").pid
    assert victim is not None
    os.kill(victim, signal.SIGKILL)
    wait_for(lambda: client.status(settings).service("redis").restarts == 1, 5)
    wait_for(lambda: client.health(settings, 5).healthy_up_to(5), 15)
    told = client.health(settings, 5).service("redis")
    assert "SIGKILL" in str(told.error)
    assert connection.get("kept") == b"yes"

    # the higher level stops alone
    assert client.stop(settings, 3).level == 2
    states = {one.name: one.state for one in client.status(settings).services}
    assert states == {"redis": State.HEALTHY, "s3": State.HEALTHY, "feature_store": State.STOPPED}

    stopped = client.stop(settings)
    assert {one.state for one in stopped.services} == {State.STOPPED}
    assert processes_of(settings.home) == []
    # data stays, until it is cleaned
    assert client.start(settings, 0).healthy_up_to(0)
    assert redis.Redis.from_url(settings.environment()["REDIS_URL"]).get("kept") == b"yes"
    client.clean(settings)
    assert [path.name for path in settings.home.iterdir()] == ["settings.json"]
    assert processes_of(settings.home) == []


@pytest.mark.integration
def test_nothing_outlives_a_killed_supervisor(light_stack: StackSettings) -> None:
    settings = light_stack
    started = client.start(settings, 0)
    assert started.supervisor_pid is not None
    victims = [started.supervisor_pid, psutil.Process(started.supervisor_pid).ppid()]

    for victim in reversed(victims):  # the guardian first, so that nobody cleans up
        os.kill(victim, signal.SIGKILL)

    wait_for(lambda: processes_of(settings.home) == [], 10)
    wait_for(lambda: client.status(settings).level == -1, 5)
    assert client.start(settings, 0).healthy_up_to(0)


@pytest.mark.integration
def test_a_hung_service_is_told_within_five_seconds(light_stack: StackSettings) -> None:
    settings = light_stack
    started = client.start(settings, 0)
    victim = started.service("redis").pid
    assert victim is not None

    os.kill(victim, signal.SIGSTOP)
    try:
        took = wait_for(lambda: client.status(settings).service("redis").state is State.UNHEALTHY, 8)
        assert not client.health(settings, 0).healthy_up_to(0)
    finally:
        os.kill(victim, signal.SIGCONT)

    assert took < 6
    wait_for(lambda: client.status(settings).service("redis").state is State.HEALTHY, 15)
