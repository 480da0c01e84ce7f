"""The report page: self-contained, escaped, with the plots that there is something to show for."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from clinical_orchestration.quality.report import ReportContent, plots, render

NOW = datetime(2025, 3, 1, 12, tzinfo=UTC)
SCORES = [
    {"table": "patient_vitals", "rows": 1000, "score": 0.91, "completeness": 1.0, "validity": 0.99, "acceptance": 0.92,
     "coverage": 0.97},
    {"table": "subjects", "rows": 10, "score": 1.0, "completeness": 1.0, "validity": 1.0, "acceptance": 1.0,
     "coverage": None},
]  # fmt: skip
STALE = {
    "source": "lab_results/S3", "level": "site", "status": "stale", "newest": "2025-02-25T00:00:00+00:00",
    "silence_hours": 108.0, "rhythm_hours": 24.0, "bound_hours": 60.0, "records": 400,
}  # fmt: skip
RULE = {
    "rule": "DQ-XD-06", "table": "lab_results", "description": "One <unit> & no other", "severity": "warning",
    "checked": 10, "failed": 3, "passed": False, "positions": ["l-0-1"], "groups": {"<b>ALT</b>": 3},
}  # fmt: skip


def content(**more: Any) -> ReportContent:
    values: dict[str, Any] = {
        "trial": "simulated", "title": "A <script>alert(1)</script> trial", "attribution": "", "as_of": NOW,
        "made_at": NOW, "run_id": "run", "threshold": 0.95, "scores": SCORES,
    }  # fmt: skip
    return ReportContent(**{**values, **more})


def test_text_from_data_is_escaped() -> None:
    page = render(content(rules=[RULE])).decode()
    assert "<script>" not in page
    assert "<b>ALT</b>" not in page
    assert "One &lt;unit&gt; &amp; no other" in page


def test_what_is_wrong_is_on_the_page() -> None:
    anomaly = {"rule": "DQ-AN-07", "site": "S2", "description": "Much is rejected", "q_value": 1e-9,
               "severity": "error"}  # fmt: skip
    page = render(content(sources=[STALE], anomalies=[anomaly], rules=[RULE])).decode()
    for text in ("lab_results/S3", "Much is rejected", "DQ-XD-06", "0.910", "97.0 %"):
        assert text in page
    assert "Every source that is expected to send does." not in page


def test_there_is_a_plot_for_everything_there_is_and_none_for_the_rest() -> None:
    assert plots(content()) == {}
    full = content(
        history=[{"table": "patient_vitals", "scored_at": NOW, "score": 0.9}],
        sources=[STALE],
        coverage=[{"table": "lab_results", "site": "S1", "test": "ALT", "expected": 10, "received": 9}],
        rejected=[{"table": "lab_results", "site": "S1", "rejected": 1, "total": 10}],
    )
    made = plots(full)
    assert len(made) == 4
    assert all(png.startswith(b"\x89PNG") and len(png) > 2000 for png in made.values())
    page = render(full).decode()
    assert page.count("data:image/png;base64,") == 4
    assert "http" not in page.replace("http-equiv", "")


def test_the_lowest_score_decides() -> None:
    assert content().lowest == 0.91
    assert content(scores=[]).lowest == 1.0
