"""The warm parent: ``python -m clinical_orchestration.execution.parent --folder F --module-name M``.

It starts a :mod:`.version` of the code and lets launchers ask it once it is ready. When a file of the code changes, it
starts another; the one before serves until then, and lives on until the last run that it started has ended. One that
does not load changes nothing but the log and the answers, which say so.

SIGTERM ends all runs, as they are cancelled, and then the parent. SIGHUP loads the code again. When the parent is
killed, runs go on, and its successor adopts them.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import logging
import os
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from clinical_orchestration.execution.protocol import SOCKET, Meeting, receive, send
from clinical_orchestration.execution.version import add_code_options, add_limit_options, log_to_stderr
from clinical_orchestration.execution.workers import Process

logger = logging.getLogger("clinical_orchestration.execution")

WATCH_SECONDS = 2.0
"""How often the files of the code are looked at. A change is taken when it is that old, so that all of it is there."""

WATCHED = (".py", ".yaml", ".yml", ".json", ".toml")

LEAVE_SECONDS = 5.0
"""Beyond the time that runs have to end, before a version that does not end is killed."""

_PR_SET_CHILD_SUBREAPER = 36


@dataclass
class _Loaded:
    """A version: its process, the line to it, and the state of the files that it was loaded from."""

    process: subprocess.Popen[bytes]
    line: socket.socket
    files: int
    ready: bool = False


def available() -> str:
    """Return why runs cannot be started warm on this system, empty when they can."""
    if sys.platform != "linux" or not hasattr(os, "pidfd_open"):
        return f"it needs Linux (this is {sys.platform})"
    try:
        os.close(os.pidfd_open(os.getpid()))
    except OSError as error:
        return f"the kernel has no pidfd_open ({error.strerror}); Linux 5.3 and later have"
    if Process.of(os.getpid()) is None:
        return "/proc is not mounted"
    return ""


class Parent:
    """Starts, replaces and ends versions."""

    def __init__(self, folder: Path, options: Sequence[str], watched: Sequence[Path], stop_seconds: float) -> None:
        self._meeting = Meeting(folder)
        self._options = list(options)
        self._watched = watched
        self._stop_seconds = stop_seconds
        self._selector = selectors.DefaultSelector()
        self._current: _Loaded | None = None
        self._loading: _Loaded | None = None
        self._old: list[_Loaded] = []
        self._seen = 0
        self._tried = 0
        self._ended_without_a_version = False
        self._wanted: set[int] = set()

    def run(self) -> int:
        """Serve until a signal says otherwise; return the exit status: 1 when the code does not load."""
        self._meeting.make()
        self._meeting.clear()
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)  # runs of a version that was killed come here
        waker, woken = socket.socketpair()
        for one in (waker, woken):
            one.setblocking(False)
        signal.set_wakeup_fd(waker.fileno())
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD):
            signal.signal(number, lambda *_: None)
        self._selector.register(woken, selectors.EVENT_READ)
        self._seen = self._fingerprint()
        self._load()
        watch_at = time.monotonic() + WATCH_SECONDS
        while not self._ended_without_a_version:
            for key, _ in self._selector.select(max(0.0, watch_at - time.monotonic()) if self._watched else None):
                if key.fileobj is woken:
                    self._wanted.update(woken.recv(4096))
                else:
                    self._heard(key.data)
            if self._wanted & {signal.SIGTERM, signal.SIGINT}:
                self._end()
                return 0
            if signal.SIGHUP in self._wanted:
                self._load()
            if signal.SIGCHLD in self._wanted:
                self._reap()
            self._wanted.clear()
            if self._watched and time.monotonic() >= watch_at:
                self._look_for_changes()
                watch_at = time.monotonic() + WATCH_SECONDS
        return 1

    # -- versions

    def _load(self) -> None:
        if self._loading is not None:  # of files that have changed since
            self._loading.process.kill()
            self._old.append(self._loading)
        ours, theirs = socket.socketpair()
        self._tried = self._seen
        command = [sys.executable, "-m", "clinical_orchestration.execution.version"]
        process = subprocess.Popen(
            [*command, "--folder", str(self._meeting.folder), "--control", str(theirs.fileno()), *self._options],
            pass_fds=[theirs.fileno()],
        )
        theirs.close()
        logger.info("loading the code in process %d", process.pid)
        self._loading = _Loaded(process, ours, self._seen)
        self._selector.register(ours, selectors.EVENT_READ, self._loading)

    def _heard(self, version: _Loaded) -> None:
        try:
            message = receive(version.line)
        except (OSError, ValueError):
            message = None
        if message is None:  # it has ended; SIGCHLD follows
            self._selector.unregister(version.line)
            version.line.close()
        elif "failed" in message:
            self._does_not_load(str(message["failed"]))
        elif "ready" in message and version is self._loading:
            self._meeting.publish(str(message["ready"]))
            _tell(version, {"do": "adopt"})  # runs of a version that ended while this one was being loaded
            before, self._current, self._loading = self._current, version, None
            version.ready = True
            logger.info("ready: process %d starts runs", version.process.pid)
            if before is not None:
                self._old.append(before)
                _tell(before, {"do": "drain"})

    def _does_not_load(self, reason: str) -> None:
        logger.error("the code does not load: %s", reason)
        if self._current is not None:
            logger.error("runs go on with the code as it was before; the next change of a file is tried again")
            _tell(self._current, {"do": "stale", "reason": reason})

    def _reap(self) -> None:
        """Take note of ended versions, and of runs whose version was killed."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            code = os.waitstatus_to_exitcode(status)
            ended = [one for one in (self._current, self._loading, *self._old) if one and one.process.pid == pid]
            for version in ended:
                version.process.returncode = code
                self._gone(version, code)

    def _gone(self, version: _Loaded, code: int) -> None:
        if version in self._old:
            self._old.remove(version)
        elif version is self._loading:
            self._loading = None
            self._ended_without_a_version = self._current is None
        else:
            logger.error(
                "the process that starts runs (%d) ended unexpectedly (%d): another is loaded",
                version.process.pid,
                code,
            )
            self._current = None
            with contextlib.suppress(FileNotFoundError):
                (self._meeting.folder / SOCKET).unlink()
            if self._loading is None:
                self._load()
        with contextlib.suppress(FileNotFoundError):
            (self._meeting.folder / f"{version.process.pid}.sock").unlink()
        if self._current is not None and code != 0:
            _tell(self._current, {"do": "adopt"})

    def _end(self) -> None:
        with contextlib.suppress(FileNotFoundError):
            (self._meeting.folder / SOCKET).unlink()
        versions = [one for one in (self._current, self._loading, *self._old) if one is not None]
        for version in versions:
            if version.ready:
                _tell(version, {"do": "stop"})
            else:
                version.process.kill()
        deadline = time.monotonic() + self._stop_seconds + LEAVE_SECONDS
        for version in versions:
            try:
                version.process.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                logger.error("process %d does not end: killed", version.process.pid)
                version.process.kill()
                version.process.wait()
        logger.info("ended")

    # -- files

    def _look_for_changes(self) -> None:
        found = self._fingerprint()
        settled, self._seen = found == self._seen, found
        if settled and found != self._tried:
            logger.info("the code has changed")
            self._load()

    def _fingerprint(self) -> int:
        return hash(tuple(state for folder in self._watched for state in _files(folder)))


def _files(folder: Path | str) -> list[tuple[str, int, int]]:
    found = []
    try:
        with os.scandir(folder) as entries:
            for entry in sorted(entries, key=lambda one: one.name):
                if entry.name.startswith((".", "__pycache__")):
                    continue
                if entry.is_dir():
                    found.extend(_files(entry.path))
                elif entry.name.endswith(WATCHED):
                    with contextlib.suppress(FileNotFoundError):
                        state = entry.stat()
                        found.append((entry.path, state.st_mtime_ns, state.st_size))
    except FileNotFoundError:
        pass
    return found


def _tell(version: _Loaded, message: dict[str, str]) -> None:
    with contextlib.suppress(OSError):  # it has ended; SIGCHLD says so
        send(version.line, message)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the warm parent; return its exit status."""
    parser = argparse.ArgumentParser(prog="clinical_orchestration.execution.parent", description=__doc__.split("\n")[0])
    parser.add_argument("--folder", type=Path, required=True, help="where launchers meet it; made with mode 700")
    parser.add_argument(
        "--watch",
        type=Path,
        action="append",
        default=[],
        help="folder of the code: a change in it loads the code again",
    )
    add_code_options(parser)
    add_limit_options(parser)
    options = parser.parse_args(arguments)
    reason = available()
    if reason:
        logger.error("runs cannot be started warm: %s. They start by the code server.", reason)
        return 1
    handed_on = [
        part
        for name in (
            *("module_name", "python_file", "attribute", "working_directory", "location_name", "preload"),
            *("runs", "spares", "cancel_seconds", "stop_seconds"),
        )
        if getattr(options, name) is not None
        for part in (f"--{name.replace('_', '-')}", str(getattr(options, name)))
    ]
    return Parent(options.folder, handed_on, options.watch, options.stop_seconds).run()


if __name__ == "__main__":
    log_to_stderr()
    sys.exit(main())
