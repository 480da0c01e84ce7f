"""Processes of the stack: start with a log file, know them again by pid and start time, end them as a group."""

from __future__ import annotations

import contextlib
import os
import pwd
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil

from clinical_orchestration.stack.model import StackError

TOKEN_VARIABLE = "CLINICAL_STACK_TOKEN"  # noqa: S105 - a mark on our processes, no secret
"""Set in the environment of everything a supervisor starts, so that strays are found whatever session they are in."""

LOG_BYTES = 8 * 1024 * 1024
LOG_BACKUPS = 3


@dataclass(frozen=True)
class RunAs:
    """Another user to run a program as; only root can. The modes are explained in ``_launch.py``."""

    uid: int
    gid: int
    mode: Literal["plain", "capability", "namespace"] = "plain"

    @property
    def owner(self) -> tuple[int, int]:
        """User and group that the program's files must belong to, seen from outside."""
        return (os.geteuid(), os.getegid()) if self.mode == "namespace" else (self.uid, self.gid)


@dataclass(frozen=True)
class Identity:
    """A process, safe against a later process with the same pid. ``started`` is seconds since the epoch."""

    pid: int
    started: float

    @classmethod
    def of(cls, pid: int) -> Identity | None:
        """Return the identity of a live process, else ``None``."""
        try:
            return cls(pid, psutil.Process(pid).create_time())
        except psutil.Error:
            return None

    def alive(self) -> bool:
        """Whether this very process still runs; a zombie does not."""
        try:
            process = psutil.Process(self.pid)
            return abs(process.create_time() - self.started) < 0.5 and process.status() != psutil.STATUS_ZOMBIE
        except psutil.Error:
            return False


def launch_command(command: Sequence[str], run_as: RunAs | None = None, die_with_parent: bool = True) -> list[str]:
    """Return the command line that starts ``command`` by ``_launch.py``."""
    user = run_as or RunAs(-1, -1)
    shim = str(Path(__file__).with_name("_launch.py"))
    parent = str(os.getpid() if die_with_parent else 0)
    return [
        sys.executable,
        "-I",
        "-S",
        shim,
        parent,
        str(user.uid),
        str(user.gid),
        user.mode,
        *command,
    ]


def spawn(
    command: Sequence[str],
    *,
    log: Path,
    environment: Mapping[str, str],
    folder: Path | None = None,
    run_as: RunAs | None = None,
) -> subprocess.Popen[bytes]:
    """Start a program in a session of its own; its output is appended to ``log``.

    It is killed when the calling *thread* ends: call from a thread that outlives it. Raises :class:`StackError`.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    try:
        # append mode, so that truncating the file while the program writes (rotation) leaves no hole
        with open(log, "ab", buffering=0) as stream:
            stream.write(f"--- {time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime())} start\n".encode())
            return subprocess.Popen(
                launch_command(command, run_as),
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
                env=dict(environment),
                cwd=folder,
                start_new_session=True,
            )
    except OSError as error:
        raise StackError(f"{command[0]} cannot be started: {error}", disk_cure(error, log.parent)) from error


def spawn_detached(command: Sequence[str], *, log: Path, environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
    """Start a program that outlives the caller, in a session of its own; its output is appended to ``log``."""
    try:
        log.parent.mkdir(parents=True, exist_ok=True)
        with open(log, "ab", buffering=0) as stream:
            return subprocess.Popen(
                list(command),
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
                env=dict(environment),
                cwd="/",
                start_new_session=True,
            )
    except OSError as error:
        raise StackError(f"{command[0]} cannot be started: {error}", disk_cure(error, log.parent)) from error


def end_group(process: subprocess.Popen[bytes], timeout: float, first: signal.Signals = signal.SIGTERM) -> bool:
    """End a spawned program and its process group: ``first``, and SIGKILL after ``timeout`` seconds.

    Returns whether the polite signal was enough.
    """
    polite = True
    signal_group(process.pid, first, only_leader=True)
    try:
        process.wait(timeout)
    except subprocess.TimeoutExpired:
        polite = False
    signal_group(process.pid, signal.SIGKILL)  # what the program left in its group
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(10)
    return polite


def signal_group(pid: int, number: signal.Signals, only_leader: bool = False) -> None:
    """Send a signal to a process group, or its leader alone; a group that is gone is fine."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        if only_leader:
            os.kill(pid, number)
        else:
            os.killpg(pid, number)


def marked(token: str) -> list[psutil.Process]:
    """Return the live processes that carry this mark in their environment, other than the caller's own process."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.pid != os.getpid() and process.environ().get(TOKEN_VARIABLE) == token:
                found.append(process)
        except (psutil.Error, OSError):  # of another user, or just gone
            continue
    return found


def kill_all(processes: Sequence[psutil.Process], timeout: float = 10.0) -> list[int]:
    """Kill processes and wait; return the pids that are still there."""
    for process in processes:
        with contextlib.suppress(psutil.Error):
            process.kill()
    _, alive = psutil.wait_procs(list(processes), timeout=timeout)
    return [process.pid for process in alive]


def tree_rss_mb(pid: int) -> float | None:
    """Return the resident memory of a process and all below it, in MB; ``None`` when it is gone."""
    try:
        root = psutil.Process(pid)
        total = root.memory_info().rss
        for child in root.children(recursive=True):
            with contextlib.suppress(psutil.Error):
                total += child.memory_info().rss
    except psutil.Error:
        return None
    return total / 1e6


def port_holder(port: int) -> str:
    """Say who listens on a port: pid and program where this user may see them."""
    try:
        for connection in psutil.net_connections(kind="tcp"):
            if connection.status == psutil.CONN_LISTEN and connection.laddr and connection.laddr.port == port:
                return describe(connection.pid) if connection.pid else "a process of another user"
    except (psutil.Error, OSError):
        pass
    # without the right to see all connections, the own processes still can be seen
    for process in psutil.process_iter():
        try:
            if any(
                own.status == psutil.CONN_LISTEN and own.laddr and own.laddr.port == port
                for own in process.net_connections(kind="tcp")
            ):
                return describe(process.pid)
        except (psutil.Error, OSError):
            continue
    return "a process that this user cannot see"


def describe(pid: int) -> str:
    """Return pid and program of a process, without its arguments: they may hold secrets."""
    try:
        process = psutil.Process(pid)
        command = process.cmdline()
        name = Path(command[0]).name if command else process.name()
        if name.startswith("python") and len(command) > 1:
            shown = command[1:3] if command[1] == "-m" else command[1:2]
            name = " ".join([name, *(Path(part).name for part in shown)])
        return f"pid {pid} ({name}, user {process.username()})"
    except psutil.Error:
        return f"pid {pid}"


def rotate(log: Path, limit: int = LOG_BYTES, backups: int = LOG_BACKUPS) -> bool:
    """Move a log aside when it is larger than ``limit`` bytes: copied to ``.1``, then emptied in place.

    The writer keeps its open file. Lines written between copy and truncation can be lost. Returns whether it rotated.
    """
    import shutil

    try:
        if log.stat().st_size <= limit:
            return False
        for number in range(backups, 1, -1):
            older = log.with_name(f"{log.name}.{number - 1}")
            if older.exists():
                older.replace(log.with_name(f"{log.name}.{number}"))
        shutil.copyfile(log, log.with_name(f"{log.name}.1"))
        os.truncate(log, 0)
    except OSError:
        return False
    return True


def log_tail(log: Path, lines: int = 5, since: int = 0) -> str:
    """Return the last non-empty lines of a log from byte ``since`` on, joined by `` | ``; empty when there is none."""
    try:
        with open(log, "rb") as stream:
            size = stream.seek(0, os.SEEK_END)
            stream.seek(max(size - 8192, since if since <= size else 0))
            text = stream.read().decode(errors="replace")
    except OSError:
        return ""
    kept = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("--- ")]
    return " | ".join(line[:300] for line in kept[-lines:])


def unprivileged_user(names: Sequence[str] = ("nobody", "postgres")) -> pwd.struct_passwd:
    """Return the user that programs run as which refuse root: the first of ``names`` that exists, else any other."""
    for name in names:
        with contextlib.suppress(KeyError):
            return pwd.getpwnam(name)
    others = [user for user in pwd.getpwall() if user.pw_uid != 0]
    if not others:
        raise StackError(
            "PostgreSQL refuses to run as root, and this system has no other user",
            "Add one (for example: useradd --system postgres), or start the stack as an ordinary user.",
        )
    return others[0]


def disk_cure(error: OSError, folder: Path) -> str:
    """Return what to do about an error of a file operation below ``folder``."""
    import errno

    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"Free space on the disk of {folder}, or set CLINICAL_HOME to a folder on another one."
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"Make {folder} writable for this user, or set CLINICAL_HOME to another folder."
    return f"See the cause above; the folder is {folder}."
