"""The prediction log's local half: append-only segment files that survive the death of the process.

A spool is one folder with an id of its own. Each row is one JSON line with a sequence number that never repeats in
that spool, so "stored in the table up to sequence n" (kept in the table itself, in the same commit as the rows) is
all that has to be known to go on after a crash. Files are called ``<spool id>-<first sequence>.jsonl``.

What survives: a row is handed to the operating system (``write``) before :meth:`Spool.append` returns, so killing the
process loses nothing. :meth:`Spool.sync` (``fsync``) makes it survive a power loss; the log calls it about once a
second, which is therefore the longest stretch that a power loss can take.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import threading
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import orjson

_logger = logging.getLogger(__name__)

SEGMENT_BYTES = 16 * 2**20
_SUFFIX = ".jsonl"
_KEPT_BYTES = 2**16  # of stored rows in the open file; a small one is not worth a new file each second
_MOST_SERVERS = 64  # that may start at the same moment below one root


class SpoolInUseError(OSError):
    """Another process writes to this spool."""


class SpoolFullError(OSError):
    """The spool holds as many bytes as it may."""


@dataclass(frozen=True)
class SpooledRows:
    """Rows read back, oldest first.

    Attributes:
        rows: the rows, without their sequence numbers.
        last_sequence: the number of the last one.
    """

    rows: list[dict[str, Any]]
    last_sequence: int


class Spool:
    """One spool, open for writing by this process only.

    Args:
        folder: made when missing.
        max_bytes: appending beyond this raises :class:`SpoolFullError`.
        segment_bytes: size at which a new file starts.

    Raises:
        SpoolInUseError: another process has it open.
        OSError: the folder cannot be made or written.
    """

    def __init__(self, folder: Path, *, max_bytes: int = 2 * 2**30, segment_bytes: int = SEGMENT_BYTES) -> None:
        self.folder = folder
        self.max_bytes = max_bytes
        self.segment_bytes = segment_bytes
        self.corrupt_lines = 0
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._mutex = threading.Lock()
        self._lock_file = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._file: int | None = None
        self._offset = 0
        try:
            try:
                fcntl.flock(self._lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise SpoolInUseError(f"the prediction spool {folder} belongs to another process") from error
            segments = self._segments()
            self.log_id = segments[-1][0] if segments else uuid.uuid4().hex
            self._last = self._recover_last_sequence(segments)
            self._cursor: tuple[int, int, int] = (0, 0, 0)  # segment's first sequence, byte offset, sequence before it
            self._sealed_bytes = 0
            self._start_segment()
            self._sealed_bytes = sum(path.stat().st_size for _, _, path in segments)
        except BaseException:
            os.close(self._lock_file)
            raise

    @property
    def last_sequence(self) -> int:
        """Sequence number of the newest row; 0 before the first."""
        return self._last

    @property
    def first_sequence(self) -> int:
        """Sequence number of the oldest row in the folder (of the next row when there is none)."""
        segments = self._segments()
        return segments[0][1] if segments else self._last + 1

    @property
    def size_bytes(self) -> int:
        """Bytes on disk."""
        return self._sealed_bytes + self._offset

    def append(self, rows: Sequence[Mapping[str, Any]]) -> int:
        """Write rows with one system call and return the sequence number of the last.

        Raises:
            OSError: nothing was written (disk full, no permission, spool full).
        """
        with self._mutex:
            if self._file is None:
                raise OSError("the spool is closed")
            number = self._last
            lines = []
            for row in rows:
                number += 1
                lines.append(orjson.dumps({"sequence": number, **row}))
            data = b"\n".join(lines) + b"\n" if lines else b""
            if self.size_bytes + len(data) > self.max_bytes:
                raise SpoolFullError(f"the prediction spool holds its {self.max_bytes} bytes")
            view = memoryview(data)
            try:
                while view:
                    view = view[os.write(self._file, view) :]
            except OSError:
                # a part may have been written; cut it off, so that the file ends with a whole line
                with contextlib.suppress(OSError):
                    os.ftruncate(self._file, self._offset)
                raise
            self._offset += len(data)
            self._last = number
            if self._offset >= self.segment_bytes:
                # the rows are written: where no new file can be made, the old one grows on
                with contextlib.suppress(OSError):
                    self._start_segment()
            return number

    def sync(self) -> None:
        """Make what was appended survive a power loss (``fsync``)."""
        with self._mutex:
            if self._file is None:
                return
            copy = os.dup(self._file)  # fsync without the mutex: appending goes on meanwhile
        try:
            os.fsync(copy)
        finally:
            os.close(copy)

    def read(self, after: int, limit: int) -> SpooledRows:
        """Return up to `limit` rows with a sequence number above `after`, oldest first."""
        rows: list[dict[str, Any]] = []
        last = after
        for number, row in self._lines(after):
            if number > after:
                rows.append(row)
                last = number
                if len(rows) >= limit:
                    break
        return SpooledRows(rows, last)

    def forget(self, up_to: int) -> None:
        """Give back the space of rows up to `up_to`: files that hold nothing above it are deleted."""
        with self._mutex:
            if up_to >= self._last and self._offset > min(_KEPT_BYTES, self.segment_bytes):
                with contextlib.suppress(OSError):
                    self._start_segment()
        segments = self._segments()
        for (_, _, path), (_, next_first, _) in pairwise(segments):
            if next_first - 1 <= up_to:
                size = path.stat().st_size
                path.unlink()
                with self._mutex:
                    self._sealed_bytes -= size

    def restart_as_new_log(self) -> None:
        """Go on under a new id, from sequence 1. For a folder that was put back to an older state.

        The table knows a higher sequence number of the old id than the folder does, so rows appended under the old id
        would be taken for stored ones. Rows still in the folder must have been stored before.
        """
        with self._mutex:
            for _, _, path in self._segments():
                path.unlink()
            self.log_id = uuid.uuid4().hex
            self._last, self._sealed_bytes, self._cursor = 0, 0, (0, 0, 0)
            if self._file is not None:
                os.close(self._file)
                self._file = None
            self._start_segment()

    def close(self) -> None:
        """Sync, close and let another process have the spool."""
        with contextlib.suppress(OSError):
            self.sync()
        with self._mutex:
            if self._file is not None:
                os.close(self._file)
                self._file = None
                os.close(self._lock_file)

    def _segments(self) -> list[tuple[str, int, Path]]:
        """Return (log id, first sequence, path) of each file, oldest first."""
        found = []
        for path in self.folder.glob(f"*-*{_SUFFIX}"):
            log_id, _, first = path.name.removesuffix(_SUFFIX).rpartition("-")
            if first.isdigit():
                found.append((log_id, int(first), path))
        return sorted(found, key=lambda segment: segment[1])

    def _start_segment(self) -> None:
        path = self.folder / f"{self.log_id}-{self._last + 1:020d}{_SUFFIX}"
        opened = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        if self._file is not None:
            with contextlib.suppress(OSError):
                os.fsync(self._file)
            self._sealed_bytes += self._offset
            os.close(self._file)
        # a crash before the first whole line leaves a file of this very name
        os.ftruncate(opened, 0)
        self._file, self._offset = opened, 0

    def _recover_last_sequence(self, segments: list[tuple[str, int, Path]]) -> int:
        last = 0
        for _, first, path in segments[-1:]:
            last = first - 1
            with path.open("rb") as file:
                for line in file:
                    if (row := self._parse(line)) is not None:
                        last = max(last, int(row["sequence"]))
        return last

    def _parse(self, line: bytes) -> dict[str, Any] | None:
        if not line.endswith(b"\n"):
            return None  # still being written, or cut off by a crash
        try:
            row = orjson.loads(line)
            int(row["sequence"])
        except (ValueError, TypeError, KeyError):
            self.corrupt_lines += 1
            _logger.error("an unreadable line of the prediction spool was left out")
            return None
        return row if isinstance(row, dict) else None

    def _lines(self, after: int) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yield (sequence, row) above `after`, from where the last reading stopped when that is not beyond it."""
        segments = self._segments()
        start_first, start_offset, start_sequence = self._cursor
        if start_sequence > after or not any(first == start_first for _, first, _ in segments):
            start_first, start_offset = 0, 0
        for index, (_, first, path) in enumerate(segments):
            if first < start_first or (index + 1 < len(segments) and segments[index + 1][1] - 1 <= after):
                continue
            offset = start_offset if first == start_first else 0
            with path.open("rb") as file:
                file.seek(offset)
                for line in file:
                    row = self._parse(line)
                    if row is None:
                        if not line.endswith(b"\n"):
                            break
                        offset += len(line)
                        continue
                    offset += len(line)
                    number = int(row.pop("sequence"))
                    self._cursor = (first, offset, number)
                    yield number, row


def open_spool(root: Path, *, max_bytes: int = 2 * 2**30) -> tuple[Spool, list[Spool]]:
    """Open a spool below `root` that no other process uses, and those that dead processes left rows in.

    Two servers may share a root (an old one still finishing, or two on one machine): each gets a numbered folder.

    Returns:
        The spool to write to, and abandoned ones to be drained and closed.

    Raises:
        OSError: the folder cannot be made or written.
    """
    root.mkdir(parents=True, exist_ok=True, mode=0o700)
    numbers = sorted(int(path.name) for path in root.iterdir() if path.is_dir() and path.name.isdigit())
    mine: Spool | None = None
    abandoned: list[Spool] = []
    beyond = (numbers[-1] + 1) if numbers else 0
    for number in [*numbers, *range(beyond, beyond + _MOST_SERVERS)]:
        if mine is not None and number >= beyond:
            break
        try:
            spool = Spool(root / str(number), max_bytes=max_bytes)
        except SpoolInUseError:
            continue
        if mine is None:
            mine = spool
        else:
            abandoned.append(spool)
    if mine is None:
        raise SpoolInUseError(f"every prediction spool below {root} belongs to another process")
    return mine, abandoned
