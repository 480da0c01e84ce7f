"""The one process a home that runs its services: ``python -m clinical_orchestration.stack.supervisor --home FOLDER``.

It is started detached by :mod:`.control`, which leaves requests in a file and reads the state from another (both in
``run/``, mode 700). Files rather than a socket: they have no limit on the length of a path, and the last state can be
read when the supervisor is gone. A guardian process waits for the supervisor and ends what it leaves, should it be
killed; should both be killed, the services die with the supervisor (parent-death signal) and the next start ends what
is left by the processes' marks.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import os
import queue
import shutil
import signal
import sys
import threading
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from clinical_orchestration.stack import paths
from clinical_orchestration.stack.engine import Engine, EventLog, end_leftovers
from clinical_orchestration.stack.model import MAX_LEVEL, Event, StackError, StackStatus
from clinical_orchestration.stack.process import rotate
from clinical_orchestration.stack.services import specs
from clinical_orchestration.stack.settings import StackSettings, write_private

TICK_SECONDS = 0.1
WRITE_SECONDS = 1.0
MEASURE_SECONDS = 5.0

ALREADY_RUNS = 3
"""Exit status when another supervisor has the home."""


class Supervisor:
    """Carries out requests one after the other and keeps the status file up to date."""

    def __init__(self, settings: StackSettings) -> None:
        self.settings = settings
        self.events = EventLog()
        self.engine = Engine(settings, specs(), self.events.add)
        self.level = -1
        self.handled = 0
        self.started_at = time.time()
        self.error: StackError | None = None
        self.ending = threading.Event()
        self._wanted_end = False
        self._requests: queue.Queue[dict[str, Any] | None] = queue.Queue()
        self._seen = 0
        self._began: float | None = None
        self._start_seconds: float | None = None

    def run(self) -> None:
        """Work until a request or a signal asks for the end; all services are stopped then."""
        worker = threading.Thread(target=self._work, name="requests", daemon=True)
        worker.start()
        written = measured = 0.0
        while not self.ending.is_set():
            self._read_request()
            now = time.monotonic()
            if now - measured >= MEASURE_SECONDS:
                for unit in self.engine.units.values():
                    unit.measure()
                rotate(paths.log_file(self.settings.home, "supervisor"))
                measured = now
            self._note_start_time()
            if self.engine.changed.is_set() or now - written >= WRITE_SECONDS:
                self.engine.changed.clear()
                self.write_status()
                written = now
            # sleeping in one place: a signal or a change wakes the loop, an idle one costs ten looks a second
            self.engine.changed.wait(TICK_SECONDS)
        self.write_status()

    def end(self) -> None:
        """Ask for the end; safe to call from a signal handler."""
        if not self._wanted_end:
            self._wanted_end = True
            self._requests.put({"action": "shutdown", "id": self._seen})

    def write_status(self) -> None:
        """Write the status file; a full disk is no reason to end."""
        status = StackStatus(
            home=str(self.settings.home),
            level=self.level,
            services=self.engine.statuses(),
            supervisor_pid=os.getpid(),
            started_at=self.started_at,
            start_seconds=self._start_seconds,
            error=str(self.error.args[0]) if self.error else None,
            cure=self.error.cure if self.error else None,
        )
        data = status.as_dict()
        data["handled"] = self.handled
        data["written_at"] = time.time()
        data["events"] = [[number, asdict(event)] for number, event in self.events.items()]
        with contextlib.suppress(OSError):
            write_private(paths.status_file(self.settings.home), json.dumps(data))

    def _read_request(self) -> None:
        try:
            request = json.loads(paths.request_file(self.settings.home).read_text())
            number = int(request["id"])
        except (OSError, ValueError, KeyError, TypeError):
            return
        if number > self._seen:
            self._seen = number
            self._requests.put(request)

    def _work(self) -> None:
        while True:
            request = self._requests.get()
            if request is None:
                return
            try:
                self.error = None
                self._handle(request)
            except Exception as error:  # the answer to this request; the next one is carried out all the same
                self.error = error if isinstance(error, StackError) else StackError(f"{type(error).__name__}: {error}")
                self.engine.emit(Event("error", str(self.error), time.time()))
            self.handled = max(self.handled, int(request.get("id", 0)))
            self.engine.changed.set()
            if request["action"] == "shutdown":
                self.ending.set()
                return

    def _handle(self, request: dict[str, Any]) -> None:
        action, level = request["action"], int(request.get("level", MAX_LEVEL))
        if action == "start":
            self.settings.jars = Path(request.get("jars") or self.settings.jars)
            self.settings.maven_url = str(request.get("maven_url") or self.settings.maven_url)
            if any(unit.spec.level <= level and not unit.status.ok for unit in self.engine.units.values()):
                self._began, self._start_seconds = time.monotonic(), None
            self.level = max(self.level, level)
            self.engine.start([unit.spec.name for unit in self.engine.units.values() if unit.spec.level <= level])
        elif action == "stop":
            self.level = min(self.level, level - 1)
            self._stop([unit.spec.name for unit in self.engine.units.values() if unit.spec.level >= level])
        elif action == "shutdown":
            self.level = -1
            self._stop(None)
        else:
            raise StackError(f"unknown request {action!r}")

    def _stop(self, names: list[str] | None) -> None:
        left = self.engine.stop(names)
        if left:
            raise StackError(f"processes could not be ended: {left}", "End them (kill -9), as the user who owns them.")

    def _note_start_time(self) -> None:
        if self._began is None or self._start_seconds is not None:
            return
        wanted = [unit for unit in self.engine.units.values() if unit.spec.level <= self.level]
        if wanted and all(unit.status.ok for unit in wanted):
            self._start_seconds = round(time.monotonic() - self._began, 1)


def _empty(folder: Path) -> None:
    """Remove what killed services left in the folder of temporary files."""
    for path in folder.iterdir() if folder.exists() else ():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def take_lock(home: Path) -> int | None:
    """Take the home's lock for this process; return its descriptor, or ``None`` when another process has it."""
    handle = os.open(paths.lock_file(home), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    # a command that only looks whether the lock is taken holds it for microseconds
    for _ in range(20):
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(0.02)
            continue
        os.ftruncate(handle, 0)
        os.pwrite(handle, str(os.getpid()).encode(), 0)
        return handle
    os.close(handle)
    return None


def supervise(home: Path) -> int:
    """Run the home's supervisor in this process; return the exit status."""
    lock = take_lock(home)
    if lock is None:
        return ALREADY_RUNS
    settings = StackSettings.load(home)
    settings.hold_ports()
    supervisor = Supervisor(settings)
    signal.signal(signal.SIGTERM, lambda *_: supervisor.end())
    signal.signal(signal.SIGINT, lambda *_: supervisor.end())
    try:
        ended = end_leftovers(settings)
        if ended:
            message = f"{ended} processes of an earlier start were ended"
            supervisor.events.add(Event("info", message, time.time()))
        _empty(home / "tmp")
        supervisor.run()
    except StackError as error:
        supervisor.error = error
        supervisor.write_status()
        sys.stderr.write(f"{error}\n")
        return 1
    paths.processes_file(home).unlink(missing_ok=True)
    return 0


def guard(home: Path) -> int:
    """Run the supervisor in a child process and end what it leaves, should it not end by itself."""
    child = os.fork()
    if child == 0:
        os._exit(_in_child(home))
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda received, _: os.kill(child, received))
    while True:
        try:
            _, raw = os.waitpid(child, 0)
            break
        except InterruptedError:
            continue
    code = os.waitstatus_to_exitcode(raw)
    if code in (0, 1, ALREADY_RUNS):
        return code
    lock = take_lock(home)
    if lock is None:  # a new supervisor already runs and has cleaned up
        return 1
    ended = end_leftovers(StackSettings.load(home))
    sys.stderr.write(f"the supervisor was ended ({code}); {ended} processes of it were ended\n")
    paths.status_file(home).unlink(missing_ok=True)
    return 1


def _in_child(home: Path) -> int:
    try:
        return supervise(home)
    except BaseException:
        import traceback

        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--home", type=Path, required=True, help="folder of the stack (CLINICAL_HOME)")
    code = guard(parser.parse_args().home)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # nothing is left to do, and who stops the stack waits for this process


if __name__ == "__main__":
    main()
