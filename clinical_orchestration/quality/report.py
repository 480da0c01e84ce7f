"""The quality report: one HTML file with its plots inside, and nothing that identifies a patient."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_GOOD, _BAD, _SOFT = "#2a6f97", "#b3261e", "#8797a7"
_COLORS = ("#2a6f97", "#b3261e", "#5f7a1f", "#8a4f9e", "#b26a00")
_SHOWN = 24  # bars or rows of a plot


@dataclass(frozen=True)
class ReportContent:
    """What a report shows; all of it plain results of the quality steps.

    Attributes:
        trial: name of the trial.
        title: its title.
        attribution: whose data they are, empty for none.
        as_of: the trial's present.
        made_at: when the report is made.
        run_id: by which run.
        threshold: lowest score that passes.
        scores: ``table, rows, score, completeness, validity, acceptance, coverage`` of each table.
        history: ``table, scored_at, score`` of this and earlier runs.
        rules: results of all rules (:meth:`.results.RuleResult.as_dict`).
        sources: freshness of all sources (:meth:`.freshness.Freshness.as_dict`).
        anomalies: (:meth:`.anomalies.Anomaly.as_dict`).
        coverage: ``table, site, test, expected, received``.
        rejected: ``table, site, rejected, total``.
    """

    trial: str
    title: str
    attribution: str
    as_of: datetime
    made_at: datetime
    run_id: str
    threshold: float
    scores: Sequence[Mapping[str, Any]]
    history: Sequence[Mapping[str, Any]] = ()
    rules: Sequence[Mapping[str, Any]] = ()
    sources: Sequence[Mapping[str, Any]] = ()
    anomalies: Sequence[Mapping[str, Any]] = ()
    coverage: Sequence[Mapping[str, Any]] = ()
    rejected: Sequence[Mapping[str, Any]] = field(default_factory=tuple)

    @property
    def lowest(self) -> float:
        """The lowest score; 1.0 without tables."""
        return min((float(row["score"]) for row in self.scores), default=1.0)


def render(content: ReportContent) -> bytes:
    """Return the report as one self-contained HTML file in UTF-8."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("clinical_orchestration.quality"), autoescape=True, undefined=StrictUndefined
    )
    broken = [row for row in content.rules if not row["passed"]]
    text = environment.get_template("quality_report.html").render(
        trial=content.trial,
        title=content.title,
        attribution=content.attribution,
        as_of=f"{content.as_of:%Y-%m-%d %H:%M}",
        made_at=f"{content.made_at:%Y-%m-%d %H:%M:%S}",
        run_id=content.run_id,
        threshold=content.threshold,
        lowest=content.lowest,
        passed=content.lowest >= content.threshold,
        scores=content.scores,
        stale=[row for row in content.sources if row["status"] == "stale"],
        anomalies=content.anomalies,
        broken=sorted(broken, key=lambda row: (row["severity"] != "error", -row["failed"])),
        rules=content.rules,
        plots=[{"title": title, "png": base64.b64encode(png).decode("ascii")} for title, png in plots(content).items()],
    )
    return text.encode()


def plots(content: ReportContent) -> dict[str, bytes]:
    """Return the plots that there is something to show for: title -> PNG."""
    made = {
        "Score of each table over time": _score_history(content),
        "Silence of each source, in multiples of what is usual for it": _silence(content),
        "Share of expected measurements that arrived, by site and test": _coverage(content),
        "Share of rejected records, by site": _rejected(content),
    }
    return {title: _png(figure) for title, figure in made.items() if figure is not None}


def _figure(width: float, height: float) -> tuple[Figure, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")  # no pyplot: it keeps figures of a process for ever
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _png(figure: Figure) -> bytes:
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=110)
    return stream.getvalue()


def _score_history(content: ReportContent) -> Figure | None:
    if not content.history:
        return None
    figure, axes = _figure(9, 3)
    for number, table in enumerate(sorted({str(row["table"]) for row in content.history})):
        rows = sorted((row for row in content.history if row["table"] == table), key=lambda row: row["scored_at"])
        axes.plot(
            [row["scored_at"] for row in rows], [row["score"] for row in rows], marker="o", markersize=3,
            label=table.replace("_", " "), color=_COLORS[number % len(_COLORS)],
        )  # fmt: skip
    axes.axhline(content.threshold, color=_SOFT, linestyle="--", linewidth=1, label="threshold")
    lowest = min(min(float(row["score"]) for row in content.history), content.threshold)
    axes.set_ylim(max(0.0, lowest - 0.02), 1.002)
    axes.set_ylabel("score")
    axes.legend(fontsize=8, ncols=3, frameon=False)
    figure.autofmt_xdate()
    return figure


def _silence(content: ReportContent) -> Figure | None:
    judged = [row for row in content.sources if row["bound_hours"] and row["status"] in ("fresh", "stale")]
    rows = sorted(judged, key=lambda row: row["silence_hours"] / row["bound_hours"], reverse=True)[:_SHOWN]
    if not rows:
        return None
    figure, axes = _figure(9, 0.6 + 0.24 * len(rows))
    ratios = [row["silence_hours"] / row["bound_hours"] for row in rows]
    colors = [_BAD if row["status"] == "stale" else _GOOD for row in rows]
    axes.barh(range(len(rows)), ratios, color=colors)
    axes.set_yticks(range(len(rows)), [row["source"] for row in rows], fontsize=8)
    axes.invert_yaxis()
    axes.axvline(1.0, color=_SOFT, linestyle="--", linewidth=1)
    axes.set_xlabel("silence / bound (stale above 1)")
    return figure


def _coverage(content: ReportContent) -> Figure | None:
    import numpy as np

    cells = [row for row in content.coverage if row["site"] and row["expected"]]
    sites = sorted({str(row["site"]) for row in cells})
    shares: dict[str, list[float]] = {}
    for row in cells:
        shares.setdefault(str(row["test"]), []).append(row["received"] / row["expected"])
    tests = sorted(shares, key=lambda test: min(shares[test]))[:_SHOWN]
    if not sites or not tests:
        return None
    grid = np.full((len(tests), len(sites)), np.nan)
    for row in cells:
        if row["test"] in tests:
            grid[tests.index(row["test"]), sites.index(str(row["site"]))] = row["received"] / row["expected"]
    figure, axes = _figure(2.5 + 0.42 * len(sites), 1.2 + 0.26 * len(tests))
    image = axes.imshow(grid, aspect="auto", cmap="viridis", vmin=min(0.8, float(np.nanmin(grid))), vmax=1.0)
    axes.set_xticks(range(len(sites)), sites, rotation=60, ha="right", fontsize=8)
    axes.set_yticks(range(len(tests)), tests, fontsize=8)
    figure.colorbar(image, label="received / expected")
    return figure


def _rejected(content: ReportContent) -> Figure | None:
    totals: dict[str, list[int]] = {}
    for row in content.rejected:
        if row["site"]:
            entry = totals.setdefault(str(row["site"]), [0, 0])
            entry[0] += row["rejected"]
            entry[1] += row["total"]
    rows = sorted(totals.items(), key=lambda item: item[1][0] / max(1, item[1][1]), reverse=True)[:_SHOWN]
    if not rows:
        return None
    figure, axes = _figure(9, 0.8 + 0.24 * len(rows))
    axes.barh(range(len(rows)), [100 * hits / max(1, n) for _, (hits, n) in rows], color=_GOOD)
    axes.set_yticks(range(len(rows)), [site for site, _ in rows], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("% of the site's records")
    return figure
