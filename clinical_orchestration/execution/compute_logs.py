"""Output of steps, written straight into the files that the Dagster UI reads.

The stock manager starts four processes for each capture, so that the output also reaches the run worker's own. Here
descriptors 1 and 2 are the files while a capture lasts: output of Python, of C libraries and of child processes is
readable at once, costs no process, and does not appear in the log of the service that started the run.

Steps that run in one process share its output; where each begins and ends in it is kept beside it.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TextIO

from dagster import DagsterEventType
from dagster._core.storage.compute_log_manager import CapturedLogContext, ComputeIOType
from dagster._core.storage.local_compute_log_manager import IO_TYPE_EXTENSION, LocalComputeLogManager
from dagster._serdes import ConfigurableClassData

if TYPE_CHECKING:
    from dagster._core.events.log import EventLogEntry

_DESCRIPTORS = (1, 2)
_STARTS = frozenset({DagsterEventType.STEP_START, DagsterEventType.STEP_RESTARTED})
_MARKS = "steps"
_SAME_MOMENT = 0.001
_ENDS = frozenset({DagsterEventType.STEP_SUCCESS, DagsterEventType.STEP_FAILURE, DagsterEventType.STEP_UP_FOR_RETRY})


class StepSpan(NamedTuple):
    """Where the output of one attempt at a step is in that of its process: bytes of both streams.

    Attributes:
        starts: where it begins, in standard output and standard error.
        ends: where it ends; None while the step runs, or when its process was killed.
    """

    starts: tuple[int, int]
    ends: tuple[int, int] | None


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


class _Marks:
    """Notes where steps begin and end in the output of their process, when it runs more than one."""

    def __init__(self, path: Path, log_key: Sequence[str], capture: _Capture) -> None:
        self._path = path
        self._log_key = log_key
        self._capture: _Capture | None = capture
        self._shared = False

    def close(self) -> None:
        """Note no more: the capture ends."""
        self._capture = None

    def __call__(self, event: EventLogEntry) -> None:
        """Take an event of the run."""
        known = event.dagster_event
        if known is None or self._capture is None:
            return
        if known.event_type is DagsterEventType.LOGS_CAPTURED:
            data = known.logs_captured_data
            self._shared = self._shared or (data.file_key == self._log_key[-1] and len(data.step_keys) > 1)
        elif self._shared and known.event_type in _STARTS | _ENDS:
            _flush()
            sizes = [os.fstat(target).st_size for target in self._capture.targets]
            mark = [known.step_key, event.timestamp, known.event_type in _STARTS, *sizes]
            with contextlib.suppress(OSError), self._path.open("a") as marks:  # a full disk must not end the run
                marks.write(json.dumps(mark) + "\n")


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
            marks = _Marks(Path(self.get_captured_local_path(log_key, _MARKS)), log_key, capture)
            if self.has_instance:
                self._instance.add_event_listener(log_key[0], marks)
            _descriptors.give(capture)
            try:
                yield CapturedLogContext(log_key)
            finally:
                marks.close()
                _descriptors.take_back(capture)
                self.complete(log_key)

    def span_of(self, log_key: Sequence[str], step: str, began: float) -> StepSpan | None:
        """Return where the output of an attempt at a step is in that of its process.

        Args:
            log_key: the capture.
            step: key of the step.
            began: time of the event that says that the attempt began, in seconds since the epoch.

        Returns:
            None where it is not known: the process ran one step alone, or with another manager.
        """
        found = None
        try:
            lines = Path(self.get_captured_local_path(log_key, _MARKS)).read_text().splitlines()
        except FileNotFoundError:
            return None
        for line in lines:
            name, at, starts, out, err = json.loads(line)
            if name == step and starts and abs(at - began) < _SAME_MOMENT:
                found = StepSpan((out, err), None)
            elif name == step and found is not None and found.ends is None:
                found = found._replace(ends=(out, err))
        return found

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
