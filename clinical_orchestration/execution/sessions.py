"""The end of everything that a process left behind.

A run's process leads a session. Its steps, and what they start, are process groups of their own in it, so that a signal
to the run's own group does not reach them; those that open a session of their own wish to live on, and do.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

_PR_SET_PDEATHSIG = 1
_TRIES = 20
_PAUSE_SECONDS = 0.005


def end_with_parent() -> None:
    """Have the kernel kill this process, though not those that it forks, when the one that started it ends."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def kill_session(leader: int) -> int:
    """Kill all processes of a session, but its leader and the caller; return how many there were.

    Args:
        leader: pid of the process that opened the session. Call it before that process is reaped: afterwards the number
            may belong to somebody else.
    """
    killed = set()
    for _ in range(_TRIES):  # one that forks meanwhile is found the next time
        found = [pid for pid in _members(leader) if pid not in (leader, os.getpid())]
        if not found:
            break
        for pid in found:
            killed.add(pid)
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(_PAUSE_SECONDS)
    return len(killed)


def _members(session: int) -> Iterator[int]:
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        try:
            fields = (folder / "stat").read_bytes().rpartition(b")")[2].split()
        except OSError:  # it ended meanwhile
            continue
        if int(fields[3]) == session and fields[0] not in (b"Z", b"X"):
            yield int(folder.name)
