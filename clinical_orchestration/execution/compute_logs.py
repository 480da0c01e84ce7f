"""Output of steps, written straight into the files that the Dagster UI reads.

The stock manager starts four processes for each capture, so that the output also reaches the run worker's own. Here
descriptors 1 and 2 are the files while a capture lasts: output of Python, of C libraries and of child processes is
readable at once, costs no process, and does not appear in the log of the service that started the run.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from dagster._core.storage.compute_log_manager import CapturedLogContext, ComputeIOType
from dagster._core.storage.local_compute_log_manager import IO_TYPE_EXTENSION, LocalComputeLogManager
from dagster._serdes import ConfigurableClassData

_DESCRIPTORS = (1, 2)


@dataclass(eq=False)
class _Capture:
    """Where the two descriptors lead while a capture is the innermost one."""

    targets: tuple[int, int]


class _Descriptors:
    """The descriptors 1 and 2 of this process, and the captures that want them: the newest has them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._captures: list[_Capture] = []
        self._own: tuple[int, int] | None = None
        self._buffered = False
        os.register_at_fork(after_in_child=self._after_fork)

    def _after_fork(self) -> None:
        self._lock = threading.Lock()  # a thread of the parent may have held it

    def give(self, capture: _Capture) -> None:
        """Lead the descriptors to a capture."""
        with self._lock:
            _flush()
            if not self._captures:
                self._own = (os.dup(1), os.dup(2))
                self._buffered = _by_line(sys.stdout, True)
            self._captures.append(capture)
            self._lead(capture.targets)

    def take_back(self, capture: _Capture) -> None:
        """Lead the descriptors where they would lead without the capture; captures of threads may overlap."""
        with self._lock:
            _flush()
            self._captures.remove(capture)
            if self._captures:
                self._lead(self._captures[-1].targets)
            elif self._own is not None:
                self._lead(self._own)
                for descriptor in self._own:
                    os.close(descriptor)
                self._own = None
                if self._buffered:
                    _by_line(sys.stdout, False)

    @staticmethod
    def _lead(targets: tuple[int, int]) -> None:
        for descriptor, target in zip(_DESCRIPTORS, targets, strict=True):
            os.dup2(target, descriptor)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, ValueError, OSError):  # a service may have closed or removed it
            stream.flush()


def _by_line(stream: TextIO | Any, wanted: bool) -> bool:
    """Let a stream be written line by line, or in blocks again; return whether that was changed."""
    if stream is None or getattr(stream, "line_buffering", wanted) == wanted or not hasattr(stream, "reconfigure"):
        return False
    with contextlib.suppress(ValueError, OSError):
        stream.reconfigure(line_buffering=wanted)
        return True
    return False


_descriptors = _Descriptors()


class DirectComputeLogManager(LocalComputeLogManager):
    """Dagster's local compute logs without helper processes; takes the options of `LocalComputeLogManager`."""

    @classmethod
    def from_config_value(
        cls, inst_data: ConfigurableClassData | None, config_value: Mapping[str, Any]
    ) -> DirectComputeLogManager:
        """Make it from `dagster.yaml`."""
        return cls(inst_data=inst_data, **config_value)

    @contextmanager
    def capture_logs(self, log_key: Sequence[str]) -> Iterator[CapturedLogContext]:
        """Write what this process and its children say into the files of the key, until the block ends.

        Raises:
            OSError: the files cannot be written.
        """
        with self._file(log_key, ComputeIOType.STDOUT) as out, self._file(log_key, ComputeIOType.STDERR) as err:
            capture = _Capture((out, err))
            _descriptors.give(capture)
            try:
                yield CapturedLogContext(log_key)
            finally:
                _descriptors.take_back(capture)
                self.complete(log_key)

    def complete(self, log_key: Sequence[str]) -> None:
        """Say that no more will be written: readers that wait for more stop."""
        path = Path(self.complete_artifact_path(log_key))  # type: ignore[no-untyped-call]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()

    @contextmanager
    def _file(self, log_key: Sequence[str], kind: ComputeIOType) -> Iterator[int]:
        path = Path(self.get_captured_local_path(log_key, IO_TYPE_EXTENSION[kind]))
        path.parent.mkdir(parents=True, exist_ok=True)
        # at the end, always: the processes of a capture share the file
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            yield descriptor
        finally:
            os.close(descriptor)
