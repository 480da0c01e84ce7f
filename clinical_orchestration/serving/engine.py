"""From instances to probabilities: two threads that work on whatever waits, all of it at once.

Nothing waits for a batch to fill. While one round of work is being done, requests gather; the next round takes them
together: one Redis pipeline for all their patients, one model call for all their rows, one write to the prediction
log. So a lone request is answered at once, and many at a time cost little more than one. Redis has a thread of its
own, so that requests which bring their features do not wait for a Redis that is out.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, Protocol

import orjson

from clinical_orchestration.serving import errors
from clinical_orchestration.serving.errors import Problem
from clinical_orchestration.serving.ports import FeatureReader
from clinical_orchestration.stores.online import OnlineFeatures, OnlineStoreError

if TYPE_CHECKING:
    from clinical_orchestration.serving.champions import ChampionManager, ServedModel
    from clinical_orchestration.trials import TrialProfile

_logger = logging.getLogger(__name__)

MAX_WAITING = 10_000  # instances; beyond it requests are refused, so that answers stay timely
_ROUND = 256  # instances in one model call: large enough to be cheap, small enough for the next request to get its turn
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)


class Observer(Protocol):
    """Told what happens, for the metrics. Never given an identifier."""

    def predicted(self, trial: str, risk_band: str, stale: bool) -> None:
        """One prediction was made."""
        ...

    def refused(self, reason: str) -> None:
        """One instance got an error instead."""
        ...

    def round_done(self, rows: int, seconds: float) -> None:
        """The model was called once."""
        ...

    def asked(self, trial: str, version: str, answers: int, failures: int, seconds: float) -> None:
        """A model version was called: it answered some instances and failed on others."""
        ...


class Recorder(Protocol):
    """Takes the rows of the prediction log; never raises and never waits for a remote system."""

    def record(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Keep these rows."""
        ...


class Instance:
    """One thing to predict for, and then its result.

    Attributes:
        patient_id: whose online features to use; None where `features` are given.
        features: values by name.
        trial: as the caller says; None for the patient's own, or the default.
        feature_time: when the features hold; None where unknown.
        result: the answer as a dict, or a problem; None while at work.
    """

    __slots__ = ("_job", "feature_set", "feature_time", "features", "patient_id", "result", "trial")

    def __init__(
        self,
        patient_id: str | None = None,
        features: Mapping[str, float | None] | None = None,
        trial: str | None = None,
        feature_time: datetime | None = None,
    ) -> None:
        self.patient_id = patient_id
        self.features = features
        self.trial = trial
        self.feature_time = feature_time
        self.feature_set: str | None = None
        self.result: dict[str, Any] | Problem | None = None
        self._job: _Job | None = None


class _Job:
    __slots__ = ("done", "left")

    def __init__(self, done: Callable[[], None], left: int) -> None:
        self.done = done
        self.left = left


@dataclass(frozen=True)
class OnlineState:
    """Whether the online store answers; `error` says why not."""

    up: bool | None
    error: str | None = None


class Engine:
    """Predicts.

    Args:
        champions: the loaded models.
        features: the online store; built on first use in the background.
        profiles: the trials by name.
        default_trial: used where neither the patient nor the caller says.
        log: takes a row for every prediction, before it is answered.
        observer: for the metrics.
        clock: the present, aware.
    """

    def __init__(
        self,
        champions: ChampionManager,
        features: Callable[[], FeatureReader],
        profiles: Mapping[str, TrialProfile],
        default_trial: str,
        log: Recorder,
        observer: Observer,
        *,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
        ping_seconds: float = 2.0,
    ) -> None:
        self._champions = champions
        self._make_reader = features
        self._reader: FeatureReader | None = None
        self._profiles = dict(profiles)
        self._default_trial = default_trial
        self._log = log
        self._observer = observer
        self._clock = clock
        self._ping_seconds = ping_seconds
        self._to_read: queue.SimpleQueue[Instance | None] = queue.SimpleQueue()
        self._to_score: queue.SimpleQueue[Instance | None] = queue.SimpleQueue()
        self._waiting = 0
        self._waiting_mutex = threading.Lock()
        self._online = OnlineState(None)
        self._closed_until = 0.0  # monotonic; while the store is known to be out, no request waits for it
        self._threads: list[threading.Thread] = []

    @property
    def online(self) -> OnlineState:
        """What is known about the online store."""
        return self._online

    @property
    def waiting(self) -> int:
        """Instances that have no result yet."""
        return self._waiting

    def start(self) -> None:
        """Start the threads."""
        for target, name in ((self._read_forever, "online-features"), (self._score_forever, "scoring")):
            thread = threading.Thread(target=target, name=name, daemon=True)
            thread.start()
            self._threads.append(thread)

    def close(self) -> None:
        """Finish what waits, then stop."""
        self._to_read.put(None)
        if self._threads:
            self._threads[0].join(10.0)
        self._to_score.put(None)
        if self._threads:
            self._threads[1].join(10.0)

    def submit(self, instances: Sequence[Instance], done: Callable[[], None]) -> Problem | None:
        """Take instances; `done` is called, in another thread, when each has its result.

        Returns:
            A problem where too much waits already (then nothing was taken), else None.
        """
        if not instances:
            done()
            return None
        with self._waiting_mutex:
            if self._waiting + len(instances) > MAX_WAITING:
                return errors.overloaded(MAX_WAITING)
            self._waiting += len(instances)
        job = _Job(done, len(instances))
        for instance in instances:
            instance._job = job
            (self._to_score if instance.patient_id is None else self._to_read).put(instance)
        return None

    # -- online features -------------------------------------------------------------------------------------------

    def _read_forever(self) -> None:
        while True:
            try:
                batch = _take(self._to_read, self._ping_seconds)
            except queue.Empty:
                self._ping()
                continue
            stopping = batch[-1] is None
            instances = [instance for instance in batch if instance is not None]
            if instances:
                self._read(instances)
                for instance in instances:
                    self._to_score.put(instance)
            if stopping:
                return

    def _store(self) -> FeatureReader:
        if self._reader is None:
            self._reader = self._make_reader()
        return self._reader

    def _ping(self) -> None:
        try:
            self._store().ping()
        except Exception as error:
            self._store_failed(error)
        else:
            self._online, self._closed_until = OnlineState(True), 0.0

    def _store_failed(self, error: Exception) -> str:
        reason = str(error) if isinstance(error, OnlineStoreError) else type(error).__name__
        self._online = OnlineState(False, reason)
        self._closed_until = time.monotonic() + 1.0
        return reason

    def _read(self, instances: Sequence[Instance]) -> None:
        """Give each instance its patient's features, or a problem."""
        if not self._online.up and time.monotonic() < self._closed_until:
            problem = errors.online_store_unavailable(self._online.error or "it does not answer")
            for instance in instances:
                instance.result = problem
            return
        unreadable: set[str] = set()
        ids = list(dict.fromkeys(instance.patient_id or "" for instance in instances))
        try:
            found = dict(self._store().get_many(ids))
        except (ValueError, KeyError):
            # one row that cannot be read must not fail the others
            found = {}
            for patient_id in ids:
                try:
                    found.update(self._store().get_many([patient_id]))
                except (ValueError, KeyError):
                    unreadable.add(patient_id)
                except Exception as error:
                    self._store_failed(error)
                    break
        except Exception as error:
            problem = errors.online_store_unavailable(self._store_failed(error))
            for instance in instances:
                instance.result = problem
            return
        self._online = OnlineState(True)
        for instance in instances:
            row = found.get(instance.patient_id or "")
            if row is not None:
                self._fill(instance, row)
            else:
                bad = instance.patient_id in unreadable
                instance.result = errors.online_features_unreadable() if bad else errors.unknown_patient()

    def _fill(self, instance: Instance, row: OnlineFeatures) -> None:
        trial = row.trial or instance.trial or self._default_trial
        if instance.trial is not None and instance.trial != trial:
            instance.result = errors.trial_mismatch(instance.trial, trial)
            return
        if trial not in self._profiles:
            instance.result = errors.trial_not_served()
            return
        instance.trial, instance.features = trial, row.features
        instance.feature_time, instance.feature_set = row.feature_time, row.feature_set or None

    # -- scoring ---------------------------------------------------------------------------------------------------

    def _score_forever(self) -> None:
        while True:
            batch = _take(self._to_score, None)
            stopping = batch[-1] is None
            instances = [instance for instance in batch if instance is not None]
            try:
                self._score(instances)
            except Exception:
                _logger.exception("scoring failed")
                for instance in instances:
                    if instance.result is None:
                        instance.result = errors.model_failed()
            self._finish(instances)
            if stopping:
                return

    def _finish(self, instances: Sequence[Instance]) -> None:
        with self._waiting_mutex:
            self._waiting -= len(instances)
        for instance in instances:
            if isinstance(instance.result, Problem):
                self._observer.refused(instance.result.error)
            job = instance._job
            if job is not None:
                job.left -= 1
                if job.left == 0:
                    job.done()

    def _score(self, instances: Sequence[Instance]) -> None:
        groups: dict[str, tuple[ServedModel, list[Instance], list[list[float | None]]]] = {}
        unserved: dict[str, Problem] = {}
        for instance in instances:
            if instance.result is not None or instance.features is None:
                continue
            trial = instance.trial or self._default_trial
            if trial in unserved:
                instance.result = unserved[trial]
                continue
            if trial not in groups:
                served = self._champions.current(trial)
                if served is None:
                    instance.result = unserved[trial] = self._why_unserved(trial)
                    continue
                groups[trial] = (served, [], [])
            served, members, rows = groups[trial]
            values = instance.features
            if instance.patient_id is None:
                unknown = values.keys() - served.known
                if unknown:
                    instance.result = errors.unknown_features(sorted(unknown), trial)
                    continue
                if not any(value is not None for value in values.values()):
                    instance.result = errors.no_values()
                    continue
            members.append(instance)
            rows.append(list(map(values.get, served.model.feature_names)))
        log_rows: list[dict[str, Any]] = []
        for trial, (served, members, rows) in groups.items():
            if members:
                self._predict(self._profiles[trial], served, members, rows, log_rows)
        if log_rows:
            self._log.record(log_rows)

    def _predict(
        self,
        profile: TrialProfile,
        served: ServedModel,
        members: list[Instance],
        rows: list[list[float | None]],
        log_rows: list[dict[str, Any]],
    ) -> None:
        started = time.perf_counter()
        try:
            probabilities = _probabilities(served, rows)
        except Exception:
            self._observer.asked(served.trial, served.version, 0, len(rows), time.perf_counter() - started)
            raise
        seconds = time.perf_counter() - started
        self._observer.round_done(len(rows), seconds)
        failures = sum(not 0.0 <= probability <= 1.0 for probability in probabilities)  # NaN is neither
        self._observer.asked(served.trial, served.version, len(rows) - failures, failures, seconds)
        now = self._clock()
        predicted_at = now.isoformat()
        now_us = (now - _EPOCH) // _MICROSECOND
        names = served.model.feature_names
        for instance, row, probability in zip(members, rows, probabilities, strict=True):
            if not 0.0 <= probability <= 1.0:  # also false for NaN
                instance.result = errors.model_failed()
                continue
            band = risk_band(profile, probability)
            age, stale, warning = freshness(profile, instance.feature_time, now)
            missing = row.count(None)
            if missing == len(row):
                warning = _also(warning, "No feature of the model has a value: this is its answer to an empty row.")
            if instance.feature_set and served.model.feature_set and instance.feature_set != served.model.feature_set:
                warning = _also(
                    warning, "The online features were computed by another definition than the model was trained on."
                )
            prediction_id = uuid.uuid4().hex
            feature_time = instance.feature_time
            instance.result = {
                "prediction_id": prediction_id,
                "patient_id": instance.patient_id,
                "trial": served.trial,
                "model_name": served.champion.model_name,
                "model_version": served.champion.version,
                "probability": probability,
                "risk_band": band,
                "predicted_at": predicted_at,
                "feature_time": None if feature_time is None else feature_time.isoformat(),
                "feature_age_seconds": age,
                "stale": stale,
                "warning": warning,
                "missing_features": missing,
                "feature_count": len(row),
            }
            log_rows.append(
                {
                    "prediction_id": prediction_id,
                    "predicted_at": now_us,
                    "trial": served.trial,
                    "patient_id": instance.patient_id,
                    "model_name": served.champion.model_name,
                    "model_version": served.champion.version,
                    "probability": probability,
                    "risk_band": band,
                    "feature_time": None if feature_time is None else (feature_time - _EPOCH) // _MICROSECOND,
                    "feature_age_seconds": age,
                    "stale": stale,
                    "features": orjson.dumps(dict(zip(names, row, strict=True))).decode(),
                }
            )
            self._observer.predicted(served.trial, band, stale)

    def _why_unserved(self, trial: str) -> Problem:
        state = self._champions.states()[trial]
        if self._champions.registry_error is not None:
            return errors.registry_unavailable(trial, self._champions.registry_error)
        if state.error is None and not self._champions.polled:
            return errors.model_loading(trial)
        if state.failed_version is not None:
            reason: str | None = f"version {state.failed_version} cannot be loaded: {state.error}"
        else:
            reason = state.error
        return errors.no_model(trial, state.model_name, reason)


def risk_band(profile: TrialProfile, probability: float) -> str:
    """Return low, medium or high, by the lower bounds that the profile gives."""
    if probability >= profile.risk_bands.high:
        return "high"
    return "medium" if probability >= profile.risk_bands.medium else "low"


def freshness(
    profile: TrialProfile, feature_time: datetime | None, now: datetime
) -> tuple[float | None, bool, str | None]:
    """Say how old features are, seen from the present.

    Age is measured against the clock and not against the trial's newest record: for a finished study every answer is
    stale, and says so, because it describes the patient at the feature time and nobody today.

    Returns:
        Age in seconds (0 for a feature time that is not over yet, such as the end of today; None where the time is
        unknown), whether it is above the profile's ``online.max_age``, and a warning for the caller.
    """
    if feature_time is None:
        return None, False, None
    age = now - feature_time
    if age < -timedelta(days=1):
        return 0.0, False, f"The feature time {feature_time.isoformat()} is in the future: check the clocks."
    limit = profile.online.max_age
    if age <= limit:
        return max(0.0, age.total_seconds()), False, None
    return (
        age.total_seconds(),
        True,
        f"The features describe the patient as of {feature_time.isoformat(timespec='seconds')}, {_span(age)} ago; "
        f"trial {profile.name} allows {_span(limit)}. The probability holds for that time, not for today. If the "
        "trial is still running, check that its records arrive and that clinical_data_pipeline runs.",
    )


def _span(length: timedelta) -> str:
    hours = length.total_seconds() / 3600
    return f"{hours / 24:,.0f} days" if hours >= 48 else f"{hours:.1f} hours"


def _also(first: str | None, second: str) -> str:
    return second if first is None else f"{first} {second}"


def _probabilities(served: ServedModel, rows: list[list[float | None]]) -> list[float]:
    """Return a probability for each row; NaN where the model cannot give one."""
    import numpy as np

    matrix = np.array(rows, dtype=np.float64)
    try:
        return [float(value) for value in served.model.predict_proba(matrix)]
    except Exception as error:
        # type only: a driver's message may quote values of a patient
        _logger.error("version %s failed on %d rows: %s", served.version, len(rows), type(error).__name__)
        if len(rows) == 1:
            return [float("nan")]
        return [value for row in rows for value in _probabilities(served, [row])]


def _take(waiting: queue.SimpleQueue[Instance | None], timeout: float | None) -> list[Instance | None]:
    """Wait for one, then take what else is there; a None is always the last.

    Raises:
        queue.Empty: nothing came for `timeout` seconds.
    """
    batch = [waiting.get(timeout=timeout)]
    while batch[-1] is not None and len(batch) < _ROUND:
        try:
            batch.append(waiting.get_nowait())
        except queue.Empty:
            break
    return batch
