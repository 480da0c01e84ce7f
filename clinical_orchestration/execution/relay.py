"""Events on their way from a step's process to the run worker, and from there to the database.

A step's process has no connection for its events: what Dagster stores in it goes over a socket to the run worker, which
stores what came from all steps in one statement. That the step began is stored before its code runs, and everything is
stored before the step reads the event log.
"""

from __future__ import annotations

import os
import pickle
import socket
import struct
import threading
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from dagster import DagsterEventType

if TYPE_CHECKING:
    from dagster._core.events.log import EventLogEntry
    from dagster._core.storage.event_log import EventLogStorage
    from dagster_shared.error import SerializableErrorInfo

_LENGTH = struct.Struct("!Q")
_STORED = b"\x01"
_READ_BYTES = 1 << 16
_READ_PARTS = 16


class RelayClosedError(RuntimeError):
    """The run worker does not listen any more: it ended, or it could not store what it was sent."""


class Frame(NamedTuple):
    """What a step's process says: an event, that it waits until everything is stored, that it is done, or an error."""

    event: EventLogEntry | None = None
    waits: bool = False
    done: bool = False
    error: SerializableErrorInfo | None = None


class _Forwarding(ABC):
    """An event log storage whose events somebody else stores; for everything else that must have happened."""

    def __init__(self, stored: EventLogStorage) -> None:
        self._stored = stored

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._stored, name)
        if callable(value):
            self.everything_is_stored()
        return value

    @abstractmethod
    def everything_is_stored(self) -> None:
        """Return when all events so far are in the database."""


class GroupedEvents(_Forwarding):
    """The run worker's event log storage while steps run in processes of their own: events wait for :meth:`flush`.

    Nobody sees the difference: the events of the run itself, failures and reads do not wait.
    """

    def __init__(self, stored: EventLogStorage) -> None:
        super().__init__(stored)
        self._waiting: list[EventLogEntry] = []

    @property
    def stored(self) -> EventLogStorage:
        """The storage itself."""
        return self._stored

    def store_event(self, event: EventLogEntry) -> None:
        """Take an event."""
        self._waiting.append(event)
        known = event.dagster_event
        if known is not None and (known.is_job_event or known.is_failure):
            self.flush()

    def store_event_batch(self, events: Sequence[EventLogEntry]) -> None:
        """Take several."""
        for event in events:
            self.store_event(event)

    def everything_is_stored(self) -> None:  # noqa: D102
        self.flush()

    def flush(self) -> None:
        """Store what waits, in its order.

        Raises:
            Exception: whatever the storage raises; the events still wait then.
        """
        if len(self._waiting) == 1:
            self._stored.store_event(self._waiting[0])
        elif self._waiting:
            self._stored.store_event_batch(self._waiting)
        self._waiting = []


class RelayedEvents(_Forwarding):
    """A step's event log storage: its run's events go to the run worker, in order; reads wait for the worker.

    Args:
        stored: the storage itself, for reads and for what belongs to other runs.
        link: the socket to the worker.
        run_id: the run.
    """

    def __init__(self, stored: EventLogStorage, link: socket.socket, run_id: str) -> None:
        super().__init__(stored)
        self._link = link
        self._run_id = run_id
        self._process = os.getpid()
        self._turn = threading.RLock()

    def store_event(self, event: EventLogEntry) -> None:
        """Send an event; that a step starts is stored when this returns."""
        if event.run_id != self._run_id or os.getpid() != self._process:
            self._stored.store_event(event)  # a run inside the step, or a process that the step's own code forked
        else:
            self.send(Frame(event=event, waits=event.dagster_event_type is DagsterEventType.STEP_START))

    def store_event_batch(self, events: Sequence[EventLogEntry]) -> None:
        """Send several."""
        for event in events:
            self.store_event(event)

    def everything_is_stored(self) -> None:  # noqa: D102
        if os.getpid() == self._process:
            self.send(Frame(waits=True))

    def send(self, frame: Frame) -> None:
        """Send something to the worker, and wait for its answer where the frame says so.

        Raises:
            RelayClosedError: the worker does not listen any more.
        """
        body = pickle.dumps(frame, protocol=pickle.HIGHEST_PROTOCOL)
        with self._turn:
            try:
                self._link.sendall(_LENGTH.pack(len(body)) + body)
                answered = not frame.waits or self._link.recv(1) == _STORED
            except OSError as error:
                raise RelayClosedError("the run worker took no event of this step") from error
        if not answered:
            raise RelayClosedError("the run worker could not store the events of this step; its own error says why")


class Inbox:
    """The run worker's end of a step's socket. Half a message, of a process that was killed, is never given out."""

    def __init__(self, link: socket.socket) -> None:
        self._link = link
        self._link.setblocking(False)
        self._received = bytearray()

    def fileno(self) -> int:
        """Return the descriptor."""
        return self._link.fileno()

    def frames(self, *, all_of_them: bool = False) -> list[Frame]:
        """Return what came in since the last call: some of it, so that one step cannot keep the others waiting.

        Args:
            all_of_them: whatever there is, of a process that ended.
        """
        parts = 0
        while all_of_them or parts < _READ_PARTS:
            try:
                part = self._link.recv(_READ_BYTES)
            except (BlockingIOError, ConnectionResetError):
                break
            if not part:
                break
            self._received += part
            parts += 1
        found, at = [], 0
        while len(self._received) - at >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._received, at)
            end = at + _LENGTH.size + length
            if len(self._received) < end:
                break
            found.append(pickle.loads(self._received[at + _LENGTH.size : end]))  # noqa: S301  # from our own fork
            at = end
        del self._received[:at]
        return found

    def answer(self) -> None:
        """Tell the step that everything is stored."""
        try:
            self._link.send(_STORED)
        except OSError:
            return  # it died meanwhile, which its process says

    def close(self) -> None:
        """Close the socket."""
        self._link.close()
