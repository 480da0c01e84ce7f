"""Plots of monitoring as PNG bytes. They show figures of whole populations, never a subject."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any

import numpy as np

from clinical_orchestration.transforms.plotting import BLUE, GREY, INK, ORANGE, RED, png


def performance_plot(windows: Sequence[Mapping[str, Any]], baseline: float | None) -> bytes | None:
    """Return AUROC by window with intervals, and the share of events against the mean prediction; None without data.

    Args:
        windows: rows of ``monitoring/model_performance`` with the span ``window`` and attribute ``all``, oldest first.
        baseline: AUROC at training.
    """
    rows = [row for row in windows if row.get("auroc") is not None]
    if not rows:
        return None
    times = [row["window_end"] for row in rows]

    def draw(axes: Any) -> None:
        upper, lower = axes
        values = np.array([row["auroc"] for row in rows], dtype=float)
        low = np.array([_or(row.get("auroc_lower"), row["auroc"]) for row in rows])
        high = np.array([_or(row.get("auroc_upper"), row["auroc"]) for row in rows])
        upper.errorbar(times, values, yerr=[values - low, high - values], color=BLUE, marker="o", ms=4, lw=1.5,
                       elinewidth=1, capsize=2, label="AUROC, 95 % interval")  # fmt: skip
        if baseline is not None:
            upper.axhline(baseline, color=GREY, ls="--", lw=1, label=f"at training, {baseline:.3f}")
        upper.set_ylim(min(0.4, float(low.min()) - 0.02), 1.0)
        upper.set_title("Discrimination over time")
        upper.legend(loc="lower left", ncols=2, fontsize=8)
        observed = [_share(row) for row in rows]
        lower.plot(times, observed, color=ORANGE, marker="o", ms=4, lw=1.5, label="observed events")
        lower.plot(times, [row["mean_probability"] for row in rows], color=BLUE, marker="s", ms=3, lw=1.5, ls="--",
                   label="predicted")  # fmt: skip
        lower.set_title("Calibration in the large over time")
        lower.set_ylim(0, 1.25 * max(0.05, *observed, *(row["mean_probability"] for row in rows)))
        lower.legend(loc="upper left", ncols=2, fontsize=8)
        if len(rows) == 1:  # else the axis spans years
            lower.set_xlim(times[0] - timedelta(days=2), times[0] + timedelta(days=2))

    return png(draw, (7.2, 5.0), rows=2, share_x=True, caption="By window of index times, UTC")


def drift_plot(features: Sequence[tuple[str, float, bool]], bound: float, top: int = 25) -> bytes | None:
    """Return the largest population stability indices as bars: (feature, index, drifted); None without features."""
    shown = sorted(features, key=lambda item: (-item[1], item[0]))[:top][::-1]
    if not shown:
        return None

    def draw(ax: Any) -> None:
        ax.barh([name.replace("_", " ") for name, _, _ in shown], [psi for _, psi, _ in shown],
                color=[RED if drifted else GREY for _, _, drifted in shown], height=0.66)  # fmt: skip
        ax.axvline(bound, color=INK, lw=1, ls="--")
        ax.grid(visible=False, axis="y")
        ax.tick_params(axis="y", labelsize=8, length=0)
        ax.set_xlabel(f"population stability index; dashed: {bound:g}; red: significant and larger")
        ax.set_title("Features that differ most from the training set")

    return png(draw, (7.2, max(2.2, 0.26 * len(shown) + 1.1)))


def history_plot(runs: Sequence[tuple[datetime, float, int]], bound: float) -> bytes | None:
    """Return the drift by run: (time, largest index of a drifted feature, drifted features); None below two runs."""
    if len(runs) < 2:
        return None

    def draw(axes: Any) -> None:
        upper, lower = axes
        times = [time for time, _, _ in runs]
        upper.plot(times, [psi for _, psi, _ in runs], color=BLUE, marker="o", ms=3, lw=1.3)
        upper.axhline(bound, color=GREY, ls="--", lw=1)
        upper.set_title("Largest population stability index of a drifted feature, by run")
        lower.step(times, [count for _, _, count in runs], where="post", color=RED, lw=1.3)
        lower.set_title("Drifted features, by run")
        lower.set_ylim(bottom=0)

    return png(draw, (7.2, 4.4), rows=2, share_x=True, caption="Time of the run, UTC")


def _share(row: Mapping[str, Any]) -> float:
    return float(row["events"]) / float(row["rows"]) if row.get("rows") else float("nan")


def _or(value: Any, other: Any) -> float:
    return float(other if value is None else value)
