"""Runs services: start in the order of their needs, watch, restart with back-off, stop in reverse order.

One thread a service. The thread starts the process (which is killed should the thread end without stopping it), waits
for readiness, watches it, and restarts it when it dies or hangs. :mod:`.supervisor` runs an engine as a process of its
own; tests run one inside theirs (:mod:`.testing`).
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace

import psutil

from clinical_orchestration.stack import jars, paths
from clinical_orchestration.stack.model import Event, ServiceStatus, StackError, State
from clinical_orchestration.stack.ports import LINGER_SECONDS, free_before
from clinical_orchestration.stack.process import (
    TOKEN_VARIABLE,
    Identity,
    disk_cure,
    end_group,
    kill_all,
    log_tail,
    marked,
    port_holder,
    rotate,
    signal_group,
    spawn,
    tree_rss_mb,
)
from clinical_orchestration.stack.services import Context, ServiceSpec, base_environment, spark_connectors_missing
from clinical_orchestration.stack.settings import (
    INTERNAL_PORTS,
    StackSettings,
    port_variable,
    write_private,
)

BACK_OFF = (0.2, 0.5, 1.0, 2.0, 4.0, 8.0)
"""Seconds before the first, second ... restart; the last holds for all further ones."""

JAR_VARIABLES = ("CLINICAL_KAFKA_ENABLED", "CLINICAL_SPARK_CONNECTORS")

HUNG_FAILURES = 4
"""Questions in a row without an answer before a service is taken for hung, besides its time."""
SILENT_SECONDS = 3.0
"""A service that has not answered for this long is shown as unhealthy."""

STEADY_SECONDS = 60.0
"""A service that ran this long starts its back-off anew."""


class Engine:
    """Runs a set of services of one home.

    ``specs`` must contain what they need. ``on_event`` is called from the engine's threads, one at a time.
    """

    def __init__(
        self,
        settings: StackSettings,
        specs: Sequence[ServiceSpec],
        on_event: Callable[[Event], None] | None = None,
        install_jars: bool = True,
    ) -> None:
        self.settings = settings
        self.token = uuid.uuid4().hex
        self.changed = threading.Event()
        self.jars_ready = threading.Event()
        self.jars_error: StackError | None = None
        self._install_jars = install_jars
        self._on_event = on_event
        self._event_lock = threading.Lock()
        self._process_lock = threading.Lock()
        self._jars_thread: threading.Thread | None = None
        self._identities: dict[str, Identity] = {}
        self.units = {spec.name: Unit(self, spec) for spec in specs}
        unknown = {need for spec in specs for need in spec.needs} - set(self.units)
        if unknown:
            raise ValueError(f"needed services are missing: {sorted(unknown)}")

    # -- start and stop

    def start(self, names: Sequence[str] | None = None) -> None:
        """Start the named services (default all) and what they need; returns at once. Running ones are left alone."""
        wanted = self.closure(self.units if names is None else names)
        if any(self.units[name].spec.needs_jars for name in wanted):
            self._resolve_jars()
        for name in self.units:
            if name in wanted:
                self.units[name].start()

    def stop(self, names: Sequence[str] | None = None) -> list[int]:
        """Stop the named services (default all), what depends on them first; return pids that could not be ended."""
        stopping = set(self.units) if names is None else self.dependents(names)
        for name in stopping:
            self.units[name].request_stop(self._direct_dependents(name, stopping))
        for name in stopping:
            self.units[name].join()
        if all(not unit.running for unit in self.units.values()):
            # what a service left behind outside its own process group, such as runs that Dagster started
            return kill_all(marked(self.token))
        return []

    def wait_ready(self, names: Sequence[str], timeout: float) -> list[ServiceStatus]:
        """Wait until the named services are healthy, or one has failed for good, or the time is over.

        Returns their states; the caller looks for what is not :attr:`ServiceStatus.ok`.
        """
        deadline = time.monotonic() + timeout
        while True:
            self.changed.clear()
            states = [replace(self.units[name].status) for name in names]
            if all(state.ok for state in states) or time.monotonic() > deadline:
                return states
            if any(self.units[name].hopeless for name in names):
                return states
            self.changed.wait(min(0.5, max(0.01, deadline - time.monotonic())))

    def closure(self, names: Sequence[str] | dict[str, Unit]) -> set[str]:
        """Return the names and all that they need."""
        found: set[str] = set()
        waiting = list(names)
        while waiting:
            name = waiting.pop()
            if name not in found:
                found.add(name)
                waiting.extend(self.units[name].spec.needs)
        return found

    def dependents(self, names: Sequence[str]) -> set[str]:
        """Return the names and all that needs them."""
        found = set(names)
        grown = True
        while grown:
            more = {name for name, unit in self.units.items() if set(unit.spec.needs) & found} - found
            found |= more
            grown = bool(more)
        return found

    def _direct_dependents(self, name: str, among: set[str]) -> list[Unit]:
        return [unit for other, unit in self.units.items() if other in among and name in unit.spec.needs]

    # -- reporting

    def emit(self, event: Event) -> None:
        """Pass an event on and wake who waits for a change."""
        with self._event_lock:
            if self._on_event:
                self._on_event(event)
        self.changed.set()

    def statuses(self) -> list[ServiceStatus]:
        """Return the state of every service, and of Spark's connectors where Spark is among them."""
        found = [unit.status for unit in self.units.values()]
        if "spark" in self.units:
            position = [status.name for status in found].index("spark") + 1
            found.insert(position, connectors_status(self.settings, self.units["spark"].status.state))
        return found

    # -- jars

    def _resolve_jars(self) -> None:
        """Download missing jars in the background; services that need to know wait for the outcome."""
        if self._jars_thread and self._jars_thread.is_alive():
            return
        if self.jars_ready.is_set() and self.jars_error is None:
            return
        self.jars_ready.clear()
        self._jars_thread = threading.Thread(target=self._download_jars, name="jars", daemon=True)
        self._jars_thread.start()

    def _download_jars(self) -> None:
        shown = 0.0

        def progress(done: int, total: int) -> None:
            nonlocal shown
            share = done / total if total else 1.0
            if share - shown >= 0.02 or share >= 1.0:
                shown = share
                self.emit(
                    Event(
                        "jars",
                        f"downloading jars of Kafka and Spark's connectors: {done / 1e6:.0f} of {total / 1e6:.0f} MB",
                        time.time(),
                        progress=share,
                    )
                )

        self.jars_error = None
        try:
            if self._install_jars:
                wanted = [jar for group in jars.GROUPS for jar in jars.locked(group)]
                jars.install(self.settings.jars, wanted, self.settings.maven_url, progress)
        except StackError as error:
            self.jars_error = error
            self.emit(Event("error", str(error), time.time()))
        finally:
            self.settings.refresh_installed(run_java=True)
            self.jars_ready.set()
            self._restart_outdated()

    def _restart_outdated(self) -> None:
        """Give running services a new process that were started without jars which are there now."""
        current = self.settings.environment()
        for unit in self.units.values():
            before = unit.spawned_environment
            if not unit.running or before is None or not unit.spec.needs_jars:
                continue
            if any(before.get(name) != current[name] for name in JAR_VARIABLES):
                unit.request_restart()

    # -- started processes, for the clean-up after a crash

    def record(self, name: str, identity: Identity | None) -> None:
        """Remember (or forget) a service's process in the home."""
        with self._process_lock:
            if identity is None:
                self._identities.pop(name, None)
            else:
                self._identities[name] = identity
            data = {
                "token": self.token,
                "processes": {key: [one.pid, one.started] for key, one in self._identities.items()},
            }
            with contextlib.suppress(OSError):  # a full disk must not end the supervision
                write_private(paths.processes_file(self.settings.home), json.dumps(data))


class Unit:
    """One service under supervision."""

    def __init__(self, engine: Engine, spec: ServiceSpec) -> None:
        self.engine = engine
        self.spec = spec
        self.status = blank_status(engine.settings, spec)
        self.hopeless = False
        self.spawned_environment: dict[str, str] | None = None
        self._thread: threading.Thread | None = None
        self._stop = threading.Event()
        self._wake = threading.Event()
        self._restart = threading.Event()
        self._dependents: list[Unit] = []
        self._process: subprocess.Popen[bytes] | None = None
        self._log_start = 0

    # -- called by the engine

    @property
    def running(self) -> bool:
        """Whether the service is under supervision now."""
        return self._thread is not None and self._thread.is_alive()

    def start(self) -> None:
        """Begin to supervise; a running one is left alone, a failed one tries again at once."""
        if self.running and not self._stop.is_set():
            if self.status.state in (State.NOT_INSTALLED, State.OFF):
                self.status.error = self.status.cure = None
                self._show(State.STARTING)
                self._wake.set()
            return
        self.join()
        self._stop.clear()
        self._wake.clear()
        self._restart.clear()
        self.hopeless = False
        self.status.restarts = 0
        self.status.error = self.status.cure = None
        self._show(State.STARTING)
        self._thread = threading.Thread(target=self._run, name=f"stack-{self.spec.name}", daemon=True)
        self._thread.start()

    def request_stop(self, dependents: list[Unit]) -> None:
        """Ask for the end, after that of ``dependents``; returns at once."""
        self._dependents = dependents
        self._stop.set()
        self._wake.set()

    def request_restart(self) -> None:
        """Ask for a new process, for example because its environment changed; returns at once."""
        self._restart.set()
        self._wake.set()

    def join(self) -> None:
        """Wait until the service is stopped."""
        if self._thread is not None:
            self._thread.join()

    # -- the thread

    def _run(self) -> None:
        failures = 0
        try:
            while not self._stop.is_set():
                off = self.spec.off(self.engine.settings) if self.spec.off else None
                if off is not None:
                    self._show(State.OFF, off)
                    self._wake.clear()
                    self._wake.wait()
                    continue
                if not self._wait_for_needs():
                    break
                absent = self.spec.installed(self.engine.settings) if self.spec.installed else None
                if absent is not None:
                    self._show(State.NOT_INSTALLED, StackError(*_error_and_cure(self.engine.jars_error or absent)))
                    self._wake.clear()
                    self._wake.wait()
                    continue
                began = time.monotonic()
                asked = False
                try:
                    self._serve()
                    failures, asked = 0, True
                except Exception as error:  # whatever a probe or a preparation raises is this service's error
                    self._failed(error)
                    if time.monotonic() - began > STEADY_SECONDS and not isinstance(error, _NotReadyError):
                        failures = 0
                    failures += 1
                finally:
                    self._end_process()
                if self._stop.is_set():
                    break
                if failures:
                    if isinstance(self._last_error, StackError) and failures >= 2:
                        self._set_hopeless()
                    self._wake.clear()
                    self._wake.wait(BACK_OFF[min(failures, len(BACK_OFF)) - 1])
                self.status.restarts += 0 if asked else 1
        finally:
            self._end_process()
            self._show(State.STOPPED)

    _last_error: Exception | None = None

    def _set_hopeless(self) -> None:
        self.hopeless = True
        self.engine.changed.set()

    def _wait_for_needs(self) -> bool:
        """Wait for the needs and, where it matters, for the jars; return whether to go on."""
        while not self._stop.is_set():
            waiting = [name for name in self.spec.needs if not self.engine.units[name].status.ok]
            if self.spec.needs_jars and not self.engine.jars_ready.is_set():
                waiting.append("the jars")
            if not waiting:
                self.status.note = None
                return True
            note = f"waiting for {', '.join(waiting)}"
            if self.status.note != note:
                self.status.note = note
                self.engine.changed.set()
            self._stop.wait(0.05)
        return False

    def _serve(self) -> None:
        """Start, wait for readiness, and watch until the service ends, hangs, or is asked to end."""
        spec, context = self.spec, self._context()
        self._show(State.STARTING)
        if spec.command is not None:
            if self._process is None:
                self._check_ports()
            if spec.prepare:
                spec.prepare(context)
            if self._stop.is_set():
                return
            self._spawn(context)
        self._wait_ready()
        if self._stop.is_set():
            return
        if spec.after_ready:
            spec.after_ready(self._context())
        self.hopeless = False
        self.status.note = None
        self._show(State.HEALTHY)
        self._watch()

    def _check_ports(self) -> None:
        settings = self.engine.settings
        for name in (self.spec.port, *self.spec.other_ports):
            if name is None or free_before(settings.ports[name], time.monotonic() + LINGER_SECONDS):
                continue
            if name in INTERNAL_PORTS and not os.environ.get(port_variable(name)):
                settings.pick_port(name)
                with contextlib.suppress(OSError):
                    settings.save()
                continue
            raise taken_port(name, settings.ports[name])

    def _spawn(self, context: Context) -> None:
        spec, settings = self.spec, self.engine.settings
        if spec.command is None:
            return
        environment = base_environment(settings)
        for name, value in (spec.environment(context) if spec.environment else {}).items():
            if value:
                environment[name] = value
            else:
                environment.pop(name, None)
        self.spawned_environment = dict(environment)
        environment[TOKEN_VARIABLE] = self.engine.token
        context.temporary()
        log = paths.log_file(settings.home, spec.name)
        rotate(log)
        with contextlib.suppress(OSError):
            self._log_start = log.stat().st_size
        if log.exists() is False:
            self._log_start = 0
        run_as = spec.run_as(context) if spec.run_as else None
        process = spawn(
            spec.command(context),
            log=log,
            environment=environment,
            folder=paths.data_folder(settings.home, spec.name) if spec.run_as else settings.home,
            run_as=run_as,
        )
        self._process = process
        self.status.pid = process.pid
        self.status.started_at = time.time()
        self.engine.record(spec.name, Identity.of(process.pid))
        self.engine.changed.set()

    def _wait_ready(self) -> None:
        spec = self.spec
        deadline = time.monotonic() + spec.ready_timeout
        reason = ""
        pause = 0.05
        while not self._stop.is_set():
            self._raise_if_ended()
            try:
                self._probe()
                return
            except Exception as error:
                reason = short(error)
            if time.monotonic() > deadline:
                self.hopeless = True
                raise _NotReadyError(
                    f"{spec.title} was not ready after {spec.ready_timeout:.0f} s: {reason}", self._log_cure()
                )
            self._stop.wait(pause)
            pause = min(0.4, pause * 1.3)

    def _watch(self) -> None:
        spec = self.spec
        answered, failures = time.monotonic(), 0
        while not self._stop.is_set() and not self._restart.is_set():
            ended = self._wait(spec.probe_every if self.status.state is State.HEALTHY else 0.5)
            if ended:
                self._raise_if_ended()
            if self._stop.is_set() or self._restart.is_set():
                break
            try:
                self._probe()
            except Exception as error:
                self._raise_if_ended()
                silent = time.monotonic() - answered
                failures += 1
                # one slow answer on a busy machine is no failure
                if silent > SILENT_SECONDS:
                    self._show(State.UNHEALTHY, StackError(f"does not answer: {short(error)}", self._log_cure()))
                # where this process itself was held up for long, its first questions after that prove nothing
                if spec.command is not None and silent > spec.hung_after and failures >= HUNG_FAILURES:
                    raise StackError(
                        f"{spec.title} did not answer for {silent:.0f} s: {short(error)}", self._log_cure()
                    ) from error
            else:
                answered, failures = time.monotonic(), 0
                if self.status.state is not State.HEALTHY:
                    self._show(State.HEALTHY)
        self._restart.clear()

    def _wait(self, seconds: float) -> bool:
        """Wait for the end of the process, a request or the time; return whether the process has ended."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if self._process is not None and self._process.poll() is not None:
                return True
            if self._wake.wait(0.2):
                self._wake.clear()
                return False
        return False

    def _probe(self) -> None:
        began = time.monotonic()
        self.spec.probe(self._context(), self.spec.probe_timeout)
        self.status.latency_ms = round((time.monotonic() - began) * 1000, 1)

    def _raise_if_ended(self) -> None:
        if self._process is None or self._process.poll() is None:
            return
        code = self._process.returncode
        how = f"was ended by {_signal_name(-code)}" if code < 0 else f"ended with status {code}"
        tail = log_tail(paths.log_file(self.engine.settings.home, self.spec.name), since=self._log_start)
        raise StackError(f"{self.spec.title} {how}{': ' + tail if tail and code >= 0 else ''}", self._log_cure())

    def _end_process(self) -> None:
        process = self._process
        if process is None:
            return
        if self._stop.is_set():
            for unit in self._dependents:
                unit.join()
        if process.poll() is None:
            self.status.note = "stopping"
            self.engine.changed.set()
            hung = self.status.state is State.UNHEALTHY and not self._stop.is_set()
            end_group(process, 2.0 if hung else self.spec.stop_timeout, self.spec.stop_signal)
        else:
            signal_group(process.pid, signal.SIGKILL)
        self._process = None
        self.status.note = None
        self.status.pid = None
        self.status.latency_ms = self.status.rss_mb = self.status.started_at = None
        self.engine.record(self.spec.name, None)

    def _failed(self, error: Exception) -> None:
        self._last_error = error
        wrapped = error if isinstance(error, StackError) else StackError(short(error), self._log_cure())
        if isinstance(error, OSError):
            wrapped = StackError(short(error), disk_cure(error, self.engine.settings.home))
        self._show(State.UNHEALTHY, wrapped)

    def _show(self, state: State, error: StackError | None = None) -> None:
        status = self.status
        if error is not None:
            message, cure = _error_and_cure(error)
            changed = (status.error, status.state) != (message, state)
            status.error, status.cure = message, cure or None
        else:
            changed = status.state is not state
        status.state = state
        if changed:
            message = f"{self.spec.title}: {state.value.replace('_', ' ')}"
            if error is not None:
                message += f": {status.error}"
            self.engine.emit(Event("service", message, time.time(), self.spec.name, state))

    def _context(self) -> Context:
        return Context(self.engine.settings, self._process.pid if self._process else None, self._report)

    def _report(self, note: str) -> None:
        self.status.note = note
        self.engine.emit(Event("service", f"{self.spec.title}: {note}", time.time(), self.spec.name, self.status.state))

    def _log_cure(self) -> str:
        if self.spec.command is None:
            return ""
        return f"Its log: {paths.log_file(self.engine.settings.home, self.spec.name)}"

    def measure(self) -> None:
        """Take the memory of the process tree and rotate the log."""
        if self._process is not None:
            rss = tree_rss_mb(self._process.pid)
            self.status.rss_mb = round(rss, 1) if rss is not None else None
            rotate(paths.log_file(self.engine.settings.home, self.spec.name))


class _NotReadyError(StackError):
    """The service runs but did not get ready in time."""


def blank_status(settings: StackSettings, spec: ServiceSpec) -> ServiceStatus:
    """Return the state of a stopped service."""
    return ServiceStatus(
        name=spec.name,
        level=spec.level,
        port=settings.ports[spec.port] if spec.port else None,
        url=spec.url(settings),
        title=spec.title,
        log=str(paths.log_file(settings.home, spec.name)) if spec.command else None,
    )


def connectors_status(settings: StackSettings, spark: State) -> ServiceStatus:
    """Return the state of Spark's connectors, which are files and no process: that of Spark, or not installed."""
    status = ServiceStatus("spark_connectors", 2, spark, title="Spark connectors (Delta, S3, Kafka)")
    absent = spark_connectors_missing(settings)
    if spark is State.NOT_INSTALLED:
        status.error, status.cure = "Spark is not installed", "See spark."
    elif absent is not None:
        status.state = State.NOT_INSTALLED
        status.error, status.cure = _error_and_cure(absent)
    return status


def taken_port(name: str, port: int) -> StackError:
    """Return the error for a port that another program listens on."""
    return StackError(
        f"port {port} ({name.replace('_', ' ')}) is taken by {port_holder(port)}",
        f"End that program, or set {port_variable(name)} to another port (0 picks a free one).",
    )


def short(error: BaseException) -> str:
    """Return an error as one line."""
    text = " ".join(str(error).split())
    name = type(error).__name__
    return text[:400] if text and isinstance(error, StackError) else f"{name}: {text[:400]}" if text else name


def _error_and_cure(error: StackError) -> tuple[str, str]:
    return str(error.args[0]) if error.args else "", error.cure


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


class EventLog:
    """The last events with a running number, for readers that poll."""

    def __init__(self, size: int = 400) -> None:
        self._events: deque[tuple[int, Event]] = deque(maxlen=size)
        self._next = 1

    def add(self, event: Event) -> None:
        """Append one event; a download's progress replaces the one before."""
        if event.kind == "jars" and self._events and self._events[-1][1].kind == "jars":
            self._events.pop()
        self._events.append((self._next, event))
        self._next += 1

    def items(self) -> list[tuple[int, Event]]:
        """Return number and event, oldest first."""
        return list(self._events)


def end_leftovers(settings: StackSettings) -> int:
    """End what a crashed supervisor left, as recorded in the home; return how many processes.

    Only call this while holding the home's lock.
    """
    path = paths.processes_file(settings.home)
    try:
        data = json.loads(path.read_text())
        recorded = [Identity(int(pid), float(started)) for pid, started in data["processes"].values()]
        token = str(data["token"])
    except FileNotFoundError:
        return 0
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        recorded, token = [], ""
    victims = {process.pid: process for process in (marked(token) if token else [])}
    for identity in recorded:
        if identity.alive():
            with contextlib.suppress(psutil.Error):
                process = psutil.Process(identity.pid)
                victims.update({one.pid: one for one in [process, *process.children(recursive=True)]})
    alive = kill_all(list(victims.values()))
    if alive:
        raise StackError(
            f"processes of an earlier start cannot be ended: {', '.join(map(str, alive))}",
            "End them (kill -9), as the user who started them.",
        )
    path.unlink(missing_ok=True)
    return len(victims)
