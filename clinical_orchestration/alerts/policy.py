"""When people are told: once for each condition, again when it gets worse or lasts, never in a flood.

Everything here is a function of what is stored, what is raised and the time; the stores apply it under their locks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum

from clinical_orchestration.alerts.model import Severity

_ORDER = {severity: rank for rank, severity in enumerate(Severity)}


class Kind(StrEnum):
    """Why a message goes out; `UPDATED` is the one reason for none."""

    OPENED = "opened"
    ESCALATED = "escalated"
    REMINDER = "reminder"
    UPDATED = "updated"
    RESOLVED = "resolved"
    SUMMARY = "summary"


@dataclass(frozen=True)
class Rules:
    """The bounds of the policy."""

    remind_after: timedelta = timedelta(hours=24)
    """An open alert that is still being raised is told again after this time."""
    info_lasts: timedelta = timedelta(hours=24)
    """Nobody resolves news: an alert of severity info counts as open this long after it was last raised."""
    window: timedelta = timedelta(hours=1)
    """Span over which messages are counted."""
    per_window: int = 20
    """Messages that one channel carries in a window."""
    critical_extra: int = 10
    """Further messages in a window for critical alerts only: a flood of warnings must not hide an emergency."""


@dataclass(frozen=True)
class OpenAlert:
    """What is stored of an alert that was raised and not resolved.

    Attributes:
        severity: as last raised.
        told_severity: the severity of the latest message.
        opened_at: when it was first raised (UTC).
        raised_at: when it was last raised (UTC).
        told_at: when the latest message was decided (UTC).
        times: how often it was raised.
    """

    severity: Severity
    told_severity: Severity
    opened_at: datetime
    raised_at: datetime
    told_at: datetime
    times: int = 1


def worse(one: Severity, other: Severity) -> bool:
    """Say whether `one` is more severe than `other`."""
    return _ORDER[one] > _ORDER[other]


def still_open(stored: OpenAlert, now: datetime, rules: Rules) -> bool:
    """Say whether an unresolved alert counts as open: news grow old by themselves, problems do not."""
    return stored.severity is not Severity.INFO or now - stored.raised_at < rules.info_lasts


def decide(stored: OpenAlert | None, severity: Severity, now: datetime, rules: Rules) -> Kind:
    """Return what raising an alert of `severity` means, given the open alert of the same key (None: there is none)."""
    if stored is None or not still_open(stored, now, rules):
        return Kind.OPENED
    if worse(severity, stored.told_severity):
        return Kind.ESCALATED
    # news are told once: they ask for nothing that one could be reminded of
    if severity is not Severity.INFO and now - stored.told_at >= rules.remind_after:
        return Kind.REMINDER
    return Kind.UPDATED


def raised(stored: OpenAlert | None, severity: Severity, now: datetime, rules: Rules) -> tuple[Kind, OpenAlert]:
    """Return the decision and what to store."""
    kind = decide(stored, severity, now, rules)
    if stored is None or kind is Kind.OPENED:
        return kind, OpenAlert(severity, severity, now, now, now)
    if kind is Kind.UPDATED:
        told_severity, told_at = stored.told_severity, stored.told_at
    else:
        told_severity, told_at = severity, now
    return kind, OpenAlert(severity, told_severity, stored.opened_at, now, told_at, stored.times + 1)


@dataclass(frozen=True)
class Waiting:
    """A message that waits for its channel."""

    id: int
    severity: Severity
    created_at: datetime


@dataclass(frozen=True)
class Plan:
    """What a channel does now: send these one by one, keep those back, tell the kept ones in one summary."""

    send: tuple[int, ...]
    hold: tuple[int, ...]
    summarize: tuple[int, ...]


def plan(waiting: Sequence[Waiting], held: Sequence[int], sent_in_window: int, rules: Rules) -> Plan:
    """Share the places that a channel has left in its window.

    Args:
        waiting: messages that were not sent yet.
        held: ids of messages that were kept back and not yet summarized.
        sent_in_window: messages that the channel carried during the last `rules.window`.
        rules: the bounds.

    Severe messages come first, then old ones. Messages kept back are told in one summary as soon as a place is free.
    """
    free = max(0, rules.per_window - sent_in_window)
    extra = max(0, rules.per_window + rules.critical_extra - sent_in_window) - free
    summarize: tuple[int, ...] = ()
    if held and free:
        summarize = tuple(held)
        free -= 1
    send, hold = [], []
    for message in sorted(waiting, key=lambda message: (-_ORDER[message.severity], message.created_at, message.id)):
        if free:
            free -= 1
            send.append(message.id)
        elif message.severity is Severity.CRITICAL and extra:
            extra -= 1
            send.append(message.id)
        else:
            hold.append(message.id)
    return Plan(tuple(send), tuple(hold), summarize)
