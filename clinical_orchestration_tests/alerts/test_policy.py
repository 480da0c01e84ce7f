"""When people are told."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clinical_orchestration.alerts.model import Severity
from clinical_orchestration.alerts.policy import Kind, OpenAlert, Rules, Waiting, decide, plan, raised, still_open

NOW = datetime(2025, 3, 1, 12, tzinfo=UTC)
RULES = Rules()
HOUR = timedelta(hours=1)


def test_a_new_condition_is_told_and_its_repetition_is_not() -> None:
    kind, state = raised(None, Severity.WARNING, NOW, RULES)
    assert kind is Kind.OPENED
    again, state = raised(state, Severity.WARNING, NOW + HOUR, RULES)
    assert again is Kind.UPDATED
    assert (state.opened_at, state.raised_at, state.told_at, state.times) == (NOW, NOW + HOUR, NOW, 2)


def test_a_higher_severity_is_told_once_even_when_it_goes_up_and_down() -> None:
    _, state = raised(None, Severity.WARNING, NOW, RULES)
    kinds = []
    for severity in (Severity.ERROR, Severity.WARNING, Severity.ERROR, Severity.CRITICAL):
        kind, state = raised(state, severity, NOW + HOUR, RULES)
        kinds.append(kind)
    assert kinds == [Kind.ESCALATED, Kind.UPDATED, Kind.UPDATED, Kind.ESCALATED]


def test_what_lasts_is_told_again_after_the_reminder_interval() -> None:
    _, state = raised(None, Severity.ERROR, NOW, RULES)
    kinds = []
    for hours in range(1, 50):
        kind, state = raised(state, Severity.ERROR, NOW + hours * HOUR, RULES)
        kinds.append(kind)
    assert [hours for hours, kind in enumerate(kinds, start=1) if kind is Kind.REMINDER] == [24, 48]


def test_news_are_told_once_and_grow_old_by_themselves() -> None:
    _, state = raised(None, Severity.INFO, NOW, RULES)
    assert still_open(state, NOW + 23 * HOUR, RULES)
    assert not still_open(state, NOW + 24 * HOUR, RULES)
    assert decide(state, Severity.INFO, NOW + 23 * HOUR, RULES) is Kind.UPDATED
    assert decide(state, Severity.INFO, NOW + 25 * HOUR, RULES) is Kind.OPENED


@given(
    st.lists(
        st.tuples(st.sampled_from(list(Severity)), st.integers(0, 48 * 60)),
        min_size=1,
        max_size=30,
    )
)
def test_between_two_messages_of_a_key_it_got_worse_or_the_interval_passed(events: list[tuple[Severity, int]]) -> None:
    order = list(Severity)
    state: OpenAlert | None = None
    now = NOW
    last: tuple[datetime, Severity] | None = None
    for severity, minutes in events:
        now += timedelta(minutes=minutes)
        kind, state = raised(state, severity, now, RULES)
        if kind is not Kind.UPDATED:
            if last is not None:
                assert now - last[0] >= RULES.remind_after or order.index(severity) > order.index(last[1])
            last = (now, severity)


def waiting(count: int, severity: Severity = Severity.WARNING, start: int = 1) -> list[Waiting]:
    return [Waiting(start + number, severity, NOW + timedelta(seconds=number)) for number in range(count)]


def test_a_flood_is_cut_at_the_limit_and_summarized_when_there_is_room_again() -> None:
    first = plan(waiting(50), [], 0, RULES)
    assert (len(first.send), len(first.hold), first.summarize) == (20, 30, ())
    full = plan(waiting(1, start=99), first.hold, 20, RULES)
    assert full.send == ()
    assert full.hold == (99,)
    assert full.summarize == ()
    later = plan(waiting(1, start=99), first.hold, 0, RULES)
    assert later.summarize == first.hold
    assert later.send == (99,)


def test_an_emergency_gets_through_a_flood() -> None:
    decided = plan([*waiting(5), *waiting(1, Severity.CRITICAL, start=100)], [], 20, RULES)
    assert decided.send == (100,)
    assert len(decided.hold) == 5
    assert plan(waiting(1, Severity.CRITICAL), [], 30, RULES).send == ()


@given(
    st.lists(st.sampled_from(list(Severity)), max_size=60), st.integers(0, 10), st.integers(0, 40),
)  # fmt: skip
def test_a_plan_loses_nothing_and_keeps_the_limits(severities: list[Severity], held: int, sent: int) -> None:
    messages = [Waiting(number, severity, NOW) for number, severity in enumerate(severities)]
    decided = plan(messages, list(range(1000, 1000 + held)), sent, RULES)
    assert sorted([*decided.send, *decided.hold]) == [message.id for message in messages]
    assert decided.summarize in ((), tuple(range(1000, 1000 + held)))
    total = sent + len(decided.send) + bool(decided.summarize)
    assert total <= max(sent, RULES.per_window + RULES.critical_extra)
    ordinary = [number for number in decided.send if severities[number] is not Severity.CRITICAL]
    if ordinary:
        assert sent + len(ordinary) <= RULES.per_window


@pytest.mark.parametrize("count", [0, 1])
def test_without_anything_held_there_is_no_summary(count: int) -> None:
    assert plan(waiting(count), [], 0, RULES).summarize == ()
