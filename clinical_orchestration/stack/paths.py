"""Where everything of one stack lies below its home."""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path


def settings_file(home: Path) -> Path:
    """Ports in use."""
    return home / "settings.json"


def secrets_file(home: Path) -> Path:
    """Generated passwords, mode 600."""
    return home / "secrets.json"


def run_folder(home: Path) -> Path:
    """State of the running stack: lock, status, request. Mode 700."""
    return home / "run"


def status_file(home: Path) -> Path:
    """What the supervisor last saw."""
    return run_folder(home) / "status.json"


def request_file(home: Path) -> Path:
    """What the supervisor is asked to do next."""
    return run_folder(home) / "request.json"


def processes_file(home: Path) -> Path:
    """Started processes by pid and start time, for the clean-up after a crash."""
    return run_folder(home) / "processes.json"


def lock_file(home: Path) -> Path:
    """Held by the one supervisor of the home; contains its pid."""
    return run_folder(home) / "supervisor.lock"


def log_folder(home: Path) -> Path:
    """One log file a service."""
    return home / "logs"


def log_file(home: Path, service: str) -> Path:
    """Log of one service; older parts end in ``.1``, ``.2`` ..."""
    return log_folder(home) / f"{service}.log"


def data_folder(home: Path, service: str) -> Path:
    """What a service keeps."""
    return home / "data" / service


def supervisor_pid(home: Path) -> int | None:
    """Return the pid of the supervisor that runs this home, or ``None``. The lock decides, not the pid in the file."""
    path = lock_file(home)
    try:
        handle = os.open(path, os.O_RDWR)
    except OSError:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        try:
            return int(json.loads(os.pread(handle, 4096, 0) or b"0"))
        except ValueError:
            return 0  # it has just taken the lock and not written its pid yet
    finally:
        os.close(handle)
    return None
