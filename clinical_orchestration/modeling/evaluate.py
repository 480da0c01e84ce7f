"""Discrimination and calibration of probabilities, with intervals from a bootstrap over subjects.

Rows of one subject are alike, so intervals resample subjects, not rows. All replicates are computed at once: a
replicate is a vector of row weights (how often the row's subject was drawn), and every metric here is a weighted one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from clinical_orchestration.modeling.results import (
    MIN_DISCLOSED_SUBJECTS,
    Estimate,
    Evaluation,
    GroupEvaluation,
    OperatingPoint,
    ReliabilityBin,
)

Floats = NDArray[np.float64]

REPLICATES = 1000
BINS = 10
MIN_GROUP_SUBJECTS = 10
MIN_GROUP_OUTCOMES = 10
_CHUNK = 250_000  # replicates x rows at once: 2 MB an array, so that the ten there are stay in the cache
_CLIP = 1e-6


class EvaluationError(ValueError):
    """The rows cannot be evaluated; the message says why."""


def evaluate(
    labels: ArrayLike,
    probabilities: ArrayLike,
    subjects: ArrayLike,
    *,
    groups: Mapping[str, Sequence[str | None] | NDArray[Any]] | None = None,
    thresholds: Mapping[str, float] | None = None,
    seed: int = 0,
    replicates: int = REPLICATES,
) -> Evaluation:
    """Return the evaluation of out-of-sample probabilities.

    Args:
        labels: 0 or 1 a row.
        probabilities: Predicted probability of 1, a row.
        subjects: Subject of each row, any hashable; only used to resample.
        groups: Attribute (site, sex, arm) to its value a row; null values form the group "unknown".
        thresholds: Operating points by name, such as the risk bands of the trial's profile. Points at 80 % sensitivity
            and at 90 % specificity are added.
        seed: Of the bootstrap; the same input and seed give the same intervals.
        replicates: Bootstrap replicates.

    Raises:
        EvaluationError: lengths differ, labels are not 0/1, probabilities are outside 0 to 1, or a class is absent.
    """
    y, p, codes = _checked(labels, probabilities, subjects)
    if not 0 < y.sum() < len(y):
        raise EvaluationError("rows with and rows without the event are needed; one of them is absent")
    bins = _bins(p)
    metrics = _bootstrap(y, p, codes, bins, seed=seed, replicates=replicates, calibration=True)
    sums = metrics.pop("bin_observed")
    return Evaluation(
        rows=len(y),
        subjects=int(codes.max()) + 1,
        events=int(y.sum()),
        prevalence=float(y.mean()),
        auroc=_estimate(metrics["auroc"]),
        auprc=_estimate(metrics["auprc"]),
        brier=_estimate(metrics["brier"]),
        ece=_estimate(metrics["ece"]),
        calibration_slope=_estimate(metrics["slope"]),
        calibration_intercept=_estimate(metrics["intercept"]),
        bins=tuple(
            ReliabilityBin(
                lower=float(p[bins == b].min()),
                upper=float(p[bins == b].max()),
                rows=int((bins == b).sum()),
                mean_probability=float(p[bins == b].mean()),
                observed=_estimate(sums[:, b]),
            )
            for b in range(int(bins.max()) + 1)
        ),
        operating_points=_operating_points(y, p, dict(thresholds or {})),
        groups=tuple(
            group
            for attribute, values in (groups or {}).items()
            for group in _by_group(attribute, values, y, p, codes, seed=seed, replicates=replicates)
        ),
        seed=seed,
        replicates=replicates,
    )


@dataclass(frozen=True)
class Curves:
    """ROC and precision-recall curves with pointwise 95 % bands over subjects, on fixed grids of 201 points."""

    false_positive_rate: Floats
    sensitivity: Floats
    sensitivity_lower: Floats
    sensitivity_upper: Floats
    recall: Floats
    precision: Floats
    precision_lower: Floats
    precision_upper: Floats


def curves(
    labels: ArrayLike, probabilities: ArrayLike, subjects: ArrayLike, *, seed: int = 0, replicates: int = 200
) -> Curves:
    """Return the curves to draw. Same arguments and errors as :func:`evaluate`."""
    y, p, codes = _checked(labels, probabilities, subjects)
    if not 0 < y.sum() < len(y):
        raise EvaluationError("rows with and rows without the event are needed; one of them is absent")
    order = np.argsort(-p, kind="stable")
    last_of_tie = np.append(np.flatnonzero(np.diff(p[order])), len(p) - 1)
    grid = np.linspace(0, 1, 201)
    roc, recall_precision = [], []
    for weights in _weights(codes, seed, replicates, include_point=True):
        ordered = weights[:, order]
        true = np.cumsum(ordered * y[order], axis=1)[:, last_of_tie]
        false = np.cumsum(ordered * (1 - y[order]), axis=1)[:, last_of_tie]
        for tp, fp in zip(true, false, strict=True):
            if not tp[-1] or not fp[-1]:
                continue
            recall, precision = tp / tp[-1], tp / np.maximum(tp + fp, 1e-12)
            roc.append(np.interp(grid, np.append(0, fp / fp[-1]), np.append(0, recall)))
            # precision is a step: at a recall, that of the first threshold which reaches it
            first = np.minimum(np.searchsorted(recall, grid, side="left"), len(recall) - 1)
            recall_precision.append(precision[first])
    sensitivity, precisions = np.asarray(roc), np.asarray(recall_precision)
    low, high = np.percentile(sensitivity[1:], [2.5, 97.5], axis=0)
    precision_low, precision_high = np.percentile(precisions[1:], [2.5, 97.5], axis=0)
    return Curves(grid, sensitivity[0], low, high, grid, precisions[0], precision_low, precision_high)


@dataclass(frozen=True)
class Scores:
    """Point values, for comparing candidates."""

    auroc: float
    auprc: float
    brier: float
    ece: float


def score(labels: ArrayLike, probabilities: ArrayLike) -> Scores:
    """Return the point values of the metrics of :func:`evaluate`, without intervals. Same errors."""
    y, p, codes = _checked(labels, probabilities, np.arange(len(np.asarray(labels))))
    if not 0 < y.sum() < len(y):
        raise EvaluationError("rows with and rows without the event are needed; one of them is absent")
    values = _bootstrap(y, p, codes, _bins(p), seed=0, replicates=0, calibration=False)
    return Scores(*(float(values[name][0]) for name in ("auroc", "auprc", "brier", "ece")))


def _checked(
    labels: ArrayLike, probabilities: ArrayLike, subjects: ArrayLike
) -> tuple[Floats, Floats, NDArray[np.int64]]:
    y, p = np.asarray(labels, dtype=np.float64), np.asarray(probabilities, dtype=np.float64)
    identities = np.asarray(subjects)
    if not (y.ndim == p.ndim == 1 and len(y) == len(p) == len(identities)):
        raise EvaluationError("labels, probabilities and subjects must be of one length and one dimension")
    if not len(y):
        raise EvaluationError("there are no rows to evaluate")
    if not np.isin(y, (0.0, 1.0)).all():
        raise EvaluationError("labels must be 0 or 1")
    if not (np.isfinite(p).all() and (p >= 0).all() and (p <= 1).all()):
        raise EvaluationError("probabilities must be between 0 and 1")
    codes = np.unique(identities, return_inverse=True)[1].reshape(-1).astype(np.int64)
    return y, p, codes


def _weights(codes: NDArray[np.int64], seed: int, replicates: int, *, include_point: bool) -> Any:
    """Yield blocks of row weights; the first row of the first block is the data as they are."""
    rng = np.random.default_rng(seed)
    subjects = int(codes.max()) + 1
    block = max(1, _CHUNK // len(codes))
    if include_point:
        yield np.ones((1, len(codes)))
    for start in range(0, replicates, block):
        count = min(block, replicates - start)
        drawn = rng.multinomial(subjects, np.full(subjects, 1 / subjects), size=count)
        yield drawn[:, codes].astype(np.float64)


def _bins(p: Floats) -> NDArray[np.int64]:
    """Return each row's bin: equally many rows a bin, equal probabilities in one bin, numbered from 0 without gaps."""
    edges = np.unique(np.quantile(p, np.linspace(0, 1, BINS + 1)[1:-1]))
    return np.unique(np.searchsorted(edges, p, side="left"), return_inverse=True)[1].reshape(-1).astype(np.int64)


def _bootstrap(
    y: Floats, p: Floats, codes: NDArray[np.int64], bins: NDArray[np.int64], *, seed: int, replicates: int,
    calibration: bool,
) -> dict[str, Floats]:  # fmt: skip
    """Return each metric as an array: the data's value first, then one value a replicate (NaN where undetermined)."""
    order = np.argsort(p, kind="stable")
    starts = np.append(0, np.flatnonzero(np.diff(p[order])) + 1)
    one_hot = (bins[:, None] == np.arange(bins.max() + 1)).astype(np.float64)
    clipped = np.clip(p, _CLIP, 1 - _CLIP)
    log_odds = np.log(clipped / (1 - clipped))
    parts: dict[str, list[Floats]] = {}
    for w in _weights(codes, seed, replicates, include_point=True):
        total = w.sum(axis=1)
        positive, negative = w * y, w * (1 - y)
        pos = np.add.reduceat(positive[:, order], starts, axis=1)
        neg = np.add.reduceat(negative[:, order], starts, axis=1)
        n_pos, n_neg = pos.sum(axis=1), neg.sum(axis=1)
        below = np.cumsum(neg, axis=1) - neg / 2
        true = np.cumsum(pos[:, ::-1], axis=1)
        called = true + np.cumsum(neg[:, ::-1], axis=1)
        with np.errstate(divide="ignore", invalid="ignore"):
            values = {
                "auroc": (pos * below).sum(axis=1) / (n_pos * n_neg),
                "auprc": np.where(called > 0, pos[:, ::-1] * true / called, 0).sum(axis=1) / n_pos,
                "brier": w @ (p - y) ** 2 / total,
                "ece": np.abs((w * (p - y)) @ one_hot).sum(axis=1) / total,
                "bin_observed": (positive @ one_hot) / (w @ one_hot),
            }
        if calibration:
            values["intercept"], values["slope"] = _recalibration(y, log_odds, w)
        for name, value in values.items():
            parts.setdefault(name, []).append(value)
    return {name: np.concatenate(blocks) for name, blocks in parts.items()}


def _recalibration(y: Floats, x: Floats, w: Floats) -> tuple[Floats, Floats]:
    """Return the intercept (slope held at 1) and the slope (intercept free) of the logistic recalibration."""

    def sigmoid(z: Floats) -> Floats:
        return np.asarray(0.5 * (1 + np.tanh(z / 2)))

    intercept = np.zeros(len(w))
    a, b = np.zeros(len(w)), np.ones(len(w))
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        for _ in range(30):
            mean = sigmoid(intercept[:, None] + x)
            step = (w * (y - mean)).sum(axis=1) / (w * mean * (1 - mean)).sum(axis=1)
            intercept = intercept + np.clip(step, -2, 2)
            if np.nanmax(np.abs(step), initial=0.0) < 1e-7:
                break
        for _ in range(30):
            mean = sigmoid(a[:, None] + b[:, None] * x)
            residual, curvature = w * (y - mean), w * mean * (1 - mean)
            g0, g1 = residual.sum(axis=1), residual @ x
            h00, h01, h11 = curvature.sum(axis=1), curvature @ x, curvature @ x**2
            determinant = h00 * h11 - h01**2
            step_a = (h11 * g0 - h01 * g1) / determinant
            step_b = (h00 * g1 - h01 * g0) / determinant
            a, b = a + np.clip(step_a, -2, 2), b + np.clip(step_b, -2, 2)
            largest = np.maximum(np.abs(step_a), np.abs(step_b))
            if np.nanmax(largest, initial=0.0) < 1e-7:
                break
        # separated classes have no finite slope: such a fit never settles
        settled = (np.abs(step) < 1e-4) & np.isfinite(intercept)
        settled_slope = (largest < 1e-4) & np.isfinite(b)
    return np.where(settled, intercept, np.nan), np.where(settled_slope, b, np.nan)


def _estimate(values: Floats) -> Estimate:
    """Return the first value with the 95 % percentile interval of the others.

    The interval always holds the value: resampling adds noise, which pushes an absolute gap (ECE) upwards.
    """
    point = float(values[0])
    if not np.isfinite(point):
        return Estimate(None)
    others = values[1:][np.isfinite(values[1:])]
    if len(others) < 0.9 * max(1, len(values) - 1):
        return Estimate(point)
    low, high = np.percentile(others, [2.5, 97.5])
    return Estimate(point, min(point, float(low)), max(point, float(high)))


def _operating_points(y: Floats, p: Floats, thresholds: dict[str, float]) -> tuple[OperatingPoint, ...]:
    positives, negatives = np.sort(p[y == 1]), np.sort(p[y == 0])
    # the highest threshold that still finds 80 % of the events; the lowest that spares 90 % of the others
    thresholds.setdefault("sensitivity_80", float(positives[int(np.floor(0.2 * len(positives)))]))
    spared = negatives[min(len(negatives) - 1, int(np.ceil(0.9 * len(negatives))) - 1)]
    thresholds.setdefault("specificity_90", float(np.nextafter(spared, 2.0)))
    points = []
    for name, threshold in thresholds.items():
        alert = p >= threshold
        tp, fp = float((alert & (y == 1)).sum()), float((alert & (y == 0)).sum())
        fn, tn = float((~alert & (y == 1)).sum()), float((~alert & (y == 0)).sum())
        points.append(
            OperatingPoint(
                name=name,
                threshold=float(threshold),
                sensitivity=tp / (tp + fn) if tp + fn else None,
                specificity=tn / (tn + fp) if tn + fp else None,
                ppv=tp / (tp + fp) if tp + fp else None,
                npv=tn / (tn + fn) if tn + fn else None,
                alert_rate=(tp + fp) / len(y),
            )
        )
    return tuple(points)


def _hidden(attribute: str, value: str, note: str) -> GroupEvaluation:
    return GroupEvaluation(
        attribute, value, rows=None, subjects=None, events=None, prevalence=None, mean_probability=None, auroc=None,
        auprc=None, brier=None, note=note,
    )  # fmt: skip


def _by_group(
    attribute: str, values: Sequence[str | None] | NDArray[Any], y: Floats, p: Floats, codes: NDArray[np.int64], *,
    seed: int, replicates: int,
) -> list[GroupEvaluation]:  # fmt: skip
    if len(values) != len(y):
        raise EvaluationError(f"group attribute {attribute} has another number of rows than the labels")
    names = np.asarray(["unknown" if value is None or value == "" else str(value) for value in values])
    found = []
    for name in np.unique(names):
        here = names == name
        rows, events = int(here.sum()), int(y[here].sum())
        subjects = len(np.unique(codes[here]))
        if subjects < MIN_DISCLOSED_SUBJECTS:
            note = f"fewer than {MIN_DISCLOSED_SUBJECTS} subjects: not shown"
            found.append(_hidden(attribute, str(name), note))
            continue
        prevalence, mean = events / rows, float(p[here].mean())
        note = ""
        if subjects < MIN_GROUP_SUBJECTS:
            note = f"too small: {subjects} subjects, at least {MIN_GROUP_SUBJECTS} are needed"
        elif min(events, rows - events) < MIN_GROUP_OUTCOMES:
            note = f"too small: {events} rows with and {rows - events} without the event, {MIN_GROUP_OUTCOMES} needed"
        auroc = auprc = brier = None
        if not note:
            codes_here = np.unique(codes[here], return_inverse=True)[1].reshape(-1).astype(np.int64)
            metrics = _bootstrap(
                y[here], p[here], codes_here, np.zeros(rows, dtype=np.int64),
                seed=seed, replicates=replicates, calibration=False,
            )  # fmt: skip
            auroc, auprc, brier = (_estimate(metrics[metric]) for metric in ("auroc", "auprc", "brier"))
        found.append(
            GroupEvaluation(
                attribute, str(name), rows, subjects, events, prevalence, mean, auroc, auprc, brier, note
            )
        )  # fmt: skip
    return found
