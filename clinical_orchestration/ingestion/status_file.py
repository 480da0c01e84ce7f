"""What a worker that runs beside the pipelines says about itself: one small JSON file that is replaced as a whole.

Whoever wants to know (the stack's health check, a command) reads the file; the worker needs no port. The file holds
the worker's pid with its start time, so that a file that a killed worker left is known as such.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

WRITE_SECONDS = 0.5
"""The file is written at most this often, but for what must be seen at once."""


class StatusFile:
    """The status of the calling process, in ``<home>/run/<name>.json``, readable by its owner only."""

    def __init__(self, home: Path, name: str) -> None:
        self.path = status_path(home, name)
        self._identity: dict[str, Any] = {}
        self._written = 0.0

    def write(self, values: Mapping[str, Any], *, now: bool = False) -> None:
        """Replace the file by these values, the process's identity and the time; a full disk is no error here."""
        if not now and time.monotonic() - self._written < WRITE_SECONDS:
            return
        self._written = time.monotonic()
        if not self._identity:
            import psutil

            self._identity = {"pid": os.getpid(), "started": psutil.Process().create_time()}
        text = json.dumps({**values, **self._identity, "written_at": time.time()})
        temporary = ""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            handle, temporary = tempfile.mkstemp(dir=self.path.parent, prefix=f".{self.path.name}.")
            with os.fdopen(handle, "w") as stream:
                stream.write(text)
            os.replace(temporary, self.path)
        except OSError:
            Path(temporary).unlink(missing_ok=True) if temporary else None


def status_path(home: Path, name: str) -> Path:
    """Return where a worker's status is."""
    return home / "run" / f"{name}.json"


def read_status(home: Path, name: str) -> dict[str, Any] | None:
    """Return what a worker wrote last, with ``running`` (whether that process lives) and ``age_seconds``; or None."""
    try:
        values = json.loads(status_path(home, name).read_text())
        pid, started, written = int(values["pid"]), float(values["started"]), float(values["written_at"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return {**values, "running": _lives(pid, started), "age_seconds": round(max(0.0, time.time() - written), 1)}


def _lives(pid: int, started: float) -> bool:
    import psutil

    try:
        process = psutil.Process(pid)
        return abs(process.create_time() - started) < 1 and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False
