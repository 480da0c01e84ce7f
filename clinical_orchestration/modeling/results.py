"""Typed results of an evaluation: what is stored with a model version, compared at promotion and shown to people.

Light on purpose (no numerical library), so that serving, promotion and the registry can read results without one.
Nothing here identifies a subject: only sums over groups of at least :data:`MIN_DISCLOSED_SUBJECTS` subjects.
"""

from __future__ import annotations

import math
import re
from dataclasses import asdict, dataclass
from typing import Any

MIN_DISCLOSED_SUBJECTS = 5
"""Groups with fewer subjects show no counts: small cells could point to a person."""

_UNSAFE = re.compile(r"[^0-9A-Za-z_.\- ]+")


@dataclass(frozen=True)
class Estimate:
    """A metric with its 95 % interval; `value` is None where the data do not determine it."""

    value: float | None
    lower: float | None = None
    upper: float | None = None

    def __str__(self) -> str:
        if self.value is None:
            return "not determined"
        if self.lower is None or self.upper is None:
            return f"{self.value:.3f}"
        return f"{self.value:.3f} ({self.lower:.3f} to {self.upper:.3f})"


@dataclass(frozen=True)
class ReliabilityBin:
    """One bin of the calibration curve: equally many rows a bin, bounds as probabilities."""

    lower: float
    upper: float
    rows: int
    mean_probability: float
    observed: Estimate


@dataclass(frozen=True)
class OperatingPoint:
    """What an alert at `threshold` (probability, inclusive) would mean; rates are None where nothing is counted."""

    name: str
    threshold: float
    sensitivity: float | None
    specificity: float | None
    ppv: float | None
    npv: float | None
    alert_rate: float


@dataclass(frozen=True)
class GroupEvaluation:
    """The metrics of one site, sex or arm; `note` says why numbers are missing, else it is empty."""

    attribute: str
    value: str
    rows: int | None
    subjects: int | None
    events: int | None
    prevalence: float | None
    mean_probability: float | None
    auroc: Estimate | None
    auprc: Estimate | None
    brier: Estimate | None
    note: str


@dataclass(frozen=True)
class Evaluation:
    """How good a model's probabilities are on rows it was not trained on.

    Attributes:
        prevalence: Share of rows with the event.
        brier: Mean squared error of the probability (0 is perfect).
        ece: Expected calibration error, mean absolute gap between predicted and observed share over bins.
        calibration_slope: 1 is right; below 1 the probabilities are too extreme.
        calibration_intercept: 0 is right; above 0 the risk is underestimated on the whole (log odds).
        seed, replicates: Of the bootstrap over subjects that gives the intervals.
    """

    rows: int
    subjects: int
    events: int
    prevalence: float
    auroc: Estimate
    auprc: Estimate
    brier: Estimate
    ece: Estimate
    calibration_slope: Estimate
    calibration_intercept: Estimate
    bins: tuple[ReliabilityBin, ...]
    operating_points: tuple[OperatingPoint, ...]
    groups: tuple[GroupEvaluation, ...]
    seed: int
    replicates: int

    @property
    def auprc_lift(self) -> float | None:
        """AUPRC divided by prevalence: 1 is what a model without skill reaches."""
        if self.auprc.value is None or self.prevalence <= 0:
            return None
        return self.auprc.value / self.prevalence

    def metrics(self) -> dict[str, float]:
        """Return every finite figure under a name that MLflow accepts: ``auroc_lower``, ``site/701/auroc``."""
        flat: dict[str, float | None] = {
            "rows": float(self.rows),
            "subjects": float(self.subjects),
            "events": float(self.events),
            "prevalence": self.prevalence,
            "auprc_lift": self.auprc_lift,
        }
        for name in ("auroc", "auprc", "brier", "ece", "calibration_slope", "calibration_intercept"):
            _add(flat, name, getattr(self, name))
        for point in self.operating_points:
            for field in ("threshold", "sensitivity", "specificity", "ppv", "npv", "alert_rate"):
                flat[f"operating_point/{_safe(point.name)}/{field}"] = getattr(point, field)
        for group in self.groups:
            prefix = f"{_safe(group.attribute)}/{_safe(group.value)}"
            for field in ("rows", "events", "prevalence", "mean_probability"):
                flat[f"{prefix}/{field}"] = getattr(group, field)
            for field in ("auroc", "auprc", "brier"):
                estimate = getattr(group, field)
                if estimate is not None:
                    _add(flat, f"{prefix}/{field}", estimate)
        return {name: float(value) for name, value in flat.items() if value is not None and math.isfinite(value)}

    def to_dict(self) -> dict[str, Any]:
        """Return the evaluation as JSON-ready values; :meth:`from_dict` reads it back."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Evaluation:
        """Read what :meth:`to_dict` wrote.

        Raises:
            ValueError: the data are no evaluation.
        """
        try:
            estimates = {
                name: Estimate(**data[name])
                for name in ("auroc", "auprc", "brier", "ece", "calibration_slope", "calibration_intercept")
            }
            bins = tuple(ReliabilityBin(**{**item, "observed": Estimate(**item["observed"])}) for item in data["bins"])
            groups = tuple(
                GroupEvaluation(
                    **{**item, **{f: Estimate(**item[f]) if item[f] else None for f in ("auroc", "auprc", "brier")}}
                )
                for item in data["groups"]
            )
            points = tuple(OperatingPoint(**item) for item in data["operating_points"])
            parts = {**estimates, "bins": bins, "groups": groups, "operating_points": points}
            return cls(**{**data, **parts})
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"no stored evaluation: {type(error).__name__} {error}") from None


def _safe(name: str) -> str:
    return _UNSAFE.sub("_", name).strip() or "_"


def _add(flat: dict[str, float | None], name: str, estimate: Estimate) -> None:
    flat[name] = estimate.value
    flat[f"{name}_lower"] = estimate.lower
    flat[f"{name}_upper"] = estimate.upper
