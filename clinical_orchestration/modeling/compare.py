"""Two models on the same rows: the paired difference of their metrics, with intervals from a bootstrap over subjects.

Both models answer the same rows, and a replicate draws the same subjects for both. What varies between subjects then
cancels, and the interval of the difference is far narrower than those of the two models suggest (DeLong et al. 1988
make the same point for AUROC with an asymptotic variance; drawing whole subjects also respects that rows of one
subject are alike).

Which rows: what counts is how the models do from now on. Where there are enough rows that are newer than those the
champion was trained on, they alone decide; older ones would dilute what has changed since, and a model that has learned
the change would even seem worse on them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from clinical_orchestration.modeling.evaluate import (
    REPLICATES,
    EvaluationError,
    _bins,
    _bootstrap,
    _checked,
    _estimate,
)
from clinical_orchestration.modeling.results import Estimate

COMPARED = ("auroc", "auprc", "brier")
_LOWER_IS_BETTER = frozenset({"brier"})

MIN_ROWS = 100
MIN_OUTCOMES = 20
"""So many rows with and so many without the event are needed for newer rows to decide alone."""
MIN_SUBJECTS = 20
"""A bootstrap over fewer subjects gives intervals that are too narrow."""


@dataclass(frozen=True)
class Gain:
    """What the challenger gains in one metric.

    Attributes:
        champion, challenger: the metric of each model.
        gain: their difference with its 95 % interval, above 0 where the challenger is better (for the Brier score,
            where lower is better: champion minus challenger).
    """

    champion: Estimate
    challenger: Estimate
    gain: Estimate


@dataclass(frozen=True)
class Comparison:
    """Champion and challenger on the same held-out subjects.

    Attributes:
        rows, subjects, events: of the held-out rows.
        gains: metric -> gain, for each of :data:`COMPARED`.
        champion_saw_subjects: whether the champion's side was trained on these subjects, which favours it.
        basis: in words, what stood for the champion.
        seed, replicates: of the bootstrap.
        since: only rows after this time (ISO 8601, UTC) were compared; None: all rows of the held-out subjects.
    """

    rows: int
    subjects: int
    events: int
    gains: dict[str, Gain]
    champion_saw_subjects: bool
    basis: str
    seed: int
    replicates: int
    since: str | None = None

    def metrics(self) -> dict[str, float]:
        """Return every determined figure as ``comparison/<metric>/<what>``."""
        flat: dict[str, float] = {}
        for name, gain in self.gains.items():
            figures = {
                "champion": gain.champion.value,
                "challenger": gain.challenger.value,
                "gain": gain.gain.value,
                "gain_lower": gain.gain.lower,
                "gain_upper": gain.gain.upper,
            }
            flat |= {f"comparison/{name}/{what}": value for what, value in figures.items() if value is not None}
        return flat

    def to_dict(self) -> dict[str, Any]:
        """Return the comparison as JSON-ready values; :meth:`from_dict` reads it back."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Comparison:
        """Read what :meth:`to_dict` wrote.

        Raises:
            ValueError: the data are no comparison.
        """
        try:
            gains = {
                name: Gain(**{side: Estimate(**values) for side, values in sides.items()})
                for name, sides in data["gains"].items()
            }
            return cls(**{**data, "gains": gains})
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"no stored comparison: {type(error).__name__} {error}") from None


def compare(
    labels: ArrayLike,
    champion: ArrayLike,
    challenger: ArrayLike,
    subjects: ArrayLike,
    *,
    champion_saw_subjects: bool = False,
    basis: str = "",
    since: datetime | None = None,
    seed: int = 0,
    replicates: int = REPLICATES,
) -> Comparison:
    """Return how a challenger compares with the champion on the same rows.

    Args:
        labels: 0 or 1 a row.
        champion, challenger: each model's probability of 1, a row.
        subjects: subject of each row; replicates draw subjects.
        champion_saw_subjects: whether the champion was trained on these subjects.
        basis: in words, what stands for the champion.
        since: the time after which the rows are, where they were chosen by :func:`newer_rows`.
        seed: of the bootstrap; equal input and seed give equal intervals.
        replicates: bootstrap replicates.

    Raises:
        EvaluationError: lengths differ, labels are not 0/1, probabilities are outside 0 to 1, or a class is absent.
    """
    values = []
    for probabilities in (champion, challenger):
        y, p, codes = _checked(labels, probabilities, subjects)
        if not 0 < y.sum() < len(y):
            raise EvaluationError("rows with and rows without the event are needed; one of them is absent")
        # the same seed draws the same subjects for both models: that is what pairs them
        values.append(_bootstrap(y, p, codes, _bins(p), seed=seed, replicates=replicates, calibration=False))
    old, new = values
    gains = {}
    for name in COMPARED:
        difference = old[name] - new[name] if name in _LOWER_IS_BETTER else new[name] - old[name]
        gains[name] = Gain(_estimate(old[name]), _estimate(new[name]), _estimate(difference))
    return Comparison(
        rows=len(y),
        subjects=len(np.unique(codes)),
        events=int(y.sum()),
        gains=gains,
        champion_saw_subjects=champion_saw_subjects,
        basis=basis,
        seed=seed,
        replicates=replicates,
        since=None if since is None else since.isoformat(),
    )


def newer_rows(
    times: Sequence[datetime], trained_until: datetime | None, labels: ArrayLike, subjects: ArrayLike
) -> NDArray[np.bool_] | None:
    """Return which rows are newer than those that the champion was trained on; None where they are too few to decide.

    Args:
        times: time of each row.
        trained_until: time of the champion's newest training row; None where it is not known.
        labels: 0 or 1 a row.
        subjects: subject of each row.
    """
    if trained_until is None:
        return None
    newer = np.array([time > trained_until for time in times], dtype=bool)
    events = int(np.asarray(labels)[newer].sum())
    rows = int(newer.sum())
    enough = (
        rows >= MIN_ROWS
        and min(events, rows - events) >= MIN_OUTCOMES
        and len(np.unique(np.asarray(subjects)[newer])) >= MIN_SUBJECTS
    )
    return newer if enough else None
