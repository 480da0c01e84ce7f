"""The figures: which were measured, which are wanted, and the table and plot that say so."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

FIRST, END = "12 empty tasks: trigger to first step", "12 empty tasks: trigger to success"
BURST, MANY = "runs of 3 in-process steps, submitted at once", "1,000 steps in one run"
CREATED, TICKED = "schedule: tick to run created", "schedule: tick to first step"
IDLE, MEMORY = "idle daemon, of one core", "warm parent with its waiting children"
FASTER = "12 empty tasks, trigger to success: forked steps are faster than"

IN_PROCESS, FORKED, QUEUED = "ours, in-process", "ours, forked steps", "ours, forked steps, through the queue"
QUEUED_IN_PROCESS = "ours, in-process, through the queue"
STOCK, STOCK_MULTI, AIRFLOW = "stock Dagster, in-process", "stock Dagster, multiprocess", "Airflow, LocalExecutor"
OURS_DAEMON, STOCK_DAEMON = "ours", "stock Dagster"


@dataclass(frozen=True)
class Target:
    """What the median is to be."""

    value: float
    at_least: bool = False

    def reached(self, values: Sequence[float]) -> bool:
        """Whether the median of measured values is as wanted."""
        middle = statistics.median(values)
        return middle >= self.value if self.at_least else middle < self.value

    def text(self, unit: str) -> str:
        """Return it as the table shows it."""
        return f"{'≥' if self.at_least else '<'} {self.value:g} {unit}"


TARGETS: Mapping[tuple[str, str], Target] = {
    **{(FIRST, side): Target(0.2) for side in (IN_PROCESS, FORKED, QUEUED_IN_PROCESS, QUEUED)},
    **{(END, side): Target(0.35) for side in (IN_PROCESS, QUEUED_IN_PROCESS)},
    **{(END, side): Target(0.9) for side in (FORKED, QUEUED)},
    (FASTER, AIRFLOW): Target(12, at_least=True),
    (FASTER, STOCK_MULTI): Target(25, at_least=True),
    **{(BURST, side): Target(8, at_least=True) for side in (IN_PROCESS, QUEUED_IN_PROCESS)},
    (TICKED, QUEUED_IN_PROCESS): Target(1),
    (IDLE, OURS_DAEMON): Target(3),
    (MEMORY, OURS_DAEMON): Target(400),
}
UNITS: Mapping[str, str] = {
    FIRST: "s",
    END: "s",
    FASTER: "times",
    BURST: "runs/s",
    MANY: "steps/s",
    CREATED: "s",
    TICKED: "s",
    IDLE: "%",
    MEMORY: "MB",
}
"""What is measured, in the order of the table."""


@dataclass
class Figures:
    """What was measured: values by what was measured and on which side, in the order of the table."""

    values: dict[tuple[str, str], list[float]] = field(default_factory=dict)

    def add(self, what: str, side: str, *values: float) -> None:
        """Note values."""
        self.values.setdefault((what, side), []).extend(values)

    def add_ratio(self, side: str, mine: float, other: float) -> None:
        """Note, of one round, how many times longer another side took than forked steps."""
        self.add(FASTER, side, other / mine)


def digits(value: float) -> str:
    """Return a number with as many digits as mean something."""
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def table(figures: Figures) -> str:
    """Return the Markdown table of what was measured, with what was wanted of it."""
    lines = [
        "| figure | | minimum | median | maximum | | n | target (median) | |",
        "|---|---|--:|--:|--:|---|--:|---|---|",
    ]
    order = list(UNITS)
    for (what, side), values in sorted(figures.values.items(), key=lambda item: order.index(item[0][0])):
        target, unit = TARGETS.get((what, side)), UNITS[what]
        said = ("", "") if target is None else (
            target.text(unit), "reached" if target.reached(values) else "**not reached**"
        )  # fmt: skip
        numbers = [digits(value) for value in (min(values), statistics.median(values), max(values))]
        lines.append("| " + " | ".join([what, side, *numbers, unit, str(len(values)), *said]) + " |")
    return "\n".join(lines)


def plot(figures: Figures, path: Path) -> None:
    """Draw the medians of the 12 tasks, with the single values as points, on a logarithmic axis."""
    import matplotlib as mpl
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    sides = [side for what, side in figures.values if what == END]
    shape = Figure(figsize=(8, 0.5 * len(sides) + 1.4), layout="constrained")
    FigureCanvasSVG(shape)
    axes = shape.subplots()
    for what, shift, color, label in (
        (END, 0.19, "#c44e52", "to success"),
        (FIRST, -0.19, "#4c72b0", "to the first step's start"),
    ):
        for row, side in enumerate(sides):
            values = figures.values[what, side]
            middle = statistics.median(values)
            axes.barh(row + shift, middle, 0.36, color=color, label=label if row == 0 else None)
            axes.plot(values, [row + shift] * len(values), "|", color="black", markersize=5)
            axes.annotate(f" {digits(middle)} s", (max(values), row + shift), va="center", fontsize=8)
    axes.set_yticks(range(len(sides)), sides)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlim(0.02, 3 * max(max(figures.values[END, side]) for side in sides))
    axes.set_xlabel("seconds from the trigger (logarithmic); bar: median, marks: single runs")
    axes.set_title("12 empty tasks", fontsize=10)
    axes.legend(loc="upper right", fontsize=8)
    with mpl.rc_context({"svg.hashsalt": "orchestration", "svg.fonttype": "none"}):
        shape.savefig(path, metadata={"Date": None})


def document(figures: Figures, about: Sequence[str], picture: str) -> str:
    """Return the page: what was measured how, the table, and the plot's place.

    Args:
        figures: what was measured.
        about: paragraphs that say how.
        picture: name of the plot's file beside the page; empty when there is none.
    """
    parts = ["# How fast runs start and go", *about, table(figures)]
    if picture:
        parts.append(f"![Seconds from trigger to first step and to success]({picture})")
    return "\n\n".join(parts) + "\n"
