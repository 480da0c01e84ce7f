"""The prediction log: every answered prediction reaches ``gold/predictions``, and no answer waits for the lakehouse.

A prediction's row is appended to the local :class:`~clinical_orchestration.serving.spool.Spool` before its answer is
sent (one ``write`` for all predictions computed together, some ten microseconds); a background thread moves rows from
the spool to the table about once a second and makes the spool durable (``fsync``) at the same pace.

When something is out:

- table out: rows stay in the spool (up to its size limit) and are appended when the table answers again;
- spool not writable (disk full): rows wait in memory, up to `memory_rows`, and go to the table from there; a row that
  finds the memory full too is dropped, counted and logged. Serving goes on in every case.
- process killed: the next start finds the rows in the spool and asks the table up to which one it has them.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clinical_orchestration.serving.ports import PredictionSink
from clinical_orchestration.serving.spool import Spool, open_spool

_logger = logging.getLogger(__name__)

_BATCH_ROWS = 5_000  # in one commit
_SLOW_SECONDS = 15.0  # of one append, after which the table counts as out
_COMPACT_EVERY = 900.0  # seconds, and only after something was written


@dataclass(frozen=True)
class LogState:
    """How the prediction log is doing.

    Attributes:
        backlog: rows answered for and not yet in the table.
        in_memory: how many of these are in memory only, because the spool cannot be written.
        written: rows this process has put into the table.
        dropped: rows lost because the spool and the memory were full.
        write_failures: failed attempts to append to the table.
        spool_failures: failed attempts to append to the spool.
        spool_bytes: size of the spool on disk.
        last_error: why the last attempt failed; None when the newest one succeeded.
    """

    backlog: int
    in_memory: int
    written: int
    dropped: int
    write_failures: int
    spool_failures: int
    spool_bytes: int
    last_error: str | None


class _Drain:
    """One spool on its way to the table."""

    def __init__(self, spool: Spool) -> None:
        self.spool = spool
        # until the table has been asked, rows found in the folder count as not stored
        self.stored = spool.first_sequence - 1
        self.certain = False

    @property
    def backlog(self) -> int:
        return max(0, self.spool.last_sequence - self.stored)

    def step(self, sink: PredictionSink) -> int:
        """Move one batch; return the number of rows moved."""
        if not self.certain:
            stored = sink.last_sequence(self.spool.log_id)
            if stored > self.spool.last_sequence:
                _logger.warning("the prediction spool is older than the table: going on under a new log id")
                self.spool.restart_as_new_log()
                stored = 0
            self.stored, self.certain = stored, True
        batch = self.spool.read(self.stored, _BATCH_ROWS)
        if not batch.rows:
            self.stored = max(self.stored, batch.last_sequence)
            return 0
        self.certain = False  # should the append fail half-way, ask the table what it has
        sink.append(batch.rows, self.spool.log_id, self.stored, batch.last_sequence)
        self.stored, self.certain = batch.last_sequence, True
        self.spool.forget(batch.last_sequence)
        return len(batch.rows)


class PredictionLog:
    """Takes rows from the request path and brings them to the table.

    Args:
        folder: root of the spools of this deployment.
        sink: the table; built in the background thread on first use, because its driver loads slowly.
        flush_seconds: pace of the background thread.
        memory_rows: most rows that wait in memory while the spool cannot be written.
        max_spool_bytes: most bytes on disk.
    """

    def __init__(
        self,
        folder: Path,
        sink: Callable[[], PredictionSink],
        *,
        flush_seconds: float = 1.0,
        memory_rows: int = 10_000,
        max_spool_bytes: int = 2 * 2**30,
    ) -> None:
        self._folder = folder
        self._make_sink = sink
        self._flush_seconds = flush_seconds
        self._memory_rows = memory_rows
        self._max_spool_bytes = max_spool_bytes
        self._sink: PredictionSink | None = None
        self._drain: _Drain | None = None
        self._abandoned: list[_Drain] = []
        # rows in memory are a log of their own, so that they too are stored exactly once
        self._memory: deque[tuple[int, Mapping[str, Any]]] = deque()
        self._memory_id = uuid.uuid4().hex
        self._memory_last = 0
        self._memory_stored: int | None = 0
        self._mutex = threading.Lock()
        self._wake = threading.Event()
        self._stopping = False
        self._idle = threading.Event()
        self._thread: threading.Thread | None = None
        self._written = self._dropped = self._write_failures = self._spool_failures = 0
        self._write_error: str | None = None
        self._spool_error: str | None = None
        self._unsynced = False
        self._writing_since: float | None = None

    def start(self) -> None:
        """Open the spool and start the background thread. Never fails: without a spool, rows wait in memory."""
        self._open_spool()
        self._thread = threading.Thread(target=self._run, name="prediction-log", daemon=True)
        self._thread.start()

    def record(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Take rows. When this returns they survive the process, unless the state says otherwise. Never raises."""
        drain = self._drain
        if drain is not None:
            try:
                drain.spool.append(rows)
            except OSError as error:
                self._spool_failed(error)
            else:
                self._unsynced = True
                self._spool_error = None
                return
        with self._mutex:
            for row in rows:
                if len(self._memory) >= self._memory_rows:
                    self._dropped += 1
                    if self._dropped % 1000 == 1:
                        _logger.error("predictions are not logged: spool and memory are full (%d lost)", self._dropped)
                else:
                    self._memory_last += 1
                    self._memory.append((self._memory_last, row))

    def state(self) -> LogState:
        """Return how the log is doing now."""
        drains = [drain for drain in (self._drain, *self._abandoned) if drain is not None]
        in_memory = len(self._memory)
        since, slow = self._writing_since, None
        if since is not None and (waited := time.monotonic() - since) > _SLOW_SECONDS:
            # the driver tries for minutes before it gives up; say so before that
            slow = f"gold/predictions has not answered for {waited:.0f} s"
        return LogState(
            backlog=sum(drain.backlog for drain in drains) + in_memory,
            in_memory=in_memory,
            written=self._written,
            dropped=self._dropped,
            write_failures=self._write_failures,
            spool_failures=self._spool_failures,
            spool_bytes=sum(drain.spool.size_bytes for drain in drains),
            last_error="; ".join(filter(None, (slow or self._write_error, self._spool_error))) or None,
        )

    def flush(self, timeout: float) -> bool:
        """Wait until everything recorded before is in the table; False when that took longer than `timeout` s."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            if self.state().backlog == 0:
                return True
            self._idle.clear()
            self._wake.set()
            self._idle.wait(min(0.2, max(0.0, deadline - time.monotonic())))
        return self.state().backlog == 0

    def close(self, timeout: float = 10.0) -> None:
        """Flush as far as `timeout` seconds allow and stop; what is left stays in the spool for the next start."""
        if self._thread is None:
            return
        self._stopping = True
        self._wake.set()
        self._thread.join(timeout)
        self._rescue_memory()
        for drain in (self._drain, *self._abandoned):
            if drain is not None:
                drain.spool.close()
        backlog = self.state().backlog
        if backlog:
            _logger.warning("%d predictions stay in the spool for the next start", backlog)
        self._thread = None

    def _rescue_memory(self) -> None:
        """Put rows that only this process's memory holds into the spool, should that be possible again."""
        with self._mutex:
            rows = [row for _, row in self._memory]
            if self._drain is None or not rows:
                return
            try:
                self._drain.spool.append(rows)
            except OSError:
                _logger.error("%d predictions are lost: neither the table nor the spool can be written", len(rows))
            else:
                self._memory.clear()

    def _open_spool(self) -> None:
        try:
            spool, abandoned = open_spool(self._folder, max_bytes=self._max_spool_bytes)
        except OSError as error:
            self._spool_failed(error)
            return
        self._drain = _Drain(spool)
        self._abandoned = [_Drain(other) for other in abandoned]
        self._spool_error = None

    def _spool_failed(self, error: OSError) -> None:
        self._spool_failures += 1
        text = f"the spool {self._folder} cannot be written: {error.strerror or error}"
        if self._spool_error != text:
            _logger.error("%s; predictions wait in memory", text)
        self._spool_error = text

    def _run(self) -> None:
        next_compaction = time.monotonic() + _COMPACT_EVERY
        written_at_compaction = 0
        failures_in_a_row = 0
        while True:
            moved = 0
            try:
                self._sync()
                self._writing_since = time.monotonic()
                moved = self._step()
                failures_in_a_row = 0
                self._write_error = None
            except Exception as error:
                failures_in_a_row += 1
                text = f"gold/predictions cannot be written: {type(error).__name__}"
                if self._write_error != text:
                    # the text of a driver's error may show rows or addresses with credentials
                    _logger.warning("%s; predictions stay in the spool and are written later", text)
                self._write_error = text
                self._write_failures += 1
            finally:
                self._writing_since = None
            self._idle.set()
            if time.monotonic() > next_compaction and not self._stopping:
                next_compaction = time.monotonic() + _COMPACT_EVERY
                if self._written > written_at_compaction:
                    written_at_compaction = self._written
                    self._compact()
            if self._stopping and (not moved or failures_in_a_row):
                return
            if moved >= _BATCH_ROWS:
                continue
            if not self._stopping:
                self._wake.wait(min(30.0, self._flush_seconds * 2 ** min(failures_in_a_row, 5)))
                self._wake.clear()

    def _compact(self) -> None:
        try:
            if self._sink is not None:
                self._sink.compact()
        except Exception as error:
            # another server may be doing the same; it costs readers some speed, and nothing is lost
            _logger.warning("compacting gold/predictions failed: %s", type(error).__name__)

    def _sync(self) -> None:
        if self._drain is None:
            self._open_spool()
        elif self._unsynced:
            self._unsynced = False
            try:
                self._drain.spool.sync()
            except OSError as error:
                self._spool_failed(error)

    def _step(self) -> int:
        """Move one batch of each source; return the number of rows moved."""
        drains = [drain for drain in (self._drain, *self._abandoned) if drain is not None]
        if not any(drain.backlog for drain in drains) and not self._memory:
            return 0
        if self._sink is None:
            self._sink = self._make_sink()
        moved = 0
        for drain in drains:
            if drain.backlog:
                moved += self._count(drain.step(self._sink))
        moved += self._step_memory(self._sink)
        for drain in list(self._abandoned):
            if not drain.backlog:
                self._abandoned.remove(drain)
                drain.spool.close()
        return moved

    def _step_memory(self, sink: PredictionSink) -> int:
        with self._mutex:
            batch = [self._memory[index] for index in range(min(len(self._memory), _BATCH_ROWS))]
        if not batch:
            return 0
        if self._memory_stored is None:
            self._memory_stored = sink.last_sequence(self._memory_id)
        after, last = self._memory_stored, batch[-1][0]
        rows = [row for number, row in batch if number > after]
        if rows:
            self._memory_stored = None
            sink.append(rows, self._memory_id, after, last)
            self._memory_stored = last
        with self._mutex:
            for _ in batch:
                with contextlib.suppress(IndexError):
                    self._memory.popleft()
        return self._count(len(rows))

    def _count(self, rows: int) -> int:
        self._written += rows
        return rows
