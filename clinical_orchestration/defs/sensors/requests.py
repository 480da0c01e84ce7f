"""How a sensor's decision becomes at most one run, also when the daemon is killed in between.

Dagster stores a sensor's cursor after its runs. A daemon that dies between the two evaluates again with the old cursor,
while the world has moved on. The run key is therefore made from the old cursor alone (its epoch and number), never from
what is observed: whatever is decided the second time has the same key, and Dagster starts no second run for it. The run
carries, as a tag, the position that holds once it is stored; from there the second evaluation goes on.

An epoch begins with the first evaluation of a fresh cursor, which starts nothing. A cursor that somebody resets in the
UI thereby begins a new epoch, and what is there is looked at as new.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any, TypeVar

import dagster as dg
from dagster._core.storage.tags import RUN_KEY_TAG, SENSOR_NAME_TAG

from clinical_orchestration.defs.sensors.decisions import Ask, Decision, Position

POSITION_TAG = "clinical/position"
REASON_TAG = "clinical/reason"
LIMIT_SECONDS = 20.0
"""Longest time that a sensor waits for a service; Dagster ends an evaluation after 60 s."""

ACTIVE = (
    dg.DagsterRunStatus.QUEUED,
    dg.DagsterRunStatus.NOT_STARTED,
    dg.DagsterRunStatus.STARTING,
    dg.DagsterRunStatus.STARTED,
    dg.DagsterRunStatus.CANCELING,
)

_T = TypeVar("_T")


@dataclass(frozen=True)
class Cursor:
    """What a sensor remembers.

    Attributes:
        epoch: when the cursor was made (ISO 8601).
        number: events of this epoch that started a run.
        position: up to where events started runs.
        memory: what the evaluation before saw; no part of any event.
    """

    epoch: str
    number: int = 0
    position: Position = field(default_factory=dict)
    memory: Position = field(default_factory=dict)

    def dumps(self) -> str:
        """Return the text that Dagster stores."""
        return json.dumps(
            {"epoch": self.epoch, "number": self.number, "position": self.position, "memory": self.memory},
            sort_keys=True,
        )

    @classmethod
    def loads(cls, text: str | None) -> Cursor | None:
        """Read a stored text; None for none, and for one that cannot be read."""
        if not text:
            return None
        try:
            data = json.loads(text)
            return cls(str(data["epoch"]), int(data["number"]), dict(data["position"]), dict(data["memory"]))
        except (ValueError, TypeError, KeyError):
            return None

    def run_key(self, sensor: str) -> str:
        """Return the key of the next event's run."""
        return f"{sensor}:{self.epoch}:{self.number}"

    def after(self, position: Position) -> Cursor:
        """Return the cursor once the run of the next event is stored."""
        return replace(self, number=self.number + 1, position=position)


class HangingError(RuntimeError):
    """A service did not answer in time."""


class Patience:
    """Runs a blocking function for a limited time; while one call hangs, no other is begun.

    The thread of a call that hangs is a daemon and ends with its call. One such object a sensor keeps a dead service
    from holding more than one thread.
    """

    def __init__(self, limit_seconds: float = LIMIT_SECONDS) -> None:
        self._limit = limit_seconds
        self._busy = threading.Lock()

    def __call__(self, function: Callable[[], _T]) -> _T:
        """Return the function's answer.

        Raises:
            HangingError: there is none within the limit, or the call before still hangs.
            Exception: what the function raises.
        """
        if not self._busy.acquire(blocking=False):
            raise HangingError("the question before still has no answer")
        answers: list[_T] = []
        errors: list[BaseException] = []

        def work() -> None:
            try:
                answers.append(function())
            except BaseException as error:
                errors.append(error)
            finally:
                self._busy.release()

        thread = threading.Thread(target=work, daemon=True, name="sensor")
        thread.start()
        thread.join(self._limit)
        if thread.is_alive():
            raise HangingError(f"no answer within {self._limit:g} s")
        if errors:
            raise errors[0]
        return answers[0]


def ask_for_run(
    context: dg.SensorEvaluationContext,
    job_name: str,
    decide: Callable[[Cursor], Decision],
    *,
    patience: Patience,
    services: str = "a service",
    now: datetime | None = None,
) -> dg.SensorResult:
    """Evaluate a sensor of a job.

    Args:
        context: of the evaluation.
        job_name: the job that the sensor starts.
        decide: observes and decides, for the cursor that it is given; blocking, limited by `patience`.
        patience: the sensor's own.
        services: what `decide` asks, for the reason when it does not answer.
        now: the wall clock.

    Returns:
        One run, or none with a reason that people can read.
    """
    cursor = Cursor.loads(context.cursor)
    if cursor is None:
        fresh = Cursor((now or datetime.now(UTC)).isoformat())
        return _quiet(fresh, "first evaluation: from now on")
    name = context.sensor_name
    # several events may have started runs since the cursor was stored
    while (run := _stored_run(context.instance, cursor.run_key(name), name)) is not None:
        position = _position(run, cursor)
        if run.status is dg.DagsterRunStatus.NOT_STARTED:
            # the daemon died between storing the run and launching it: Dagster launches it when it is asked for again
            request = dg.RunRequest(
                run_key=cursor.run_key(name), run_config=dict(run.run_config), tags=_own_tags(run.tags)
            )
            return dg.SensorResult(run_requests=[request], cursor=cursor.after(position).dumps())
        cursor = cursor.after(position)
    active = context.instance.get_runs(dg.RunsFilter(job_name=job_name, statuses=list(ACTIVE)), limit=1)
    if active:
        return _quiet(cursor, f"{job_name} is running or waiting already")
    before = cursor
    try:
        decision = patience(lambda: decide(before))
    except Exception as error:
        return _quiet(cursor, f"not decided: {describe(error, services)}")
    if decision.memory is not None:
        cursor = replace(cursor, memory=decision.memory)
    if not isinstance(decision, Ask):
        if decision.position is not None:
            cursor = replace(cursor, position=decision.position)
        return _quiet(cursor, decision.reason)
    request = dg.RunRequest(
        run_key=cursor.run_key(name),
        run_config=run_config(decision),
        tags={REASON_TAG: decision.reason[:500], POSITION_TAG: json.dumps(decision.position, sort_keys=True)},
    )
    return dg.SensorResult(run_requests=[request], cursor=cursor.after(decision.position).dumps())


def _stored_run(instance: dg.DagsterInstance, run_key: str, sensor: str) -> dg.DagsterRun | None:
    runs = instance.get_runs(dg.RunsFilter(tags={RUN_KEY_TAG: run_key, SENSOR_NAME_TAG: sensor}), limit=1)
    return runs[0] if runs else None


def describe(error: Exception, services: str) -> str:
    """Return what a sensor says about services that fail: our own errors in full, of others the kind only.

    Errors of drivers may hold addresses with passwords.
    """
    if isinstance(error, HangingError):
        return f"{error} ({services})"
    own = type(error).__module__.startswith("clinical_orchestration.")
    if own and str(error):
        return str(error).splitlines()[0][:300]
    return f"{services} failed with {type(error).__name__}"


def run_config(ask: Ask) -> dict[str, Any]:
    """Return the run's configuration: trial, source and free-form settings for the resource `pipeline`."""
    given = {"trial": ask.trial, "source": ask.source, "conf": {"reason": ask.reason, **ask.conf}}
    return {"resources": {"pipeline": {"config": {name: value for name, value in given.items() if value}}}}


def _quiet(cursor: Cursor, reason: str) -> dg.SensorResult:
    return dg.SensorResult(skip_reason=dg.SkipReason(reason), cursor=cursor.dumps())


def _position(run: dg.DagsterRun, cursor: Cursor) -> Position:
    try:
        position = json.loads(run.tags.get(POSITION_TAG, ""))
    except ValueError:
        return cursor.position
    return position if isinstance(position, dict) else cursor.position


def _own_tags(tags: dict[str, str] | Any) -> dict[str, str]:
    return {name: value for name, value in dict(tags).items() if name in (POSITION_TAG, REASON_TAG)}
