"""Plots of monitoring as PNG bytes. They show figures of whole populations, never a subject."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any

import numpy as np

_BLUE, _ORANGE, _RED, _GREY, _INK = "#1f5fa8", "#d9731a", "#b3261e", "#8a8f98", "#22262b"
_STYLE: dict[Any, Any] = {
    "font.size": 9.5,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.edgecolor": "#c4c8ce",
    "axes.labelcolor": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e8eaee",
    "legend.frameon": False,
    "figure.dpi": 90,
}


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
        upper.errorbar(times, values, yerr=[values - low, high - values], color=_BLUE, marker="o", ms=4, lw=1.5,
                       elinewidth=1, capsize=2, label="AUROC, 95 % interval")  # fmt: skip
        if baseline is not None:
            upper.axhline(baseline, color=_GREY, ls="--", lw=1, label=f"at training, {baseline:.3f}")
        upper.set_ylim(min(0.4, float(low.min()) - 0.02), 1.0)
        upper.set_title("Discrimination over time")
        upper.legend(loc="lower left", ncols=2, fontsize=8)
        observed = [_share(row) for row in rows]
        lower.plot(times, observed, color=_ORANGE, marker="o", ms=4, lw=1.5, label="observed events")
        lower.plot(times, [row["mean_probability"] for row in rows], color=_BLUE, marker="s", ms=3, lw=1.5, ls="--",
                   label="predicted")  # fmt: skip
        lower.set_title("Calibration in the large over time")
        lower.set_ylim(0, 1.25 * max(0.05, *observed, *(row["mean_probability"] for row in rows)))
        lower.legend(loc="upper left", ncols=2, fontsize=8)
        if len(rows) == 1:  # else the axis spans years
            lower.set_xlim(times[0] - timedelta(days=2), times[0] + timedelta(days=2))

    return _figure(draw, (7.2, 5.0), 2, "By window of index times, UTC")


def drift_plot(features: Sequence[tuple[str, float, bool]], bound: float, top: int = 25) -> bytes | None:
    """Return the largest population stability indices as bars: (feature, index, drifted); None without features."""
    shown = sorted(features, key=lambda item: (-item[1], item[0]))[:top][::-1]
    if not shown:
        return None

    def draw(axes: Any) -> None:
        (ax,) = axes
        ax.barh([name.replace("_", " ") for name, _, _ in shown], [psi for _, psi, _ in shown],
                color=[_RED if drifted else _GREY for _, _, drifted in shown], height=0.66)  # fmt: skip
        ax.axvline(bound, color=_INK, lw=1, ls="--")
        ax.grid(visible=False, axis="y")
        ax.tick_params(axis="y", labelsize=8, length=0)
        ax.set_xlabel(f"population stability index; dashed: {bound:g}; red: significant and larger")
        ax.set_title("Features that differ most from the training set")

    return _figure(draw, (7.2, max(2.2, 0.26 * len(shown) + 1.1)), 1, "")


def history_plot(runs: Sequence[tuple[datetime, float, int]], bound: float) -> bytes | None:
    """Return the drift by run: (time, largest index of a drifted feature, drifted features); None below two runs."""
    if len(runs) < 2:
        return None

    def draw(axes: Any) -> None:
        upper, lower = axes
        times = [time for time, _, _ in runs]
        upper.plot(times, [psi for _, psi, _ in runs], color=_BLUE, marker="o", ms=3, lw=1.3)
        upper.axhline(bound, color=_GREY, ls="--", lw=1)
        upper.set_title("Largest population stability index of a drifted feature, by run")
        lower.step(times, [count for _, _, count in runs], where="post", color=_RED, lw=1.3)
        lower.set_title("Drifted features, by run")
        lower.set_ylim(bottom=0)

    return _figure(draw, (7.2, 4.4), 2, "Time of the run, UTC")


def _share(row: Mapping[str, Any]) -> float:
    return float(row["events"]) / float(row["rows"]) if row.get("rows") else float("nan")


def _or(value: Any, other: Any) -> float:
    return float(other if value is None else value)


def _figure(draw: Callable[[Any], None], size: tuple[float, float], count: int, caption: str) -> bytes:
    """Draw on a figure of its own: pyplot would keep every figure of a long-lived process."""
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots(count, 1, squeeze=False, sharex=count > 1)[:, 0]
        draw(axes)
        if count > 1:
            axes[-1].tick_params(axis="x", labelrotation=20)
        figure.supxlabel(caption, fontsize=7, color="#6a7079")
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()
