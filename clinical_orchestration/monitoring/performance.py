"""How the served model does on what it predicted: over time, by group, and against its own evaluation at training."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any

from clinical_orchestration.modeling.results import Estimate, Evaluation

if TYPE_CHECKING:
    import polars as pl

    from clinical_orchestration.trials import TrialProfile

MIN_ROWS = 50
MIN_OUTCOMES = 10
"""So many rows with and so many without the event are needed."""
MIN_SUBJECTS = 10
WINDOW_HORIZONS = 4
"""A window of performance is so many prediction horizons long."""
MAX_WINDOWS = 24
RELATIVE_DROP = 0.05
"""An AUROC lower than at training by more than this share of it, beyond its interval, counts as degraded."""
METRICS = ("auroc", "auprc", "brier", "ece")

_BOOTSTRAP_CELLS = 20_000_000


@dataclass(frozen=True)
class Window:
    """Outcomes of index times in ``(start, end]``; `evaluation` is None where they are too few, `note` says why."""

    span: str
    start: datetime
    end: datetime
    rows: int
    subjects: int
    events: int
    evaluation: Evaluation | None = field(repr=False)
    note: str = ""


@dataclass(frozen=True)
class Performance:
    """The verdict on a model version.

    Attributes:
        status: ``ok``, ``degraded`` or ``insufficient_data``.
        current: the window that decides: the newest one, or all outcomes where it has too few.
        windows: consecutive windows, oldest first, then ``all`` and ``current``.
        baseline: the version's own evaluation at training.
        drop: AUROC at training less AUROC now; `drop_lower`: lower end of its 95 % interval.
        reasons: why it is degraded, or what is missing.
    """

    status: str
    current: Window | None
    windows: tuple[Window, ...]
    baseline: Evaluation | None = field(repr=False)
    drop: float | None
    drop_lower: float | None
    reasons: tuple[str, ...]

    def result(self) -> dict[str, Any]:
        """Return the verdict as the JSON that later steps read (times in ISO 8601)."""
        evaluation = self.current.evaluation if self.current else None
        metrics = {name: None if evaluation is None else _as_dict(getattr(evaluation, name)) for name in METRICS}
        return {
            "status": self.status,
            "rows": self.current.rows if self.current else 0,
            "events": self.current.events if self.current else 0,
            **metrics,
            "baseline": None
            if self.baseline is None
            else {name: getattr(self.baseline, name).value for name in METRICS},
            "drop": self.drop,
            "drop_lower": self.drop_lower,
            "window_start": self.current.start.isoformat() if self.current else None,
            "window_end": self.current.end.isoformat() if self.current else None,
            "span": self.current.span if self.current else None,
            "reasons": list(self.reasons),
        }


def assess(
    outcomes: pl.DataFrame, profile: TrialProfile, baseline: Evaluation | None, *, seed: int = 0, replicates: int = 1000
) -> Performance:
    """Evaluate one model version on the outcomes of its predictions.

    It is degraded when its AUROC is lower than at training by more than 5 % of it and the 95 % interval of the
    difference excludes 0; or when its calibration has shifted: the interval of the calibration intercept lies outside
    that at training, and the calibration error is above the bound of the trial's promotion rule.

    Args:
        outcomes: rows of ``gold/prediction_outcomes`` of this version.
        profile: the trial.
        baseline: the version's evaluation at training; None where it has none.
        seed: of the bootstrap over subjects.
        replicates: of the bootstrap; fewer are drawn from very many rows.
    """
    import polars as pl

    rows = one_a_feature_row(outcomes)
    if rows.is_empty():
        return Performance("insufficient_data", None, (), baseline, None, None, ("no prediction has an outcome yet",))
    first, last = _moment(rows["index_time"].min()), _moment(rows["index_time"].max())
    length = WINDOW_HORIZONS * profile.target.horizon
    in_series = min(replicates, 200)
    series = []
    for start, end in _windows(first, last, length):
        here = rows.filter((pl.col("index_time") > start) & (pl.col("index_time") <= end))
        if not here.is_empty():
            series.append(evaluated("window", start, end, here, profile, seed=seed, replicates=in_series))
    everything = evaluated("all", first - timedelta(microseconds=1), last, rows, profile, seed, replicates)
    newest = rows.filter(pl.col("index_time") > last - length)
    current = evaluated("current", last - length, last, newest, profile, seed, replicates)
    decisive = current if current.evaluation is not None else everything
    status, drop, lower, reasons = _verdict(decisive, baseline, profile)
    return Performance(status, decisive, (*series, everything, current), baseline, drop, lower, reasons)


def one_a_feature_row(outcomes: pl.DataFrame) -> pl.DataFrame:
    """Return the first prediction for each patient and index time: asking again tells nothing more about the model."""
    return outcomes.sort("predicted_at", "prediction_id").unique(
        ["patient_id", "index_time"], keep="first", maintain_order=True
    ).sort("index_time", "prediction_id")  # fmt: skip


def evaluated(
    span: str,
    start: datetime,
    end: datetime,
    rows: pl.DataFrame,
    profile: TrialProfile,
    seed: int = 0,
    replicates: int = 1000,
) -> Window:
    """Evaluate the outcomes of one window, overall and by site, sex and arm, if they are enough."""
    from clinical_orchestration.modeling.evaluate import evaluate

    subjects, events = rows["patient_id"].n_unique(), int(rows["outcome"].sum())
    note = _too_few(rows.height, events, subjects)
    if note:
        return Window(span, start, end, rows.height, subjects, events, None, note)
    evaluation = evaluate(
        rows["outcome"].to_numpy(),
        rows["probability"].to_numpy(),
        rows["patient_id"].to_numpy(),
        groups={name: rows[name].to_list() for name in ("site", "sex", "arm")} if span != "window" else None,
        thresholds={"medium_risk": profile.risk_bands.medium, "high_risk": profile.risk_bands.high},
        seed=seed,
        replicates=max(100, min(replicates, _BOOTSTRAP_CELLS // max(1, rows.height))),
    )
    return Window(span, start, end, rows.height, subjects, events, evaluation)


def table_rows(performance: Performance, common: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the verdict as rows of ``monitoring/model_performance``; `common` fills the columns of the run."""
    baseline = performance.baseline.auroc.value if performance.baseline else None
    found = []
    for window in performance.windows:
        decides = performance.current is window
        row = {
            **common,
            "span": window.span,
            "window_start": window.start,
            "window_end": window.end,
            "baseline_auroc": baseline,
            "status": performance.status if decides else None,
        }
        evaluation = window.evaluation
        head = {"attribute": "all", "value": "all", "note": window.note}
        if evaluation is None:
            counts = {"rows": window.rows, "subjects": window.subjects, "events": window.events}
            found.append({**row, **head, **(counts if window.subjects >= 5 else {})})
            continue
        counts = {"rows": evaluation.rows, "subjects": evaluation.subjects, "events": evaluation.events}
        metrics = {key: value for name in METRICS for key, value in _flat(name, getattr(evaluation, name))}
        mean = sum(item.mean_probability * item.rows for item in evaluation.bins) / evaluation.rows
        found.append({**row, **head, **counts, **metrics, "mean_probability": mean})
        for group in evaluation.groups:
            own = {key: value for name in METRICS[:3] for key, value in _flat(name, getattr(group, name))}
            few: dict[str, int | None] = {"rows": group.rows, "subjects": group.subjects, "events": group.events}
            labels = {"attribute": group.attribute, "value": group.value, "note": group.note}
            found.append({**row, **labels, **few, **own, "mean_probability": group.mean_probability})
    return found


def _verdict(
    window: Window, baseline: Evaluation | None, profile: TrialProfile
) -> tuple[str, float | None, float | None, tuple[str, ...]]:
    now = window.evaluation
    if now is None or now.auroc.value is None:
        return "insufficient_data", None, None, (window.note or "the outcomes do not determine an AUROC",)
    if baseline is None or baseline.auroc.value is None:
        return "ok", None, None, ("the version has no evaluation from its training to compare with",)
    drop = baseline.auroc.value - now.auroc.value
    lower = drop - math.hypot(_half(baseline.auroc, "lower"), _half(now.auroc, "upper"))
    reasons = []
    if drop > RELATIVE_DROP * baseline.auroc.value and lower > 0:
        reasons.append(
            f"AUROC {now.auroc} against {baseline.auroc} at training: lower by {drop:.3f}, at least {lower:.3f}"
        )
    here, then = now.calibration_intercept, baseline.calibration_intercept
    bound = profile.promotion.max_calibration_error
    if _outside(here, then) and now.ece.value is not None and now.ece.value > bound:
        direction = "under" if (here.value or 0.0) > 0 else "over"
        reasons.append(
            f"calibration error {now.ece} above {bound:g}: the risk is {direction}estimated (intercept {here}, at "
            f"training {then})"
        )
    return ("degraded" if reasons else "ok"), drop, lower, tuple(reasons)


def _half(estimate: Estimate, side: str) -> float:
    """Return the distance from the value to one end of its interval, 0 where the interval is not known."""
    end = getattr(estimate, side)
    return 0.0 if end is None or estimate.value is None else abs(estimate.value - end)


def _outside(here: Estimate, then: Estimate) -> bool:
    if here.lower is None or here.upper is None or then.value is None:
        return False
    low = then.value if then.lower is None else then.lower
    high = then.value if then.upper is None else then.upper
    return here.lower > high or here.upper < low


def _too_few(rows: int, events: int, subjects: int) -> str:
    if rows < MIN_ROWS:
        return f"{rows} outcomes; at least {MIN_ROWS} are needed"
    if min(events, rows - events) < MIN_OUTCOMES:
        return f"{events} events in {rows} outcomes; at least {MIN_OUTCOMES} with and without are needed"
    if subjects < MIN_SUBJECTS:
        return f"{subjects} subjects; at least {MIN_SUBJECTS} are needed"
    return ""


def _windows(first: datetime, last: datetime, length: timedelta) -> Iterator[tuple[datetime, datetime]]:
    """Yield the newest windows that cover the span, oldest first; they end with `last`."""
    count = min(MAX_WINDOWS, int((last - first) / length) + 1)
    for number in range(count - 1, -1, -1):
        yield last - (number + 1) * length, last - number * length


def _moment(value: Any) -> datetime:
    if not isinstance(value, datetime):
        raise TypeError(f"an index time is needed, got {type(value).__name__}")
    return value


def _flat(name: str, estimate: Estimate | None) -> Iterator[tuple[str, float | None]]:
    if estimate is not None:
        yield name, estimate.value
        yield f"{name}_lower", estimate.lower
        yield f"{name}_upper", estimate.upper


def _as_dict(estimate: Estimate) -> dict[str, float | None]:
    return {"value": estimate.value, "lower": estimate.lower, "upper": estimate.upper}
