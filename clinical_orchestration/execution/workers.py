"""Processes that execute runs: how they are known again, and the files that say which of them live.

A process is known by pid, start time and boot, so that a later one with the same pid is not taken for it. Each run that
has a process has a file, made before the process begins and removed once the run's final state is stored. Making it
fails when it exists: no run gets two processes, whoever asks for them.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path


@dataclass(frozen=True)
class Process:
    """One process. `started` is its start in clock ticks since the boot named by `boot`."""

    pid: int
    started: int
    boot: str

    @classmethod
    def of(cls, pid: int) -> Process | None:
        """Return the process that has a pid now, None when there is none or it has ended."""
        try:
            stat = Path(f"/proc/{pid}/stat").read_bytes()
        except OSError:
            return None
        fields = stat[stat.rindex(b")") + 2 :].split()
        if fields[0] in (b"Z", b"X"):  # ended; somebody has yet to take note
            return None
        return cls(pid, int(fields[19]), _boot())

    @classmethod
    def own(cls) -> Process:
        """Return the calling process."""
        found = cls.of(os.getpid())
        if found is None:
            raise RuntimeError("/proc does not know this process: warm launching needs Linux with /proc mounted")
        return found

    @property
    def alive(self) -> bool:
        """Whether this very process still runs."""
        return Process.of(self.pid) == self

    def signal(self, number: signal.Signals, *, group: bool = False) -> bool:
        """Send a signal to it, or to its whole process group; return whether it was there."""
        if not self.alive:
            return False
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if group:
                os.killpg(self.pid, number)
            else:
                os.kill(self.pid, number)
            return True
        return False


@cache
def _boot() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


@dataclass(frozen=True)
class Worker:
    """The process of a run, and the process that started it and will say how it ended."""

    run_id: str
    process: Process
    owner: Process


class WorkerFiles:
    """The files of the runs that have a process, in a folder of mode 700."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __len__(self) -> int:
        try:
            return sum(not name.startswith(".") for name in os.listdir(self._folder))
        except FileNotFoundError:
            return 0

    def add(self, worker: Worker) -> bool:
        """Note a run's process; return False when the run has one noted already."""
        draft = self._draft(worker.run_id)
        draft.write_text(json.dumps(asdict(worker)))
        try:
            os.link(draft, self._path(worker.run_id))  # whole or not at all, and never over another
        except FileExistsError:
            return False
        finally:
            draft.unlink()
        return True

    def give(self, worker: Worker, owner: Process) -> None:
        """Note that another process will say how a run's process ended."""
        draft = self._draft(worker.run_id)
        draft.write_text(json.dumps(asdict(replace(worker, owner=owner))))
        draft.replace(self._path(worker.run_id))

    def remove(self, run_id: str) -> None:
        """Forget a run's process."""
        self._path(run_id).unlink(missing_ok=True)

    def remove_drafts(self) -> None:
        """Remove what processes that were killed had begun to write."""
        for name in os.listdir(self._folder):
            if name.startswith(".") and Process.of(int(name.rpartition(".")[2])) is None:
                (self._folder / name).unlink(missing_ok=True)

    def of(self, run_id: str) -> Worker | None:
        """Return what is noted of a run."""
        try:
            data = json.loads(self._path(run_id).read_text())
        except FileNotFoundError:
            return None
        return Worker(data["run_id"], Process(**data["process"]), Process(**data["owner"]))

    def __iter__(self) -> Iterator[Worker]:
        try:
            names = sorted(os.listdir(self._folder))
        except FileNotFoundError:
            return
        for name in names:
            worker = None if name.startswith(".") else self.of(name)
            if worker is not None:
                yield worker

    def _draft(self, run_id: str) -> Path:
        return self._folder / f".{run_id}.{os.getpid()}"

    def _path(self, run_id: str) -> Path:
        if not run_id or "/" in run_id or run_id.startswith("."):
            raise ValueError(f"not the id of a run: {run_id!r}")
        return self._folder / run_id
