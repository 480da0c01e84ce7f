"""The notifier with its memory; the same suite on the memory of a process and on PostgreSQL."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from clinical_orchestration.alerts.model import Severity
from clinical_orchestration.alerts.policy import Kind, Rules
from clinical_orchestration.alerts.templates import Message
from clinical_orchestration.stores import alerts as module
from clinical_orchestration.stores.alert_channels import ChannelError
from clinical_orchestration.stores.alerts import (
    AlertCenter,
    AlertStore,
    MemoryAlertStore,
    PostgresAlertStore,
    build_notifier,
)
from clinical_orchestration_tests.alerts.test_messages import ALERT

RULES = Rules()


class Recorder:
    """A channel that keeps what it gets, or fails as told."""

    name = "recorder"

    def __init__(self) -> None:
        self.messages: list[Message] = []
        self.errors: list[ChannelError] = []
        self.attempts = 0

    def send(self, message: Message) -> None:
        self.attempts += 1
        if self.errors:
            raise self.errors.pop(0)
        self.messages.append(message)

    @property
    def kinds(self) -> list[Kind]:
        return [message.kind for message in self.messages]


class Clock:
    def __init__(self) -> None:
        self.now = datetime(2025, 3, 1, 12, tzinfo=UTC)

    def __call__(self) -> datetime:
        return self.now

    def forward(self, **amount: float) -> None:
        self.now += timedelta(**amount)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture(params=["memory", pytest.param("postgres", marks=pytest.mark.integration)])
def store(request: pytest.FixtureRequest) -> Iterator[AlertStore]:
    if request.param == "memory":
        yield MemoryAlertStore()
        return
    import psycopg2

    url = request.getfixturevalue("postgres_env")["POSTGRES_URL"]
    fresh = PostgresAlertStore(url)
    fresh.view(datetime.now(UTC), RULES)  # works before there is a table
    yield fresh
    connection = psycopg2.connect(url)
    with connection, connection.cursor() as cursor:
        cursor.execute("DROP TABLE IF EXISTS clinical_alerts, clinical_alert_messages, clinical_alert_channels")
    connection.close()
    module._prepared.clear()


def center(store: AlertStore, clock: Callable[[], datetime], *channels: Recorder) -> AlertCenter:
    return AlertCenter(store, channels, clock=clock)


def test_one_condition_gives_one_message_then_a_reminder_and_its_end(store: AlertStore, clock: Clock) -> None:
    channel = Recorder()
    notifier = center(store, clock, channel)
    assert notifier.send(ALERT)
    for _ in range(5):
        clock.forward(hours=1)
        assert not notifier.send(ALERT)
    clock.forward(hours=20)
    assert notifier.send(ALERT)
    assert notifier.resolve(ALERT.key, "all stable")
    assert not notifier.resolve(ALERT.key)
    assert channel.kinds == [Kind.OPENED, Kind.REMINDER, Kind.RESOLVED]
    assert channel.messages[-1].note == "all stable"
    assert channel.messages[-1].times == 7
    assert notifier.send(ALERT)
    assert channel.kinds[-1] is Kind.OPENED


def test_a_worse_state_is_told_at_once(store: AlertStore, clock: Clock) -> None:
    channel = Recorder()
    notifier = center(store, clock, channel)
    notifier.send(ALERT)
    assert notifier.send(replace(ALERT, severity=Severity.CRITICAL, what="worse"))
    assert channel.kinds == [Kind.OPENED, Kind.ESCALATED]
    assert channel.messages[-1].alert.what == "worse"


def test_resolving_what_was_never_raised_says_nothing(store: AlertStore, clock: Clock) -> None:
    channel = Recorder()
    assert not center(store, clock, channel).resolve("nothing")
    assert channel.messages == []


def test_a_flood_is_held_back_and_told_in_one_summary(store: AlertStore, clock: Clock) -> None:
    channel = Recorder()
    notifier = center(store, clock, channel)
    for number in range(50):
        notifier.send(replace(ALERT, key=f"k{number}"))
        clock.forward(seconds=1)
    assert channel.kinds == [Kind.OPENED] * 20
    clock.forward(minutes=58)
    assert notifier.deliver() == 0
    clock.forward(minutes=2)
    assert notifier.deliver() == 1
    assert channel.kinds[-1] is Kind.SUMMARY
    assert len(channel.messages[-1].held) == 30
    assert notifier.deliver() == 0


def test_what_a_channel_did_not_take_is_sent_when_it_answers_again(store: AlertStore, clock: Clock) -> None:
    channel = Recorder()
    notifier = center(store, clock, channel)
    channel.errors = [ChannelError("down"), ChannelError("down")]
    assert notifier.send(ALERT)
    assert notifier.deliver() == 0  # it rests a minute
    assert channel.attempts == 1
    (shown,) = store.view(clock.now, RULES).channels
    assert (shown.failing, shown.last_error, shown.waiting) == (True, "down", 1)
    clock.forward(minutes=1)
    assert notifier.deliver() == 0
    clock.forward(minutes=1)
    assert notifier.deliver() == 0, "the second pause is longer"
    clock.forward(minutes=1)
    assert notifier.deliver() == 1
    (shown,) = store.view(clock.now, RULES).channels
    assert (shown.failing, shown.waiting) == (False, 0)
    assert channel.kinds == [Kind.OPENED]


def test_a_channel_rests_as_long_as_it_asks(store: AlertStore, clock: Clock) -> None:
    channel = Recorder()
    notifier = center(store, clock, channel)
    channel.errors = [ChannelError("wait", retry_after=timedelta(minutes=10))]
    notifier.send(ALERT)
    notifier.send(replace(ALERT, key="other"))
    clock.forward(minutes=9)
    assert notifier.deliver() == 0
    assert channel.attempts == 1
    clock.forward(minutes=2)
    assert notifier.deliver() == 2


def test_a_message_that_is_refused_for_good_stops_nothing_else(store: AlertStore, clock: Clock) -> None:
    channel = Recorder()
    notifier = center(store, clock, channel)
    channel.errors = [ChannelError("malformed", permanent=True)]
    notifier.send(ALERT)
    notifier.send(replace(ALERT, key="other"))
    assert [message.alert.key for message in channel.messages] == ["other"]
    assert channel.attempts == 2


def test_a_message_of_a_sender_that_died_is_sent_by_the_next(store: AlertStore, clock: Clock) -> None:
    channel = Recorder()
    store.raise_alert(ALERT, clock.now, RULES, ["recorder"])
    assert len(store.claim("recorder", clock.now, RULES)) == 1  # and dies here
    notifier = center(store, clock, channel)
    assert notifier.deliver() == 0
    clock.forward(minutes=3)
    assert notifier.deliver() == 1
    assert channel.kinds == [Kind.OPENED]


def test_many_raisers_of_one_condition_send_one_message(store: AlertStore, clock: Clock) -> None:
    channel = Recorder()
    start = threading.Barrier(8)
    sent: list[bool] = []

    def raise_it() -> None:
        notifier = center(store, clock, channel)
        start.wait()
        sent.append(notifier.send(ALERT))

    threads = [threading.Thread(target=raise_it) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(sent) == [False] * 7 + [True]
    assert channel.kinds == [Kind.OPENED]
    (view,) = store.view(clock.now, RULES).open
    assert view.times == 8


def test_the_view_has_the_worst_first_and_what_was_resolved(store: AlertStore, clock: Clock) -> None:
    notifier = center(store, clock)
    notifier.send(replace(ALERT, key="w"))
    clock.forward(minutes=1)
    notifier.send(replace(ALERT, key="c", severity=Severity.CRITICAL))
    notifier.send(replace(ALERT, key="i", severity=Severity.INFO))
    notifier.send(replace(ALERT, key="gone"))
    notifier.resolve("gone", "cured")
    view = store.view(clock.now, RULES)
    assert [shown.alert.key for shown in view.open] == ["c", "w", "i"]
    assert [(shown.alert.key, shown.note) for shown in view.resolved] == [("gone", "cured")]
    assert view.open[1].alert == replace(ALERT, key="w")
    clock.forward(days=2)
    assert [shown.alert.key for shown in store.view(clock.now, RULES).open] == ["c", "w"]
    clock.forward(days=6)
    assert store.view(clock.now, RULES).resolved == ()


def test_texts_and_figures_of_any_kind_can_be_stored(store: AlertStore, clock: Clock) -> None:
    channel = Recorder()
    odd = replace(ALERT, what="nul \x00 half \ud800 end", details={"nan": float("nan"), "time": clock.now, "list": [1]})
    notifier = center(store, clock, channel)
    assert notifier.send(odd)
    (view,) = store.view(clock.now, RULES).open
    json.dumps(view.as_dict(), allow_nan=False).encode()
    assert notifier.resolve(odd.key, "note \x00")
    assert channel.kinds == [Kind.OPENED, Kind.RESOLVED]


def test_without_a_channel_the_log_has_the_alert(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    notifier = center(MemoryAlertStore(), clock)
    notifier.send(ALERT)
    notifier.resolve(ALERT.key, "all stable")
    levels = [record.levelname for record in caplog.records]
    assert levels == ["WARNING", "INFO"]
    assert ALERT.what in caplog.text


class Broken:
    """A channel with a programming error."""

    name = "broken"

    def send(self, message: Message) -> None:
        raise RuntimeError("hush-hush")


def test_a_broken_channel_never_fails_who_alerts(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    channel = Recorder()
    notifier = AlertCenter(MemoryAlertStore(), [Broken(), channel], clock=clock)
    assert notifier.send(ALERT)
    assert channel.kinds == [Kind.OPENED]
    assert "alert channel broken failed: RuntimeError" in caplog.text
    assert "hush-hush" not in caplog.text


def test_without_its_database_the_alert_still_goes_out(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    channel = Recorder()
    url = "postgresql://user:hush-hush@127.0.0.1:9/none"
    notifier = AlertCenter(PostgresAlertStore(url), [channel], clock=clock)
    assert notifier.send(ALERT)
    assert not notifier.send(ALERT)
    assert channel.kinds == [Kind.OPENED]
    assert "the alert store does not answer" in caplog.text
    assert "hush-hush" not in caplog.text


def test_the_notifier_of_a_deployment_without_database_keeps_its_state_in_the_process() -> None:
    key = "test_center:memory"
    assert build_notifier().send(replace(ALERT, key=key))
    assert not build_notifier().send(replace(ALERT, key=key))
    assert build_notifier().resolve(key)
