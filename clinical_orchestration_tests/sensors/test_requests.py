"""From a decision to at most one run."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import dagster as dg
import pytest
from dagster._core.storage.tags import RUN_KEY_TAG, SENSOR_NAME_TAG
from dagster._core.test_utils import create_run_for_test

from clinical_orchestration.defs.sensors.decisions import Ask, Decision, Wait
from clinical_orchestration.defs.sensors.requests import (
    POSITION_TAG,
    REASON_TAG,
    Cursor,
    HangingError,
    Patience,
    ask_for_run,
)
from clinical_orchestration.stores.online import OnlineStoreError

NAME = "some_sensor"
JOB = "clinical_data_pipeline"


@pytest.fixture
def instance() -> Iterator[dg.DagsterInstance]:
    with dg.DagsterInstance.ephemeral() as ephemeral:
        yield ephemeral


def evaluate(
    instance: dg.DagsterInstance, cursor: str | None, decide: Callable[[Cursor], Decision], patience: float = 5.0
) -> dg.SensorResult:
    context = dg.build_sensor_context(instance=instance, cursor=cursor, sensor_name=NAME)
    return ask_for_run(context, JOB, decide, patience=Patience(patience))


def reason(result: dg.SensorResult) -> str:
    assert not result.run_requests
    assert result.skip_reason is not None
    return str(result.skip_reason.skip_message)


def store(
    instance: dg.DagsterInstance, result: dg.SensorResult, status: dg.DagsterRunStatus = dg.DagsterRunStatus.STARTING
) -> dg.DagsterRun:
    """Store the run of a result, as the daemon does."""
    (request,) = result.run_requests or []
    tags = {**request.tags, RUN_KEY_TAG: str(request.run_key), SENSOR_NAME_TAG: NAME}
    return create_run_for_test(
        instance, job_name=JOB, status=status, tags=tags, run_config=dict(request.run_config or {})
    )


def upto(count: int) -> Callable[[Cursor], Decision]:
    def decide(cursor: Cursor) -> Decision:
        done = cursor.position.get("count", 0)
        return Ask(f"{done} to {count}", {"count": count}, trial="simulated") if count > done else Wait("nothing new")

    return decide


def begun(instance: dg.DagsterInstance) -> str:
    first = evaluate(instance, None, upto(9))
    assert "first evaluation" in reason(first)
    assert first.cursor is not None
    return first.cursor


def test_a_run_carries_trial_reason_and_position(instance: dg.DagsterInstance) -> None:
    result = evaluate(instance, begun(instance), upto(3))
    (request,) = result.run_requests or []
    assert request.run_config == {
        "resources": {"pipeline": {"config": {"trial": "simulated", "conf": {"reason": "0 to 3"}}}}
    }
    assert request.tags[REASON_TAG] == "0 to 3"
    assert json.loads(request.tags[POSITION_TAG]) == {"count": 3}
    assert Cursor.loads(result.cursor).position == {"count": 3}  # type: ignore[union-attr]


def test_repeating_an_evaluation_with_the_old_cursor_asks_with_the_same_key(instance: dg.DagsterInstance) -> None:
    cursor = begun(instance)
    first, again = evaluate(instance, cursor, upto(3)), evaluate(instance, cursor, upto(7))
    assert (first.run_requests or [])[0].run_key == (again.run_requests or [])[0].run_key


def test_after_a_crash_that_lost_the_cursor_the_event_starts_no_second_run(instance: dg.DagsterInstance) -> None:
    cursor = begun(instance)
    run = store(instance, evaluate(instance, cursor, upto(3)))
    # the daemon died here: the run is stored, the cursor is the old one, and the world has moved on to 7
    waiting = evaluate(instance, cursor, upto(7))
    assert "is running or waiting already" in reason(waiting)
    assert Cursor.loads(waiting.cursor).position == {"count": 3}  # type: ignore[union-attr]
    instance.report_run_canceled(run)
    following = evaluate(instance, cursor, upto(7))
    (request,) = following.run_requests or []
    assert request.tags[REASON_TAG] == "3 to 7", "events 0 to 3 are those of the stored run"
    assert request.run_key != run.tags[RUN_KEY_TAG]


def test_a_cursor_that_is_two_events_behind_catches_up_with_both(instance: dg.DagsterInstance) -> None:
    cursor = begun(instance)
    first = store(instance, evaluate(instance, cursor, upto(3)))
    instance.report_run_canceled(first)
    second = store(instance, evaluate(instance, cursor, upto(5)))
    instance.report_run_canceled(second)
    (request,) = evaluate(instance, cursor, upto(7)).run_requests or []
    assert request.tags[REASON_TAG] == "5 to 7"
    assert request.run_key not in (first.tags[RUN_KEY_TAG], second.tags[RUN_KEY_TAG])


def test_a_run_that_was_stored_and_not_launched_is_asked_for_again(instance: dg.DagsterInstance) -> None:
    cursor = begun(instance)
    run = store(instance, evaluate(instance, cursor, upto(3)), dg.DagsterRunStatus.NOT_STARTED)
    again = evaluate(instance, cursor, upto(7))
    (request,) = again.run_requests or []
    assert request.run_key == run.tags[RUN_KEY_TAG]
    assert dict(request.run_config or {}) == dict(run.run_config)
    assert Cursor.loads(again.cursor).position == {"count": 3}  # type: ignore[union-attr]


@pytest.mark.parametrize("status", [dg.DagsterRunStatus.STARTING, dg.DagsterRunStatus.STARTED])
def test_runs_do_not_pile_up(instance: dg.DagsterInstance, status: dg.DagsterRunStatus) -> None:
    cursor = begun(instance)
    create_run_for_test(instance, job_name=JOB, status=status)
    result = evaluate(instance, cursor, upto(3))
    assert reason(result) == f"{JOB} is running or waiting already"
    assert result.cursor == cursor, "the events stay news"


def test_a_run_of_another_job_is_no_obstacle(instance: dg.DagsterInstance) -> None:
    create_run_for_test(instance, job_name="other", status=dg.DagsterRunStatus.STARTED)
    assert evaluate(instance, begun(instance), upto(3)).run_requests


@pytest.mark.parametrize("cursor", ["", "5", "{}", "not json", '{"epoch": 1, "number": "x"}'])
def test_a_cursor_that_cannot_be_read_begins_anew(instance: dg.DagsterInstance, cursor: str) -> None:
    assert "first evaluation" in reason(evaluate(instance, cursor, upto(3)))


def test_a_new_epoch_does_not_meet_the_keys_of_the_old_one(instance: dg.DagsterInstance) -> None:
    first = evaluate(instance, begun(instance), upto(3))
    store(instance, first, dg.DagsterRunStatus.SUCCESS)
    again = evaluate(instance, begun(instance), upto(3))  # the cursor was reset by hand
    assert again.run_requests
    assert (again.run_requests or [])[0].run_key != (first.run_requests or [])[0].run_key


def test_an_absent_service_is_named_and_foreign_errors_say_only_their_kind(instance: dg.DagsterInstance) -> None:
    def ours(_: Cursor) -> Decision:
        raise OnlineStoreError("the online feature store at 127.0.0.1:9 does not answer")

    def foreign(_: Cursor) -> Decision:
        raise OSError("connecting to redis://:hush-hush@host failed")

    cursor = begun(instance)
    assert "the online feature store at 127.0.0.1:9 does not answer" in reason(evaluate(instance, cursor, ours))
    assert reason(evaluate(instance, cursor, foreign)) == "not decided: a service failed with OSError"


def test_a_hanging_service_ends_the_evaluation_in_time(instance: dg.DagsterInstance) -> None:
    release = threading.Event()

    def hang(_: Cursor) -> Decision:
        release.wait(30)
        return Wait("late")

    cursor = begun(instance)
    began = time.monotonic()
    assert "no answer within 0.2 s (a service)" in reason(evaluate(instance, cursor, hang, patience=0.2))
    assert time.monotonic() - began < 2
    release.set()


def test_a_service_that_hangs_holds_one_thread_only() -> None:
    release = threading.Event()
    patience = Patience(0.1)
    calls: list[int] = []

    def hang() -> None:
        calls.append(1)
        release.wait(30)

    for _ in range(3):
        with pytest.raises(HangingError):
            patience(hang)
    assert len(calls) == 1
    release.set()
    deadline = time.monotonic() + 5
    answer: Any = None
    while answer is None and time.monotonic() < deadline:
        try:
            answer = patience(lambda: "fine")
        except HangingError:
            time.sleep(0.01)
    assert answer == "fine"
