"""Concept drift: do the model's errors grow with time?

The stream is the excess log-loss of each outcome, in time order: its log-loss less the log-loss that the model itself
expects. It has mean zero while the probabilities are right, whatever mix of patients is asked about, and grows when
outcomes no longer follow from the features as they did.

Page-Hinkley and ADWIN (`river`) watch the stream. Both assume independent values; here those of one subject are alike.
Their bounds are therefore set on the stream's own wild-bootstrap copies, in which the (centred) errors of each subject
keep their size and order but get a random sign: at most 1 % of the copies, which hold no trend, may raise an alarm
(half of that for Page-Hinkley, whose running mean lets skewed errors rise a little more often).

References: Page (1954), Biometrika 41; Bifet and Gavalda (2007), SDM (ADWIN); Cameron, Gelbach and Miller (2008), Rev.
Econ. Stat. 90(3) (wild cluster bootstrap).
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

if TYPE_CHECKING:
    import polars as pl

Floats = NDArray[np.float64]

FALSE_ALARMS = 0.01
MAX_OUTCOMES = 5000
"""Only the newest so many outcomes are watched."""
MIN_OUTCOMES = 100
MIN_SUBJECTS = 20
_COPIES = 500
_ADWIN_UPDATES = 1_000_000
_ADWIN_COPIES = 200
_ADWIN_DELTAS = (0.9, 0.5, 0.2, 0.05, 0.01, 2e-3, 1e-4, 1e-6, 1e-10)
_FORGETTING = 0.9999
_WARM_UP = 30
_CLIP = 0.01


@dataclass(frozen=True)
class Detection:
    """What one detector says: whether it fired, at which number of the stream (from 0), and the bound it used."""

    fired: bool
    at: int | None
    bound: float

    def as_dict(self, times: list[datetime]) -> dict[str, Any]:
        """Return it as JSON-ready values; `times` are those of the stream."""
        at = None if self.at is None else times[self.at].isoformat()
        return {"drift": self.fired, "detected_at": at, "bound": self.bound}


@dataclass(frozen=True)
class ConceptDrift:
    """What the detectors say; `status` is ``none``, ``drift`` or ``insufficient_data``, `note` says what is missing."""

    status: str
    detectors: dict[str, Detection]
    times: list[datetime]
    note: str = ""

    @property
    def detected_at(self) -> datetime | None:
        """The earliest detection; None without one."""
        found = [item.at for item in self.detectors.values() if item.at is not None]
        return self.times[min(found)] if found else None


def excess_log_loss(labels: ArrayLike, probabilities: ArrayLike) -> Floats:
    """Return each outcome's log-loss less its expectation under the model.

    The difference is ``(p - y) ln(p / (1 - p))``. Probabilities are kept within 0.01 to 0.99, so that single surprises
    weigh no more than 4.6.
    """
    y, p = np.asarray(labels, dtype=np.float64), np.asarray(probabilities, dtype=np.float64)
    p = np.clip(p, _CLIP, 1 - _CLIP)
    return np.asarray((p - y) * np.log(p / (1 - p)))


def detect(outcomes: pl.DataFrame, *, seed: int = 0) -> ConceptDrift:
    """Watch one model version's errors.

    Args:
        outcomes: rows of ``gold/prediction_outcomes`` of this version, one a patient and index time, in any order.
        seed: of the wild bootstrap; the same input and seed give the same result.
    """
    rows = outcomes.sort("index_time", "prediction_id").tail(MAX_OUTCOMES)
    subjects = rows["patient_id"].n_unique() if rows.height else 0
    if rows.height < MIN_OUTCOMES or subjects < MIN_SUBJECTS:
        note = f"{rows.height} outcomes of {subjects} subjects; at least {MIN_OUTCOMES} of {MIN_SUBJECTS} are needed"
        return ConceptDrift("insufficient_data", {}, [], note)
    errors = excess_log_loss(rows["outcome"].to_numpy(), rows["probability"].to_numpy())
    codes = np.unique(rows["patient_id"].to_numpy(), return_inverse=True)[1].reshape(-1)
    detectors = detect_in_stream(errors, codes, seed=seed)
    status = "drift" if any(item.fired for item in detectors.values()) else "none"
    return ConceptDrift(status, detectors, rows["index_time"].to_list())


def detect_in_stream(errors: Floats, subjects: NDArray[Any], *, seed: int = 0) -> dict[str, Detection]:
    """Return what ``page_hinkley`` and ``adwin`` say of a stream of errors, with the subject of each."""
    codes = np.unique(subjects, return_inverse=True)[1].reshape(-1)
    rng = np.random.default_rng(seed)
    centred = errors - errors.mean()
    spread = float(centred.std())
    if spread == 0:
        return {name: Detection(False, None, float("inf")) for name in ("page_hinkley", "adwin")}
    scaled = centred / spread
    signs = rng.choice((-1.0, 1.0), size=(_COPIES, int(codes.max()) + 1))
    copies = scaled * signs[:, codes]
    return {"page_hinkley": _page_hinkley(scaled, copies), "adwin": _adwin(scaled, copies)}


def _page_hinkley(stream: Floats, copies: Floats) -> Detection:
    from river.drift import PageHinkley

    bound = float(np.quantile(page_hinkley_maxima(copies), 1 - FALSE_ALARMS / 2))
    detector: Any = PageHinkley(
        min_instances=_WARM_UP, delta=0.0, threshold=max(bound, 1e-9), alpha=_FORGETTING, mode="up"
    )
    for number, value in enumerate(stream):
        detector.update(float(value))
        if detector.drift_detected:
            return Detection(True, number, bound)
    return Detection(False, None, bound)


def page_hinkley_maxima(streams: Floats) -> Floats:
    """Return the highest value that the statistic of `river`'s Page-Hinkley (mode up, delta 0) reaches in each row."""
    count, length = streams.shape
    mean, total, lowest, highest = np.zeros(count), np.zeros(count), np.full(count, np.inf), np.zeros(count)
    for number in range(length):
        value = streams[:, number]
        mean += (value - mean) / (number + 1)
        total = _FORGETTING * total + value - mean
        lowest = np.minimum(lowest, total)
        if number + 1 >= _WARM_UP:
            highest = np.maximum(highest, total - lowest)
    return highest


def _adwin(stream: Floats, copies: Floats) -> Detection:
    low, high = float(stream.min()), float(stream.max())
    few = copies[: max(50, min(_ADWIN_COPIES, _ADWIN_UPDATES // stream.shape[0] // 2))]
    # a copy is as wide as the stream and its mirror image together
    width = max(abs(low), abs(high))

    def unit(values: Floats) -> Floats:
        return np.asarray((values + width) / (2 * width))

    allowed = int(FALSE_ALARMS * len(few))
    for delta in _ADWIN_DELTAS:
        alarms = 0
        for copy in unit(few):
            alarms += _first_rise(copy, delta) is not None
            if alarms > allowed:
                break
        if alarms <= allowed:
            at = _first_rise(unit(stream), delta)
            return Detection(at is not None, at, delta)
    return Detection(False, None, 0.0)


def _first_rise(stream: Floats, delta: float) -> int | None:
    """Return where ADWIN first sees the mean rise."""
    from river.drift import ADWIN

    detector: Any = ADWIN(delta=delta)  # type: ignore[no-untyped-call]
    for number, value in enumerate(stream.tolist()):
        before = detector.estimation
        detector.update(value)
        if detector.drift_detected and detector.estimation > before:
            return number
    return None
