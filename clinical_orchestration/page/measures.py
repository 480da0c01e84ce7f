"""Data quality and model performance over time, as the newest materializations of their assets tell it.

The time series are the Delta tables ``monitoring/quality_scores`` and ``monitoring/model_performance``; each run leaves
the same figures with its assets in the instance, where they cost this process neither an engine for tables nor the
credentials of the lake.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dagster import DagsterInstance

QUALITY, PERFORMANCE = ("quality", "report"), ("monitoring", "performance")
METRICS = (
    ("auroc", "AUROC", True), ("auprc", "AUPRC", True), ("brier", "Brier score", False),
    ("ece", "calibration error", False),
)  # fmt: skip
READ = 200
SHOWN = 40
WIDTH, HEIGHT, PADDING = 120, 28, 3


@dataclass(frozen=True)
class Series:
    """One figure over time, oldest first. `bound` is what it is compared with; `good` None where nothing is."""

    name: str
    points: tuple[tuple[datetime, float], ...]
    bound: float | None = None
    bound_name: str = ""
    higher_is_better: bool = True
    judged: bool = False
    """Whether falling short of the bound is a fault; else the bound is only shown."""

    @property
    def latest(self) -> float:
        """The newest value."""
        return self.points[-1][1]

    @property
    def good(self) -> bool | None:
        """Whether the newest value keeps the bound; None where that is no question."""
        if self.bound is None or not self.judged:
            return None
        return self.latest >= self.bound if self.higher_is_better else self.latest <= self.bound

    @property
    def text(self) -> str:
        """What the picture shows, for those who do not see it."""
        values = [value for _, value in self.points]
        what = (
            f"{self.name}: {self.latest:.3f} on {self.points[-1][0]:%Y-%m-%d %H:%M} UTC; {len(values)} runs between "
            f"{min(values):.3f} and {max(values):.3f}"
        )
        return what if self.bound is None else f"{what}; {self.bound_name} {self.bound:.3f}"

    def _scale(self) -> tuple[float, float]:
        values = [value for _, value in self.points] + ([] if self.bound is None else [self.bound])
        low, high = min(values), max(values)
        # a change of a thousandth must not fill the picture
        room = max(0.0, 0.02 - (high - low)) / 2
        return low - room, high + room

    def _y(self, value: float) -> float:
        low, high = self._scale()
        return round(HEIGHT - PADDING - (value - low) / (high - low) * (HEIGHT - 2 * PADDING), 2)

    @property
    def line(self) -> str:
        """The points of the polyline in a picture of :data:`WIDTH` x :data:`HEIGHT`."""
        last = max(1, len(self.points) - 1)
        return " ".join(
            f"{PADDING + (WIDTH - 2 * PADDING) * index / last:.1f},{self._y(value)}"
            for index, (_, value) in enumerate(self.points)
        )

    @property
    def end(self) -> tuple[float, float]:
        """Where the newest value is in the picture."""
        return (WIDTH - PADDING if len(self.points) > 1 else PADDING), self._y(self.latest)

    @property
    def bound_y(self) -> float | None:
        """Height of the bound in the picture."""
        return None if self.bound is None else self._y(self.bound)


@dataclass(frozen=True)
class Measures:
    """The series of one trial, and why there is no figure where the newest run had too few data."""

    trial: str
    quality: tuple[Series, ...]
    performance: tuple[Series, ...]
    note: str = ""


def read_measures(instance: DagsterInstance) -> tuple[Measures, ...]:
    """Return the series of every trial that has any, by name."""
    return measures_of(_results(instance, QUALITY), _results(instance, PERFORMANCE))


def _results(instance: DagsterInstance, key: Sequence[str]) -> list[tuple[datetime, str, Mapping[str, Any]]]:
    """Return (when, trial, result) of the newest materializations of an asset, oldest first."""
    from dagster import AssetKey

    found: list[tuple[datetime, str, Mapping[str, Any]]] = []
    for record in instance.fetch_materializations(AssetKey(list(key)), limit=READ).records:
        metadata = record.asset_materialization.metadata if record.asset_materialization else {}
        result = metadata["result"].value if "result" in metadata else None
        if "trial" in metadata and isinstance(result, dict):
            found.append((datetime.fromtimestamp(record.timestamp, UTC), str(metadata["trial"].value), result))
    return found[::-1]


def measures_of(
    quality: Sequence[tuple[datetime, str, Mapping[str, Any]]],
    performance: Sequence[tuple[datetime, str, Mapping[str, Any]]],
) -> tuple[Measures, ...]:
    """Return the series of each trial from (when, trial, result), oldest first.

    Args:
        quality: results of ``quality/report``: ``scores`` by table and ``threshold``.
        performance: results of ``monitoring/performance``: the metrics with their ``value``, and ``baseline``.
    """
    found = []
    for trial in sorted({name for _, name, _ in (*quality, *performance)}):
        reports = [(at, result) for at, name, result in quality if name == trial]
        verdicts = [(at, result) for at, name, result in performance if name == trial]
        tables = dict.fromkeys(table for _, result in reports for table in result.get("scores") or {})
        scores = [
            _series(
                table.replace("_", " "),
                [(at, (result.get("scores") or {}).get(table)) for at, result in reports],
                reports[-1][1].get("threshold"), "threshold", judged=True,
            )
            for table in tables
        ]  # fmt: skip
        metrics = [
            _series(
                label,
                [(at, (result.get(metric) or {}).get("value")) for at, result in verdicts],
                (verdicts[-1][1].get("baseline") or {}).get(metric), "at training", higher_is_better=higher,
            )
            for metric, label, higher in METRICS
            if verdicts
        ]  # fmt: skip
        newest = verdicts[-1][1] if verdicts else {}
        reasons = "; ".join(str(reason) for reason in newest.get("reasons") or ())
        note = {"insufficient_data": "too few data", "degraded": "degraded"}.get(str(newest.get("status")), "")
        found.append(
            Measures(
                trial,
                tuple(one for one in scores if one is not None),
                tuple(one for one in metrics if one is not None),
                f"{note}: {reasons}" if note and reasons else note,
            )
        )
    return tuple(found)


def _series(
    name: str,
    points: Sequence[tuple[datetime, Any]],
    bound: Any,
    bound_name: str,
    *,
    higher_is_better: bool = True,
    judged: bool = False,
) -> Series | None:
    """Return a series of the newest points that have a value; None where no point has one."""
    known = tuple((at, float(value)) for at, value in points if isinstance(value, int | float))[-SHOWN:]
    if not known:
        return None
    limit = float(bound) if isinstance(bound, int | float) else None
    return Series(name, known, limit, bound_name, higher_is_better, judged)
