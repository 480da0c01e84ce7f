"""Requests that the door turned away (401), into the audit trail without letting anybody fill it."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from clinical_orchestration.users.lockout import address_group

if TYPE_CHECKING:
    from clinical_orchestration.audit.recording import Recorder

EVENT = "unauthenticated"
PERIOD_SECONDS = 60.0
MOST_ADDRESSES = 100
"""So many addresses are told apart at once; the rest are counted together."""
OTHERS = "others"
LOOK_SECONDS = 1.0

_logger = logging.getLogger("clinical_orchestration.page")


@dataclass
class _Window:
    due: float
    """When the next row may be written."""
    count: int = 0
    origin: str = ""
    newest: str = ""


class TurnedAway:
    """Counts requests without a login by address: one row at once, then at most one a minute with how many there were.

    An IPv6 network of 64 bits is one address. Rows are written by a thread, which ends when nobody comes any more.

    Args:
        trail: what they go to. A row that cannot be stored is left out; nobody is let in by that.
        clock: seconds that never go back.
    """

    def __init__(self, trail: Recorder, clock: Callable[[], float] = time.monotonic) -> None:
        self._trail = trail
        self._clock = clock
        self._lock = threading.Lock()
        self._windows: dict[str, _Window] = {}
        self._thread: threading.Thread | None = None
        self._closing = threading.Event()

    def note(self, address: str, origin: str, request: str) -> None:
        """Count a request; it waits for nothing.

        Args:
            address: where it came from.
            origin: ``api``, ``page`` or ``graphql``.
            request: method and path.
        """
        group = address_group(address)
        with self._lock:
            if group not in self._windows and len(self._windows) >= MOST_ADDRESSES:
                group = OTHERS
            window = self._windows.setdefault(group, _Window(self._clock()))
            window.count += 1
            window.origin, window.newest = origin, request
            if self._thread is None and not self._closing.is_set():
                self._thread = threading.Thread(target=self._work, name="turned-away", daemon=True)
                self._thread.start()

    def close(self) -> None:
        """Write what was counted and not written yet, and end the thread."""
        self._closing.set()
        thread = self._thread
        if thread is not None:
            thread.join(5)
        with self._lock:
            left = [(group, window) for group, window in self._windows.items() if window.count]
            self._windows = {}
        for group, window in left:
            self._record(group, window)

    def _work(self) -> None:
        while not self._closing.is_set():
            now = self._clock()
            with self._lock:
                due = [(group, window) for group, window in self._windows.items() if window.due <= now]
                for group, window in due:
                    if window.count:
                        self._windows[group] = _Window(now + PERIOD_SECONDS)
                    else:
                        del self._windows[group]
                if not self._windows:
                    self._thread = None
                    return
            for group, window in due:
                if window.count:
                    self._record(group, window)
            self._closing.wait(LOOK_SECONDS)

    def _record(self, group: str, window: _Window) -> None:
        from clinical_orchestration.audit.trail import AuditEntry, AuditError

        extra = {"status": 401, "requests": window.count, "newest": window.newest}
        try:
            self._trail.record(AuditEntry(EVENT, "anonymous", window.origin, address=group, extra=extra))
        except AuditError as error:
            _logger.warning("%d requests without a login from %s were not recorded: %s", window.count, group, error)
