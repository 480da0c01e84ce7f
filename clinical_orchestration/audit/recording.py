"""How a change is recorded: a row before it begins, and a row that says how it ended.

The first row carries the event's name and is stored before anything is changed; where it cannot be stored, nothing is
changed. The second is named ``<event>.done`` or ``<event>.failed`` and has the number of the first as ``begun``. A
change whose end is missing was cut off, or its end could not be stored; nothing was changed without a row.
A change that somebody may not make is one row, ``<event>.refused``.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any, Protocol

from clinical_orchestration.audit.trail import AuditEntry, AuditError
from clinical_orchestration.platform.masking import MASK, is_sensitive

DONE, FAILED, REFUSED = "done", "failed", "refused"

_logger = logging.getLogger("clinical_orchestration.audit")


class Recorder(Protocol):
    """What entries go to."""

    def record(self, entry: AuditEntry) -> int:
        """Store an entry and return its number, or raise :class:`.trail.AuditError`."""


@dataclass
class Ending:
    """What the second row says beside how it ended; filled in while the change is made."""

    run_id: str | None = None
    old: Any = None
    new: Any = None
    failed: str = ""
    """Why it failed, where that is no exception."""


@contextlib.contextmanager
def change(trail: Recorder, entry: AuditEntry) -> Iterator[Ending]:
    """Record a change around the block that makes it; an exception of the block is recorded as failure.

    Raises:
        AuditError: it cannot be recorded; the block is not entered.
    """
    begun = trail.record(entry)
    ending = Ending()
    try:
        yield ending
    except BaseException as error:
        ending.failed = _described(error)
        _end(trail, entry, begun, ending)
        raise
    _end(trail, entry, begun, ending)


def refused(trail: Recorder, entry: AuditEntry) -> None:
    """Record a change that is refused; that it is refused does not depend on the record."""
    try:
        trail.record(replace(entry, event=f"{entry.event}.{REFUSED}"))
    except AuditError as error:
        _logger.error("a refused %s of %s was not recorded: %s", entry.event, entry.who, error)


def _end(trail: Recorder, entry: AuditEntry, begun: int, ending: Ending) -> None:
    how = FAILED if ending.failed else DONE
    extra = {"begun": begun, **({"error": ending.failed} if ending.failed else {})}
    end = replace(
        entry,
        event=f"{entry.event}.{how}",
        run_id=ending.run_id or entry.run_id,
        old=ending.old,
        new=ending.new,
        extra=extra,
        when=datetime.now(UTC),
    )
    try:
        trail.record(end)
    except AuditError as error:
        # the change is in the trail; to report it as failed would make people do it twice
        _logger.error("the end of change %d (%s, %s) was not recorded: %s", begun, entry.event, how, error)


def _described(error: BaseException) -> str:
    """Return the kind of an error: its text may hold what somebody typed."""
    status = getattr(error, "status", None)
    return f"status {status}" if isinstance(status, int) else type(error).__name__


def connection_value(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return a connection's fields without what its password and its extra hold."""
    hidden = ("password", "extra")
    return {name: MASK if name in hidden and value else value for name, value in values.items()}


def variable_value(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``key``, ``value`` and ``description`` of a variable, its value masked where the key names a secret."""
    secret = is_sensitive(str(values.get("key", "")))
    return {name: MASK if name == "value" and secret and value else value for name, value in values.items()}
