"""Which model version serves each trial, and how a new champion takes over without a restart.

One background thread asks the registry every two seconds where the alias ``champion`` of each trial's model points.
A new version is loaded beside the one that serves, tried on its own input example, and only then takes its place with
one assignment: requests in work finish on the version they started with, and no request waits or fails. A version
that cannot be loaded is reported and tried again, ever more slowly; the one before keeps serving. Where the alias is
taken away, the trial is no longer served (that is how a model is withdrawn); where the registry does not answer, the
loaded versions go on.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from clinical_orchestration.serving.ports import (
    Champion,
    ChampionSource,
    LoadedModel,
    ModelLoadError,
    RegistryUnavailableError,
)

if TYPE_CHECKING:
    from clinical_orchestration.trials import TrialProfile

_logger = logging.getLogger(__name__)

_LONGEST_PAUSE = 60.0  # between two attempts to load the same version
_WITHDRAWN_AFTER = 2  # polls in a row without an alias, so that one odd answer withdraws nothing


@dataclass(frozen=True)
class ServedModel:
    """A champion in memory; never changed, only replaced."""

    trial: str
    champion: Champion
    model: LoadedModel
    loaded_at: datetime
    known: frozenset[str] = field(repr=False)

    @property
    def version(self) -> str:
        """Version in the registry."""
        return self.champion.version


@dataclass(frozen=True)
class TrialState:
    """How the champion of one trial is doing.

    Attributes:
        trial: name of the profile.
        model_name: its registered model.
        served: what serves now.
        failed_version: newest version that could not be loaded; None when there is none.
        error: why, or why nothing serves.
    """

    trial: str
    model_name: str
    served: ServedModel | None = None
    failed_version: str | None = None
    error: str | None = None


@dataclass
class _Retry:
    champion: Champion
    at: float
    pause: float


class ChampionManager:
    """Keeps the champions of all trials loaded.

    Args:
        source: the registry; built in the background thread on first use, because its client loads slowly.
        profiles: the trials to serve.
        poll_seconds: pace of asking for the alias.
        on_load_failure: called with the trial's name for each failed attempt.
    """

    def __init__(
        self,
        source: Callable[[], ChampionSource],
        profiles: Iterable[TrialProfile],
        *,
        poll_seconds: float = 2.0,
        on_load_failure: Callable[[str], None] = lambda trial: None,
    ) -> None:
        self._make_source = source
        self._source: ChampionSource | None = None
        self._poll_seconds = poll_seconds
        self._on_load_failure = on_load_failure
        self._states = {profile.name: TrialState(profile.name, profile.model_name) for profile in profiles}
        self._retries: dict[str, _Retry] = {}
        self._absent: dict[str, int] = {}
        self._registry_error: str | None = None
        self._polled = threading.Event()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def registry_error(self) -> str | None:
        """Why the registry cannot be asked; None when the last question was answered."""
        return self._registry_error

    @property
    def polled(self) -> bool:
        """Whether the registry has been asked, and its champions loaded or refused, at least once."""
        return self._polled.is_set()

    def current(self, trial: str) -> ServedModel | None:
        """Return the version that serves a trial now."""
        return self._states[trial].served

    def states(self) -> Mapping[str, TrialState]:
        """Return the state of each trial."""
        return dict(self._states)

    def start(self) -> None:
        """Start polling in the background."""
        self._thread = threading.Thread(target=self._run, name="champions", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop polling; waits a moment, not for a model that is being loaded."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join(2.0)

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                self.poll()
            except Exception as error:  # the thread must live: it is the only way to a new model
                _logger.exception("asking for champions failed")
                self._registry_error = f"asking the registry failed: {type(error).__name__}"
            self._polled.set()
            self._stop.wait(self._poll_seconds)

    def poll(self) -> None:
        """Ask once for every trial, and load what is new."""
        if self._source is None:
            self._source = self._make_source()
        for trial, state in self._states.items():
            if self._stop.is_set():
                return
            try:
                champion = self._source.champion(state.model_name)
                self._registry_error = None
                self._follow(self._source, trial, champion)
            except RegistryUnavailableError as error:
                # the others would wait as long for the same registry
                self._registry_error = str(error)
                return

    def _follow(self, source: ChampionSource, trial: str, champion: Champion | None) -> None:
        state = self._states[trial]
        if champion is None:
            self._absent[trial] = self._absent.get(trial, 0) + 1
            if state.served is not None and self._absent[trial] >= _WITHDRAWN_AFTER:
                _logger.warning("trial %s: the alias champion was removed, version is withdrawn", trial)
                self._states[trial] = TrialState(trial, state.model_name, error="the alias champion was removed")
            elif state.served is None:
                self._states[trial] = TrialState(trial, state.model_name, error=state.error)
            return
        self._absent[trial] = 0
        if state.served is not None and state.served.champion == champion:
            if state.failed_version is not None:  # the alias moved back to what serves
                self._states[trial] = replace(state, failed_version=None, error=None)
            return
        retry = self._retries.get(trial)
        if retry is not None and retry.champion == champion and time.monotonic() < retry.at:
            return
        try:
            served = prepare(trial, champion, source.load(champion))
        except RegistryUnavailableError:
            raise
        except Exception as error:
            reason = str(error) if isinstance(error, ModelLoadError) else f"{type(error).__name__}: {error}"
            pause = min(_LONGEST_PAUSE, retry.pause * 2) if retry and retry.champion == champion else 2.0
            self._retries[trial] = _Retry(champion, time.monotonic() + pause, pause)
            self._states[trial] = replace(state, failed_version=champion.version, error=reason)
            self._on_load_failure(trial)
            _logger.error("trial %s: version %s cannot be served: %s", trial, champion.version, reason)
            return
        self._retries.pop(trial, None)
        before = state.served.version if state.served else "none"
        self._states[trial] = TrialState(trial, state.model_name, served)
        _logger.info("trial %s: version %s serves (before: %s)", trial, champion.version, before)


def prepare(trial: str, champion: Champion, model: LoadedModel) -> ServedModel:
    """Try a loaded version on its input example, so that the first request finds it warm, and accept it.

    Raises:
        ModelLoadError: it was trained for another trial, or its answers are no probabilities.
    """
    import numpy as np

    if model.trial and model.trial != trial:
        raise ModelLoadError(f"it was trained for trial {model.trial}")
    if not model.feature_names:
        raise ModelLoadError("the model's signature names no features")
    example = model.example
    if example is None or not len(example):
        example = np.zeros((1, len(model.feature_names)))
    for rows in (example, example[:1]):
        answers = model.predict_proba(rows)
        if answers.shape != (len(rows),) or not ((answers >= 0) & (answers <= 1)).all():  # NaN is neither
            raise ModelLoadError("the model's answers to its own input example are no probabilities")
    return ServedModel(trial, champion, model, datetime.now(UTC), frozenset(model.feature_names))
