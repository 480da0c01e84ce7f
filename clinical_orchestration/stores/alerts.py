"""The notifier: what is open, what was told to whom, and by which way.

State is in PostgreSQL (tables ``clinical_alerts``, ``clinical_alert_messages``, ``clinical_alert_channels``), so that
every process of the platform sees the same alerts and a condition found by several at once is told once. Messages are
decided and stored in one transaction with the alert's state and delivered afterwards; what could not be delivered
waits for the next delivery. A process that dies while it sends leaves a message that is sent again after
:data:`CLAIM_LASTS`: at least once, not exactly once, because neither Slack nor SMTP can be asked whether they took it.
Without PostgreSQL the same happens in the memory of the process, and every message is in the log in any case.
"""

from __future__ import annotations

import json
import logging
import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, Protocol

from pydantic import Field, SecretStr
from pydantic_settings import BaseSettings, SettingsConfigDict

from clinical_orchestration.alerts.model import Alert, Severity
from clinical_orchestration.alerts.policy import Kind, OpenAlert, Rules, Waiting, plan, raised, still_open
from clinical_orchestration.alerts.templates import Message, subject
from clinical_orchestration.platform.connection import ConnectionFormatError
from clinical_orchestration.platform.crypto import SecretKeyError
from clinical_orchestration.settings import ClientSettings, Variables, connection
from clinical_orchestration.stores.alert_channels import (
    Channel,
    ChannelError,
    EmailChannel,
    SlackChannel,
    SmtpSettings,
    parse_recipients,
    parse_smtp_url,
    smtp_of_connection,
)

if TYPE_CHECKING:
    from psycopg2 import extensions

CLAIM_LASTS = timedelta(minutes=2)
KEPT_FOR = timedelta(days=90)
MAX_ATTEMPTS = 10
LONGEST_PAUSE = timedelta(hours=1)
SMTP_CONNECTION = "smtp_default"

_logger = logging.getLogger("clinical_orchestration.alerts")
_LEVELS = {
    Severity.INFO: logging.INFO,
    Severity.WARNING: logging.WARNING,
    Severity.ERROR: logging.ERROR,
    Severity.CRITICAL: logging.CRITICAL,
}


@dataclass(frozen=True)
class AlertView:
    """One alert as it is shown; times in UTC, `resolved_at` None while it is open."""

    alert: Alert
    opened_at: datetime
    raised_at: datetime
    times: int
    resolved_at: datetime | None = None
    note: str = ""

    def as_dict(self) -> dict[str, Any]:
        """Return the JSON of ``/alerts.json``."""
        return {
            "key": self.alert.key,
            "severity": self.alert.severity.value,
            "title": self.alert.title,
            "what": self.alert.what,
            "where": self.alert.where,
            "action": self.alert.action,
            "source": self.alert.source,
            "trial": self.alert.trial,
            "details": {name: _plain(value) for name, value in self.alert.details.items()},
            "opened_at": self.opened_at.isoformat(),
            "raised_at": self.raised_at.isoformat(),
            "times": self.times,
            "resolved_at": self.resolved_at.isoformat() if self.resolved_at else None,
            "note": self.note,
        }


@dataclass(frozen=True)
class ChannelView:
    """How a channel does: its last success and failure, until when it rests, and how many messages wait or are held."""

    name: str
    last_sent_at: datetime | None = None
    last_error: str | None = None
    last_error_at: datetime | None = None
    paused_until: datetime | None = None
    waiting: int = 0
    held: int = 0

    @property
    def failing(self) -> bool:
        """Whether its last attempt failed."""
        if self.last_error_at is None:
            return False
        return self.last_sent_at is None or self.last_error_at > self.last_sent_at

    def as_dict(self) -> dict[str, Any]:
        """Return the JSON of ``/alerts.json``."""
        return {
            "name": self.name,
            "failing": self.failing,
            "last_sent_at": self.last_sent_at.isoformat() if self.last_sent_at else None,
            "last_error": self.last_error,
            "last_error_at": self.last_error_at.isoformat() if self.last_error_at else None,
            "waiting": self.waiting,
            "held": self.held,
        }


@dataclass(frozen=True)
class AlertsView:
    """Open alerts (worst first), those resolved lately (newest first), and the channels."""

    open: tuple[AlertView, ...] = ()
    resolved: tuple[AlertView, ...] = ()
    channels: tuple[ChannelView, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Return the JSON of ``/alerts.json``."""
        return {
            "open": [view.as_dict() for view in self.open],
            "resolved": [view.as_dict() for view in self.resolved],
            "channels": [view.as_dict() for view in self.channels],
        }


@dataclass(frozen=True)
class Claimed:
    """A message that this process has taken for delivery."""

    id: int
    message: Message


class AlertStore(Protocol):
    """State of alerts and messages; every operation is atomic."""

    def raise_alert(self, alert: Alert, now: datetime, rules: Rules, channels: Sequence[str]) -> Message | None:
        """Open or update the alert; return the message that goes out and store it for each channel, or None."""

    def resolve(self, key: str, note: str, now: datetime, rules: Rules, channels: Sequence[str]) -> Message | None:
        """Close the open alert of `key`; return the message that goes out, or None where none was open."""

    def claim(self, channel: str, now: datetime, rules: Rules) -> list[Claimed]:
        """Take the messages that the channel may carry now; none while it rests."""

    def delivered(self, claimed: Claimed, channel: str, now: datetime) -> None:
        """Note that the channel carried the message."""

    def refused(self, claimed: Claimed, channel: str, now: datetime, error: ChannelError) -> None:
        """Note that it did not; unless that is for good, the message waits and the channel rests."""

    def release(self, claimed: Claimed) -> None:
        """Give a message back that was not tried."""

    def view(self, now: datetime, rules: Rules, *, limit: int = 50, since: timedelta = timedelta(days=7)) -> AlertsView:
        """Return what is open and what was resolved within `since`, at most `limit` of each."""


def _pause(failures: int, error: ChannelError) -> timedelta:
    """Return how long a channel rests after its `failures`-th failure in a row."""
    if error.retry_after is not None:
        return error.retry_after
    return min(timedelta(minutes=2 ** min(failures - 1, 10)), LONGEST_PAUSE)


def _summary(titles: Sequence[str], first: Message, now: datetime) -> Message:
    return Message(Kind.SUMMARY, first.alert, now, now, held=tuple(titles))


@dataclass
class _Stored:
    alert: Alert
    state: OpenAlert
    resolved_at: datetime | None = None
    note: str = ""

    def view(self) -> AlertView:
        return AlertView(
            self.alert, self.state.opened_at, self.state.raised_at, self.state.times, self.resolved_at, self.note
        )


@dataclass
class _Entry:
    id: int
    channel: str
    message: Message
    status: str = "pending"
    attempts: int = 0
    at: datetime | None = None  # of the claim, then of the delivery


@dataclass
class _ChannelState:
    paused_until: datetime | None = None
    last_sent_at: datetime | None = None
    last_error: str | None = None
    last_error_at: datetime | None = None
    failures: int = 0


class MemoryAlertStore:
    """Alerts of one process, for deployments without PostgreSQL and for tests."""

    def __init__(self) -> None:
        self._alerts: dict[str, _Stored] = {}
        self._entries: list[_Entry] = []
        self._channels: dict[str, _ChannelState] = {}
        self._lock = threading.RLock()

    def raise_alert(self, alert: Alert, now: datetime, rules: Rules, channels: Sequence[str]) -> Message | None:
        """See :meth:`AlertStore.raise_alert`."""
        with self._lock:
            stored = self._alerts.get(alert.key)
            before = stored.state if stored is not None and stored.resolved_at is None else None
            kind, state = raised(before, alert.severity, now, rules)
            self._alerts[alert.key] = _Stored(alert, state)
            if kind is Kind.UPDATED:
                return None
            message = Message(kind, alert, now, state.opened_at, state.times)
            self._queue(message, channels)
            return message

    def resolve(self, key: str, note: str, now: datetime, rules: Rules, channels: Sequence[str]) -> Message | None:
        """See :meth:`AlertStore.resolve`."""
        with self._lock:
            stored = self._alerts.get(key)
            if stored is None or stored.resolved_at is not None:
                return None
            stored.resolved_at, stored.note = now, note
            if not still_open(stored.state, now, rules):
                return None
            message = Message(Kind.RESOLVED, stored.alert, now, stored.state.opened_at, stored.state.times, note)
            self._queue(message, channels)
            return message

    def _queue(self, message: Message, channels: Sequence[str]) -> None:
        for channel in channels:
            self._entries.append(_Entry(len(self._entries) + 1, channel, message))

    def claim(self, channel: str, now: datetime, rules: Rules) -> list[Claimed]:
        """See :meth:`AlertStore.claim`."""
        with self._lock:
            state = self._channels.setdefault(channel, _ChannelState())
            if state.paused_until is not None and state.paused_until > now:
                return []
            mine = [entry for entry in self._entries if entry.channel == channel]
            for entry in mine:
                if entry.status == "sending" and entry.at is not None and now - entry.at > CLAIM_LASTS:
                    entry.status = "pending"
            sent = sum(
                entry.status in ("sent", "sending") and entry.at is not None and now - entry.at < rules.window
                for entry in mine
            )
            pending = [entry for entry in mine if entry.status == "pending"]
            held = [entry for entry in mine if entry.status == "held"]
            waiting = [Waiting(entry.id, entry.message.alert.severity, entry.message.at) for entry in pending]
            decided = plan(waiting, [entry.id for entry in held], sent, rules)
            by_id = {entry.id: entry for entry in mine}
            for number in decided.hold:
                by_id[number].status = "held"
            if decided.summarize:
                for number in decided.summarize:
                    by_id[number].status = "summarized"
                titles = [subject(by_id[number].message) for number in decided.summarize]
                entry = _Entry(
                    len(self._entries) + 1, channel, _summary(titles, by_id[decided.summarize[0]].message, now)
                )
                self._entries.append(entry)
                by_id[entry.id] = entry
            claimed = []
            for number in (*([entry.id] if decided.summarize else []), *decided.send):
                by_id[number].status, by_id[number].at = "sending", now
                by_id[number].attempts += 1
                claimed.append(Claimed(number, by_id[number].message))
            return claimed

    def delivered(self, claimed: Claimed, channel: str, now: datetime) -> None:
        """See :meth:`AlertStore.delivered`."""
        with self._lock:
            entry = self._entries[claimed.id - 1]
            entry.status, entry.at = "sent", now
            state = self._channels[channel]
            state.last_sent_at, state.failures, state.paused_until = now, 0, None

    def refused(self, claimed: Claimed, channel: str, now: datetime, error: ChannelError) -> None:
        """See :meth:`AlertStore.refused`."""
        with self._lock:
            entry = self._entries[claimed.id - 1]
            gone = error.permanent or entry.attempts >= MAX_ATTEMPTS
            entry.status = "failed" if gone else "pending"
            state = self._channels[channel]
            state.last_error, state.last_error_at = str(error), now
            if not error.permanent:
                state.failures += 1
                state.paused_until = now + _pause(state.failures, error)

    def release(self, claimed: Claimed) -> None:
        """See :meth:`AlertStore.release`."""
        with self._lock:
            entry = self._entries[claimed.id - 1]
            entry.status = "pending"
            entry.attempts -= 1

    def view(self, now: datetime, rules: Rules, *, limit: int = 50, since: timedelta = timedelta(days=7)) -> AlertsView:
        """See :meth:`AlertStore.view`."""
        with self._lock:
            stored = list(self._alerts.values())
            opened = [one.view() for one in stored if one.resolved_at is None and still_open(one.state, now, rules)]
            closed = [one.view() for one in stored if one.resolved_at is not None and now - one.resolved_at <= since]
            channels = [
                ChannelView(
                    name,
                    state.last_sent_at,
                    state.last_error,
                    state.last_error_at,
                    state.paused_until,
                    sum(entry.channel == name and entry.status == "pending" for entry in self._entries),
                    sum(entry.channel == name and entry.status == "held" for entry in self._entries),
                )
                for name, state in sorted(self._channels.items())
            ]
        return _sorted_view(opened, closed, channels, limit)


def _sorted_view(
    opened: Sequence[AlertView], closed: Sequence[AlertView], channels: Sequence[ChannelView], limit: int
) -> AlertsView:
    ranks = {severity: rank for rank, severity in enumerate(reversed(Severity))}
    by_rank = sorted(opened, key=lambda view: (ranks[view.alert.severity], -view.opened_at.timestamp()))
    by_time = sorted(closed, key=lambda view: view.resolved_at or view.raised_at, reverse=True)
    return AlertsView(tuple(by_rank[:limit]), tuple(by_time[:limit]), tuple(channels))


_SCHEMA = """
CREATE TABLE IF NOT EXISTS clinical_alerts (
    key text PRIMARY KEY,
    open boolean NOT NULL DEFAULT false,
    severity text,
    told_severity text,
    opened_at timestamptz,
    raised_at timestamptz,
    told_at timestamptz,
    resolved_at timestamptz,
    times integer NOT NULL DEFAULT 0,
    note text NOT NULL DEFAULT '',
    alert jsonb
);
CREATE INDEX IF NOT EXISTS clinical_alerts_raised ON clinical_alerts (open, raised_at);
CREATE TABLE IF NOT EXISTS clinical_alert_messages (
    id bigserial PRIMARY KEY,
    key text NOT NULL,
    channel text NOT NULL,
    kind text NOT NULL,
    severity text NOT NULL,
    created_at timestamptz NOT NULL,
    status text NOT NULL,
    attempts integer NOT NULL DEFAULT 0,
    at timestamptz,
    error text,
    message jsonb NOT NULL
);
CREATE INDEX IF NOT EXISTS clinical_alert_messages_channel ON clinical_alert_messages (channel, status, at);
CREATE TABLE IF NOT EXISTS clinical_alert_channels (
    channel text PRIMARY KEY,
    paused_until timestamptz,
    last_sent_at timestamptz,
    last_error text,
    last_error_at timestamptz,
    failures integer NOT NULL DEFAULT 0
);
"""
_TABLE_LOCK = 7_402_151_996  # any number that no other advisory lock of the database has

_prepared: set[str] = set()


class PostgresAlertStore:
    """Alerts of a deployment, in PostgreSQL; the tables are made with the first use.

    Args:
        url: of the database.
        timeout_seconds: longest wait for the connection, for a lock and for a statement.
    """

    def __init__(self, url: str, *, timeout_seconds: float = 3.0) -> None:
        self._url = url
        self._timeout = timeout_seconds

    @contextmanager
    def _transaction(self, *, prepare: bool = True) -> Iterator[extensions.cursor]:
        """Give a cursor of one transaction over a connection of its own: alerts are rare, and runs are forked."""
        import psycopg2

        milliseconds = int(self._timeout * 1000)
        database = psycopg2.connect(
            self._url,
            connect_timeout=max(2, int(self._timeout)),
            application_name="clinical-alerts",
            options=f"-c statement_timeout={milliseconds} -c lock_timeout={milliseconds}",
        )
        try:
            if prepare and self._url not in _prepared:
                with database, database.cursor() as cursor:
                    cursor.execute("SELECT pg_advisory_xact_lock(%s)", [_TABLE_LOCK])
                    cursor.execute(_SCHEMA)
                _prepared.add(self._url)
            with database, database.cursor() as cursor:
                yield cursor
        finally:
            database.close()

    def raise_alert(self, alert: Alert, now: datetime, rules: Rules, channels: Sequence[str]) -> Message | None:
        """See :meth:`AlertStore.raise_alert`; concurrent raisers of one key wait for each other's row."""
        with self._transaction() as cursor:
            cursor.execute("INSERT INTO clinical_alerts (key) VALUES (%s) ON CONFLICT DO NOTHING", [alert.key])
            before = self._locked(cursor, alert.key)
            kind, state = raised(before, alert.severity, now, rules)
            cursor.execute(
                "UPDATE clinical_alerts SET open = true, severity = %s, told_severity = %s, opened_at = %s, "
                "raised_at = %s, told_at = %s, times = %s, alert = %s, resolved_at = NULL, note = '' WHERE key = %s",
                [
                    state.severity.value, state.told_severity.value, state.opened_at, state.raised_at, state.told_at,
                    state.times, json.dumps(_alert_json(alert)), alert.key,
                ],
            )  # fmt: skip
            if kind is Kind.UPDATED:
                return None
            message = Message(kind, alert, now, state.opened_at, state.times)
            _queue(cursor, message, channels)
            return message

    def _locked(self, cursor: extensions.cursor, key: str) -> OpenAlert | None:
        # two statements: the second sees what the holder of the lock has committed meanwhile
        cursor.execute("SELECT 1 FROM clinical_alerts WHERE key = %s FOR UPDATE", [key])
        cursor.execute(
            "SELECT severity, told_severity, opened_at, raised_at, told_at, times FROM clinical_alerts "
            "WHERE key = %s AND open",
            [key],
        )
        row = cursor.fetchone()
        if row is None:
            return None
        severity, told_severity, *rest = row
        return OpenAlert(Severity(severity), Severity(told_severity), *rest)

    def resolve(self, key: str, note: str, now: datetime, rules: Rules, channels: Sequence[str]) -> Message | None:
        """See :meth:`AlertStore.resolve`."""
        with self._transaction() as cursor:
            cursor.execute(
                "UPDATE clinical_alerts SET open = false, resolved_at = %s, note = %s WHERE key = %s AND open "
                "RETURNING alert, severity, told_severity, opened_at, raised_at, told_at, times",
                [now, note, key],
            )
            row = cursor.fetchone()
            cursor.execute("DELETE FROM clinical_alerts WHERE NOT open AND resolved_at < %s", [now - KEPT_FOR])
            if row is None:
                return None
            alert = _alert(row[0])
            state = OpenAlert(Severity(row[1]), Severity(row[2]), *row[3:])
            if not still_open(state, now, rules):
                return None
            message = Message(Kind.RESOLVED, alert, now, state.opened_at, state.times, note)
            _queue(cursor, message, channels)
            return message

    def claim(self, channel: str, now: datetime, rules: Rules) -> list[Claimed]:
        """See :meth:`AlertStore.claim`; one process at a time counts and claims for a channel."""
        with self._transaction() as cursor:
            cursor.execute(
                "INSERT INTO clinical_alert_channels (channel) VALUES (%s) ON CONFLICT DO NOTHING", [channel]
            )
            cursor.execute("SELECT paused_until FROM clinical_alert_channels WHERE channel = %s FOR UPDATE", [channel])
            row = cursor.fetchone()
            if row is not None and row[0] is not None and row[0] > now:
                return []
            cursor.execute(
                "DELETE FROM clinical_alert_messages WHERE channel = %s AND created_at < %s", [channel, now - KEPT_FOR]
            )
            cursor.execute(
                "UPDATE clinical_alert_messages SET status = 'pending' "
                "WHERE channel = %s AND status = 'sending' AND at < %s",
                [channel, now - CLAIM_LASTS],
            )
            cursor.execute(
                "SELECT count(*) FROM clinical_alert_messages "
                "WHERE channel = %s AND status IN ('sent', 'sending') AND at > %s",
                [channel, now - rules.window],
            )
            (sent,) = cursor.fetchone() or (0,)
            cursor.execute(
                "SELECT id, severity, created_at, status, message FROM clinical_alert_messages "
                "WHERE channel = %s AND status IN ('pending', 'held') ORDER BY id",
                [channel],
            )
            rows = cursor.fetchall()
            messages = {row[0]: _message(row[4]) for row in rows}
            waiting = [Waiting(row[0], Severity(row[1]), row[2]) for row in rows if row[3] == "pending"]
            decided = plan(waiting, [row[0] for row in rows if row[3] == "held"], int(sent), rules)
            _mark(cursor, decided.hold, "held")
            _mark(cursor, decided.summarize, "summarized")
            claimed = []
            if decided.summarize:
                titles = [subject(messages[number]) for number in decided.summarize]
                summary = _summary(titles, messages[decided.summarize[0]], now)
                claimed.append(Claimed(_queue(cursor, summary, [channel])[0], summary))
            claimed += [Claimed(number, messages[number]) for number in decided.send]
            cursor.execute(
                "UPDATE clinical_alert_messages SET status = 'sending', at = %s, attempts = attempts + 1 "
                "WHERE id = ANY(%s)",
                [now, [one.id for one in claimed]],
            )
            return claimed

    def delivered(self, claimed: Claimed, channel: str, now: datetime) -> None:
        """See :meth:`AlertStore.delivered`."""
        with self._transaction() as cursor:
            cursor.execute(
                "UPDATE clinical_alert_messages SET status = 'sent', at = %s, error = NULL WHERE id = %s",
                [now, claimed.id],
            )
            cursor.execute(
                "UPDATE clinical_alert_channels SET last_sent_at = %s, failures = 0, paused_until = NULL "
                "WHERE channel = %s",
                [now, channel],
            )

    def refused(self, claimed: Claimed, channel: str, now: datetime, error: ChannelError) -> None:
        """See :meth:`AlertStore.refused`."""
        with self._transaction() as cursor:
            cursor.execute(
                "UPDATE clinical_alert_messages SET error = %s, "
                "status = CASE WHEN %s OR attempts >= %s THEN 'failed' ELSE 'pending' END WHERE id = %s",
                [str(error), error.permanent, MAX_ATTEMPTS, claimed.id],
            )
            cursor.execute(
                "UPDATE clinical_alert_channels SET last_error = %s, last_error_at = %s, failures = failures + %s "
                "WHERE channel = %s RETURNING failures",
                [str(error), now, 0 if error.permanent else 1, channel],
            )
            row = cursor.fetchone()
            if row is not None and not error.permanent:
                cursor.execute(
                    "UPDATE clinical_alert_channels SET paused_until = %s WHERE channel = %s",
                    [now + _pause(row[0], error), channel],
                )

    def release(self, claimed: Claimed) -> None:
        """See :meth:`AlertStore.release`."""
        with self._transaction() as cursor:
            cursor.execute(
                "UPDATE clinical_alert_messages SET status = 'pending', attempts = attempts - 1 WHERE id = %s",
                [claimed.id],
            )

    def view(self, now: datetime, rules: Rules, *, limit: int = 50, since: timedelta = timedelta(days=7)) -> AlertsView:
        """See :meth:`AlertStore.view`; makes no table, and is empty before the first alert."""
        with self._transaction(prepare=False) as cursor:
            cursor.execute("SELECT to_regclass('clinical_alert_channels') IS NOT NULL")
            row = cursor.fetchone()
            if row is None or not row[0]:
                return AlertsView()
            cursor.execute(
                "SELECT alert, opened_at, raised_at, times, resolved_at, note FROM clinical_alerts "
                "WHERE open AND (severity <> 'info' OR raised_at > %s) "
                "ORDER BY array_position(ARRAY['critical', 'error', 'warning', 'info'], severity), opened_at DESC "
                "LIMIT %s",
                [now - rules.info_lasts, limit],
            )
            opened = [AlertView(_alert(row[0]), *row[1:]) for row in cursor.fetchall()]
            cursor.execute(
                "SELECT alert, opened_at, raised_at, times, resolved_at, note FROM clinical_alerts "
                "WHERE NOT open AND resolved_at > %s ORDER BY resolved_at DESC LIMIT %s",
                [now - since, limit],
            )
            closed = [AlertView(_alert(row[0]), *row[1:]) for row in cursor.fetchall()]
            cursor.execute(
                "SELECT channel, last_sent_at, last_error, last_error_at, paused_until, "
                "(SELECT count(*) FROM clinical_alert_messages m WHERE m.channel = c.channel AND status = 'pending'), "
                "(SELECT count(*) FROM clinical_alert_messages m WHERE m.channel = c.channel AND status = 'held') "
                "FROM clinical_alert_channels c ORDER BY channel"
            )
            channels = [ChannelView(*row) for row in cursor.fetchall()]
        return _sorted_view(opened, closed, channels, limit)


def _queue(cursor: extensions.cursor, message: Message, channels: Sequence[str]) -> list[int]:
    """Store a message for each channel and return the ids."""
    ids = []
    for channel in channels:
        cursor.execute(
            "INSERT INTO clinical_alert_messages (key, channel, kind, severity, created_at, status, message) "
            "VALUES (%s, %s, %s, %s, %s, 'pending', %s) RETURNING id",
            [
                message.alert.key, channel, message.kind.value, message.alert.severity.value, message.at,
                json.dumps(_message_json(message)),
            ],
        )  # fmt: skip
        (number,) = cursor.fetchone() or (0,)
        ids.append(int(number))
    return ids


def _mark(cursor: extensions.cursor, ids: Sequence[int], status: str) -> None:
    if ids:
        cursor.execute("UPDATE clinical_alert_messages SET status = %s WHERE id = ANY(%s)", [status, list(ids)])


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)  # JSON has no word for it
    return value if value is None or isinstance(value, bool | int | float) else _clean(str(value))


def _clean(text: str) -> str:
    """Return `text` without what PostgreSQL's jsonb refuses: NUL and halves of surrogate pairs."""
    return text.replace("\x00", "").encode("utf-8", "replace").decode("utf-8")


def _alert_json(alert: Alert) -> dict[str, Any]:
    texts = {name: _clean(getattr(alert, name)) for name in ("key", "title", "what", "where", "action", "source")}
    return {
        **texts,
        "severity": alert.severity.value,
        "trial": alert.trial,
        "details": {_clean(str(name)): _plain(value) for name, value in alert.details.items()},
    }


def _alert(data: Mapping[str, Any]) -> Alert:
    return Alert(**{**data, "severity": Severity(data["severity"])})


def _message_json(message: Message) -> dict[str, Any]:
    return {
        "kind": message.kind.value, "alert": _alert_json(message.alert), "at": message.at.isoformat(),
        "opened_at": message.opened_at.isoformat(), "times": message.times, "note": message.note,
        "held": list(message.held),
    }  # fmt: skip


def _message(data: Mapping[str, Any]) -> Message:
    return Message(
        Kind(data["kind"]),
        _alert(data["alert"]),
        datetime.fromisoformat(data["at"]),
        datetime.fromisoformat(data["opened_at"]),
        data["times"],
        data["note"],
        tuple(data["held"]),
    )


@dataclass
class AlertCenter:
    """The platform's :class:`clinical_orchestration.alerts.model.Notifier`.

    Nothing here raises: an alert must not fail the run that raises it. Where the store fails, the alert goes to the log
    and, by the memory of this process, to the channels.

    Args:
        store: what is open and what waits.
        channels: ways to people; none is fine.
        rules: when people are told.
        clock: returns the present (aware).
    """

    store: AlertStore
    channels: Sequence[Channel] = ()
    rules: Rules = field(default_factory=Rules)
    clock: Callable[[], datetime] = field(default=lambda: datetime.now(UTC))
    _spare: MemoryAlertStore = field(default_factory=MemoryAlertStore)

    def send(self, alert: Alert) -> bool:
        """Open or update an alert, see :meth:`Notifier.send`."""
        clean = _alert(_alert_json(alert))
        return self._act(lambda store: store.raise_alert(clean, self.clock(), self.rules, self._names))

    def resolve(self, key: str, note: str = "") -> bool:
        """Close an alert, see :meth:`Notifier.resolve`."""
        return self._act(lambda store: store.resolve(_clean(key), _clean(note), self.clock(), self.rules, self._names))

    def deliver(self) -> int:
        """Send what waits in the channels; return how many messages they took."""
        return sum(self._deliver(self.store, channel) for channel in self.channels)

    @property
    def _names(self) -> tuple[str, ...]:
        return tuple(channel.name for channel in self.channels)

    def _act(self, decide: Callable[[AlertStore], Message | None]) -> bool:
        store: AlertStore = self.store
        try:
            message = decide(store)
        except Exception as error:
            _logger.error("the alert store does not answer (%s); the log has the alert", type(error).__name__)
            store = self._spare
            message = decide(store)
        if message is None:
            return False
        _log(message)
        for channel in self.channels:
            self._deliver(store, channel)
        return True

    def _deliver(self, store: AlertStore, channel: Channel) -> int:
        taken = 0
        try:
            claimed = store.claim(channel.name, self.clock(), self.rules)
            for number, one in enumerate(claimed):
                try:
                    channel.send(one.message)
                except ChannelError as error:
                    _logger.warning("alert channel %s: %s", channel.name, error)
                    store.refused(one, channel.name, self.clock(), error)
                    if not error.permanent:
                        # the channel rests: waiting for each of its timeouts would hold up the run that alerts
                        for other in claimed[number + 1 :]:
                            store.release(other)
                        break
                else:
                    store.delivered(one, channel.name, self.clock())
                    taken += 1
        except Exception as error:
            _logger.error("alert channel %s failed: %s", channel.name, type(error).__name__)
        return taken


def _log(message: Message) -> None:
    alert = message.alert
    if message.kind is Kind.RESOLVED:
        _logger.info("alert resolved [%s] %s %s", alert.key, alert.title, message.note)
        return
    _logger.log(
        _LEVELS[alert.severity],
        "alert %s [%s] %s: %s What to do: %s Where: %s",
        message.kind.value, alert.key, alert.title, alert.what, alert.action, alert.where,
    )  # fmt: skip


class AlertSettings(BaseSettings):
    """Addresses of the channels that come from the environment."""

    model_config = SettingsConfigDict(env_prefix="", extra="ignore", populate_by_name=True)

    smtp_url: SecretStr = Field(
        SecretStr(""), alias="CLINICAL_SMTP_URL", description="smtp://user:password@host:587?starttls=true"
    )


def build_channels(settings: ClientSettings, variables: Variables) -> list[Channel]:
    """Return the channels that are configured; a wrong setting is logged and leaves its channel out."""
    channels: list[Channel] = []
    webhook = variables.slack_webhook_url.get_secret_value().strip()
    if webhook:
        if webhook.startswith(("https://", "http://")):
            channels.append(SlackChannel(webhook, settings.airflow_url))
        else:
            _logger.error("the variable slack_webhook_url is no http(s) address; Slack is off")
    recipients = parse_recipients(variables.alert_email_recipients)
    if recipients:
        try:
            smtp = smtp_settings()
        except ValueError as error:
            _logger.error("e-mail is off: %s", error)
        else:
            if smtp is not None:
                channels.append(EmailChannel(smtp, recipients, settings.airflow_url))
            else:
                _logger.warning(
                    "the variable alert_email_recipients is set, but neither CLINICAL_SMTP_URL nor the connection "
                    "%s is; e-mail is off",
                    SMTP_CONNECTION,
                )
    return channels


def smtp_settings() -> SmtpSettings | None:
    """Return the mail server of ``CLINICAL_SMTP_URL``, else of the connection ``smtp_default``, else None.

    Raises:
        ValueError: it is not described as it should be; the message holds no secret.
    """
    url = AlertSettings().smtp_url.get_secret_value()
    if url:
        return parse_smtp_url(url)
    try:
        found = connection(SMTP_CONNECTION)
    except (ConnectionFormatError, SecretKeyError) as error:
        raise ValueError(f"the connection {SMTP_CONNECTION} cannot be read: {error}") from error
    return None if found is None else smtp_of_connection(found)


_MEMORY = MemoryAlertStore()


def build_notifier(settings: ClientSettings | None = None, variables: Variables | None = None) -> AlertCenter:
    """Return the notifier of this deployment, with the channels as the variables are now."""
    settings = settings or ClientSettings()
    url = settings.postgres_url.get_secret_value()
    store: AlertStore = PostgresAlertStore(url) if url else _MEMORY
    return AlertCenter(store, build_channels(settings, variables or Variables()))
