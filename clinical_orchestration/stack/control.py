"""Talks to a home's supervisor: the work behind :mod:`.client`."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from clinical_orchestration.stack import jars, paths
from clinical_orchestration.stack.engine import (
    blank_status,
    connectors_status,
    end_leftovers,
    short,
    taken_port,
)
from clinical_orchestration.stack.model import Event, OnEvent, ServiceStatus, StackError, StackStatus, State
from clinical_orchestration.stack.ports import LINGER_SECONDS, free_before
from clinical_orchestration.stack.process import Identity, disk_cure, log_tail, spawn_detached
from clinical_orchestration.stack.services import Context, ServiceSpec, base_environment, specs
from clinical_orchestration.stack.settings import StackSettings, port_variable, write_private
from clinical_orchestration.stack.supervisor import take_lock

POLL_SECONDS = 0.1
SUPERVISOR_SECONDS = 30.0
START_SECONDS = 420.0
STOP_SECONDS = 120.0
STALE_SECONDS = 10.0
NEEDED_MB = 1000


def start(settings: StackSettings, level: int, on_event: OnEvent | None) -> StackStatus:
    """See :func:`.client.start`."""
    prepare_home(settings.home)
    pid = _live_supervisor(settings.home)
    running = {one.name for one in status(settings).services if one.state is not State.STOPPED} if pid else set()
    check_ports(settings, [one for one in specs() if one.level <= level and one.name not in running])
    settings.secrets()
    log_from = 0
    process: subprocess.Popen[bytes] | None = None
    if pid is None:
        settings.save()
        for stale in (paths.status_file(settings.home), paths.request_file(settings.home)):
            stale.unlink(missing_ok=True)
        log = paths.log_file(settings.home, "supervisor")
        log_from = log.stat().st_size if log.exists() else 0
        settings.release_ports()  # the supervisor reserves them, for as long as it runs
        process = spawn_detached(
            [sys.executable, "-m", "clinical_orchestration.stack.supervisor", "--home", str(settings.home)],
            log=log,
            environment=base_environment(settings),
        )
        _wait_for_supervisor(settings, process, log_from)
    listener = _Listener(on_event, skip_old=pid is not None, data=_read(settings.home))
    request = _ask(settings, "start", level)
    deadline = time.monotonic() + START_SECONDS
    seen_bad: dict[str, float] = {}
    while True:
        data = _read(settings.home)
        listener.hear(data)
        current = _status_from(settings, data)
        if data.get("handled", 0) >= request:
            wanted = [one for one in current.services if one.level <= level]
            if current.error:
                raise StackError(current.error, current.cure or "")
            if all(one.ok for one in wanted):
                return current
            bad = [one for one in wanted if one.state is State.UNHEALTHY]
            seen_bad = {one.name: seen_bad.get(one.name, time.monotonic()) for one in wanted if one.restarts >= 2}
            # a service that failed three times does not get ready by waiting longer
            failed = [one for one in bad if one.restarts >= 2 and time.monotonic() - seen_bad[one.name] > 3]
            if failed and not any(one.state is State.STARTING and not _waits(one) for one in wanted):
                raise _not_ready(bad)
        if time.monotonic() > deadline:
            raise _not_ready([one for one in current.services if one.level <= level and not one.ok])
        if paths.supervisor_pid(settings.home) is None:
            raise _supervisor_ended(settings, log_from)
        time.sleep(POLL_SECONDS)


def stop(settings: StackSettings, level: int | None, on_event: OnEvent | None) -> StackStatus:
    """See :func:`.client.stop`."""
    home = settings.home
    pid = paths.supervisor_pid(home)
    if pid is None:
        if paths.processes_file(home).exists():
            lock = take_lock(home)
            if lock is not None:
                try:
                    end_leftovers(settings)
                finally:
                    os.close(lock)
        return status(settings)
    data = _read(home)
    listener = _Listener(on_event, skip_old=True, data=data)
    everything = level is None or level <= 0
    family = _supervisor_family(pid)
    request = _ask(settings, "shutdown" if everything else "stop", level or 0)
    deadline = time.monotonic() + STOP_SECONDS
    while time.monotonic() < deadline:
        data = _read(home)
        listener.hear(data)
        if everything and paths.supervisor_pid(home) is None:
            listener.hear(_read(home))
            _wait_for_end(family)
            break
        if data.get("handled", 0) >= request:
            if data.get("error"):
                raise StackError(str(data["error"]), str(data.get("cure") or ""))
            if not everything:
                break
        time.sleep(POLL_SECONDS)
    else:
        _end_supervisor(settings, pid)
    return status(settings)


def status(settings: StackSettings) -> StackStatus:
    """See :func:`.client.status`."""
    pid = paths.supervisor_pid(settings.home)
    if pid is None:
        return _blank(settings)
    data = _read(settings.home)
    current = _status_from(settings, data)
    current.supervisor_pid = pid or current.supervisor_pid
    age = time.time() - float(data.get("written_at", time.time()))
    if age > STALE_SECONDS and current.error is None:
        current.error = f"the supervisor (pid {pid}) has not reported for {age:.0f} s"
        current.cure = f"Its log: {paths.log_file(settings.home, 'supervisor')}. Stop and start the stack."
    return current


def health(settings: StackSettings, level: int) -> StackStatus:
    """See :func:`.client.health`."""
    reported = status(settings)
    wanted = [one for one in specs() if one.level <= level]
    known = {one.name: one for one in reported.services}
    with ThreadPoolExecutor(len(wanted) or 1, thread_name_prefix="health") as pool:
        asked = pool.map(lambda one: _ask_service(settings, one, known[one.name]), wanted)
        services = list(asked)
    spark = next((one for one in services if one.name == "spark"), None)
    if spark is not None:
        services.insert(services.index(spark) + 1, connectors_status(settings, spark.state))
    reported.services = services
    return reported


def clean(settings: StackSettings) -> None:
    """See :func:`.client.clean`."""
    home = settings.home
    if not home.exists():
        return
    known = [paths.settings_file(home), paths.secrets_file(home), paths.run_folder(home)]
    if not any(path.exists() for path in known):
        raise StackError(f"{home} is no folder of a stack; nothing was removed", "Check CLINICAL_HOME.")
    if (home / ".git").exists() or home in (Path.home(), Path(home.anchor)):
        raise StackError(f"{home} holds more than a stack; nothing was removed", "Check CLINICAL_HOME.")
    stop(settings, None, None)
    lock = take_lock(home) if paths.run_folder(home).exists() else None
    try:
        for path in home.iterdir():
            if path == paths.settings_file(home):
                continue
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
    except OSError as error:
        raise StackError(f"{error.filename or home}: {error.strerror}", disk_cure(error, home)) from error
    finally:
        if lock is not None:
            os.close(lock)


def install_jars(settings: StackSettings, on_event: OnEvent | None) -> bool:
    """See :func:`.client.install_jars`."""

    def progress(done: int, total: int) -> None:
        if on_event:
            message = f"downloading jars of Kafka and Spark's connectors: {done / 1e6:.0f} of {total / 1e6:.0f} MB"
            on_event(Event("jars", message, time.time(), progress=done / total if total else 1.0))

    wanted = [jar for group in jars.GROUPS for jar in jars.locked(group)]
    jars.install(settings.jars, wanted, settings.maven_url, progress)
    settings.refresh_installed()
    return settings.kafka_installed and settings.spark_connectors_installed


def prepare_home(home: Path) -> None:
    """Make the home's folders; raise :class:`StackError` where it cannot be written or has no space left."""
    try:
        for folder in (home, paths.run_folder(home), paths.log_folder(home), home / "data", home / "tmp"):
            folder.mkdir(parents=True, exist_ok=True)
        if home.stat().st_uid == os.getuid():
            # as root, PostgreSQL runs as another user, which must pass this folder; it can list nothing
            home.chmod(0o711 if os.geteuid() == 0 else 0o700)
            (home / "data").chmod(0o711 if os.geteuid() == 0 else 0o700)
            for folder in (paths.run_folder(home), paths.log_folder(home), home / "tmp"):
                folder.chmod(0o700)
        trial = home / "tmp" / f".space-{os.getpid()}"
        try:
            with open(trial, "wb") as stream:
                stream.write(b"\0" * (1 << 20))
                stream.flush()
                os.fsync(stream.fileno())
        finally:
            trial.unlink(missing_ok=True)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StackError(f"the disk of {home} is full", disk_cure(error, home)) from error
        raise StackError(f"{home} cannot be used: {error.strerror or error}", disk_cure(error, home)) from error
    free = shutil.disk_usage(home).free / 1e6
    if free < NEEDED_MB:
        raise StackError(
            f"the disk of {home} has {free:.0f} MB left; the stack needs {NEEDED_MB} MB to start",
            disk_cure(OSError(errno.ENOSPC, ""), home),
        )


def check_ports(settings: StackSettings, wanted: Sequence[ServiceSpec]) -> None:
    """Raise :class:`StackError` for each port of services to be started that another program has."""
    problems: list[StackError] = []
    taken: list[str] = []
    patience = time.monotonic() + LINGER_SECONDS
    for one in wanted:
        if one.port and not free_before(settings.ports[one.port], patience):
            absent = one.installed(settings) if one.installed else None
            if absent is None or one.needs_jars:
                problems.append(taken_port(one.port, settings.ports[one.port]))
                taken.append(one.port)
    if len(problems) == 1:
        raise problems[0]
    if problems:
        text = "\n  ".join(["several ports are taken:", *(str(problem.args[0]) for problem in problems)])
        variables = ", ".join(port_variable(name) for name in taken)
        raise StackError(
            text,
            f"End these programs (another stack? then --stop it), or set {variables} to other ports "
            "(0 picks a free one), and CLINICAL_HOME to a folder of its own.",
        )


def _ask_service(settings: StackSettings, spec: ServiceSpec, reported: ServiceStatus) -> ServiceStatus:
    """Probe one service now; up to two attempts, so that one slow answer is no alarm."""
    import psutil

    found = blank_status(settings, spec)
    found.pid, found.restarts, found.rss_mb = reported.pid, reported.restarts, reported.rss_mb
    found.started_at, found.note = reported.started_at, reported.note
    off = spec.off(settings) if spec.off else None
    if reported.state is State.OFF or (off is not None and reported.state is State.STOPPED):
        found.state = State.OFF
        found.error, found.cure = reported.error, reported.cure
        if off is not None:
            found.error, found.cure = str(off.args[0]), off.cure
        return found
    absent = spec.installed(settings) if spec.installed else None
    if absent is not None or reported.state is State.NOT_INSTALLED:
        found.state = State.NOT_INSTALLED
        found.error = str(absent.args[0]) if absent else reported.error
        found.cure = absent.cure if absent else reported.cure
        return found
    alive = spec.command is None or (reported.pid is not None and psutil.pid_exists(reported.pid))
    began = time.monotonic()
    try:
        spec.probe(Context(settings, reported.pid), spec.probe_timeout)
        if not alive:
            raise StackError("its port answers, but no process of this stack runs it")
        found.state = State.HEALTHY
        found.latency_ms = round((time.monotonic() - began) * 1000, 1)
        if reported.restarts and reported.started_at and time.time() - reported.started_at < 60:
            found.error = reported.error
            found.note = f"restarted {time.time() - reported.started_at:.0f} s ago"
    except Exception as error:
        found.state = State.STOPPED if reported.state is State.STOPPED else State.UNHEALTHY
        if found.state is State.STOPPED:
            found.error, found.cure = "not running", f"Start it: ./pipeline-manager.sh --start --level {spec.level}"
        elif reported.state in (State.STARTING, State.UNHEALTHY) and reported.error:
            found.error, found.cure = reported.error, reported.cure
        else:
            found.error = "its process is gone" if not alive else short(error)
            found.cure = f"The supervisor restarts it. Its log: {found.log}" if found.log else None
        if reported.state is State.STARTING and reported.restarts == 0:
            found.state = State.STARTING
            found.error, found.cure = reported.error, reported.cure
    return found


class _Listener:
    """Passes each of the supervisor's events on once."""

    def __init__(self, on_event: OnEvent | None, skip_old: bool, data: dict[str, Any]) -> None:
        self._on_event = on_event
        self._last = max((number for number, _ in data.get("events", [])), default=0) if skip_old else 0

    def hear(self, data: dict[str, Any]) -> None:
        for number, item in data.get("events", []):
            if number > self._last:
                self._last = number
                if self._on_event:
                    state = State(item["state"]) if item.get("state") else None
                    self._on_event(Event(**{**item, "state": state}))


def _ask(settings: StackSettings, action: str, level: int) -> int:
    number = time.time_ns()
    # a supervisor that runs was started with the settings of that time; these two may have been the cure since
    download = {"jars": str(settings.jars), "maven_url": settings.maven_url}
    request = {"id": number, "action": action, "level": level, **download}
    write_private(paths.request_file(settings.home), json.dumps(request))
    return number


def _read(home: Path) -> dict[str, Any]:
    try:
        data = json.loads(paths.status_file(home).read_text())
    except (OSError, ValueError):
        return {}
    return data if isinstance(data, dict) else {}


def _status_from(settings: StackSettings, data: dict[str, Any]) -> StackStatus:
    return StackStatus.from_dict(data) if data.get("services") else _blank(settings)


def _blank(settings: StackSettings) -> StackStatus:
    services = [blank_status(settings, one) for one in specs()]
    spark = next(index for index, one in enumerate(services) if one.name == "spark")
    services.insert(spark + 1, connectors_status(settings, State.STOPPED))
    return StackStatus(home=str(settings.home), level=-1, services=services)


def _waits(one: ServiceStatus) -> bool:
    return (one.note or "").startswith("waiting")


def _not_ready(failed: Sequence[ServiceStatus]) -> StackError:
    reasons = "\n".join(f"{one.title or one.name}: {one.error or one.note or one.state.value}" for one in failed)
    cures = " ".join(dict.fromkeys(one.cure for one in failed if one.cure))
    return StackError(reasons or "the stack did not get ready in time", cures or "See the logs.")


def _wait_for_supervisor(settings: StackSettings, process: subprocess.Popen[bytes], log_from: int) -> None:
    deadline = time.monotonic() + SUPERVISOR_SECONDS
    while time.monotonic() < deadline:
        if _read(settings.home) and paths.supervisor_pid(settings.home) is not None:
            data = _read(settings.home)
            if data.get("error"):
                raise StackError(str(data["error"]), str(data.get("cure") or ""))
            return
        if process.poll() is not None and paths.supervisor_pid(settings.home) is None:
            raise _supervisor_ended(settings, log_from)
        time.sleep(0.05)
    raise StackError(
        f"the supervisor did not report within {SUPERVISOR_SECONDS:.0f} s",
        f"Its log: {paths.log_file(settings.home, 'supervisor')}",
    )


def _supervisor_ended(settings: StackSettings, log_from: int) -> StackError:
    log = paths.log_file(settings.home, "supervisor")
    data = _read(settings.home)
    if data.get("error"):
        return StackError(str(data["error"]), str(data.get("cure") or ""))
    tail = log_tail(log, since=log_from)
    return StackError(f"the supervisor ended: {tail or 'no reason given'}", f"Its log: {log}")


def _live_supervisor(home: Path) -> int | None:
    """Return the supervisor's pid; one that was just killed gets a moment to let go of the lock."""
    deadline = time.monotonic() + 3.0
    while True:
        pid = paths.supervisor_pid(home)
        identity = Identity.of(pid) if pid else None
        if not pid or (identity is not None and identity.alive()) or time.monotonic() > deadline:
            return pid
        time.sleep(0.05)


def _supervisor_family(pid: int) -> list[Identity]:
    """Return the supervisor and its guardian."""
    import psutil

    with contextlib.suppress(psutil.Error):
        return [one for one in (Identity.of(pid), Identity.of(psutil.Process(pid).ppid())) if one and one.pid > 1]
    return []


def _wait_for_end(family: Sequence[Identity], seconds: float = 5.0) -> None:
    deadline = time.monotonic() + seconds
    while any(one.alive() for one in family) and time.monotonic() < deadline:
        time.sleep(0.02)


def _end_supervisor(settings: StackSettings, pid: int) -> None:
    """End a supervisor that does not answer, and what it started."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.kill(pid, signal.SIGKILL)
    deadline = time.monotonic() + 15
    while time.monotonic() < deadline:
        lock = take_lock(settings.home)
        if lock is not None:
            try:
                end_leftovers(settings)
            finally:
                os.close(lock)
            return
        time.sleep(0.1)
    raise StackError(f"the supervisor (pid {pid}) cannot be ended", f"End it: kill -9 {pid}")
