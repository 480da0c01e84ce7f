"""The report's page, plots and Evidently's part."""

import time
from datetime import UTC, datetime, timedelta

import numpy as np
import pytest

from clinical_orchestration.monitoring.drift import Sample
from clinical_orchestration.monitoring.plots import drift_plot, history_plot, performance_plot
from clinical_orchestration.monitoring.report import EVIDENTLY_COLUMNS, evidently_report, page

NOW = datetime(2025, 1, 9, tzinfo=UTC)


def test_page_needs_nothing_from_outside_and_escapes_what_it_shows() -> None:
    text = page(
        "<b>Report</b>", NOW, {"Drift": ("drift", "PSI > 0.2 & rising")}, {"Plot": b"\x89PNG", "None": None},
        {"Table": (("a", "b"), [("x<y", 0.123456), (None, True)]), "Empty": (("a",), [])}, {"Evidently": "s3://b/k"},
    ).decode()  # fmt: skip
    assert "<b>Report" not in text
    assert "PSI &gt; 0.2 &amp; rising" in text
    assert "x&lt;y" in text
    assert "0.123<" in text
    assert "data:image/png;base64," in text
    assert "http" not in text
    assert "Empty" not in text


def test_plots_are_pictures_or_nothing() -> None:
    window = {"window_end": NOW, "auroc": 0.7, "auroc_lower": 0.6, "auroc_upper": 0.8, "rows": 100, "events": 20,
              "mean_probability": 0.2}  # fmt: skip
    later = {**window, "window_end": NOW + timedelta(days=1), "auroc_lower": None}
    for png in (
        performance_plot([window, later, {**window, "auroc": None}], 0.72),
        drift_plot([("heart_rate_latest", 0.4, True), ("age_years", 0.01, False)], 0.2),
        history_plot([(NOW, 0.1, 0), (NOW + timedelta(hours=2), 0.5, 3)], 0.2),
    ):
        assert png is not None
        assert png.startswith(b"\x89PNG")
    assert performance_plot([{"auroc": None}], None) is None
    assert drift_plot([], 0.2) is None
    assert history_plot([(NOW, 0.1, 0)], 0.2) is None


def test_evidently_reports_a_bounded_number_of_columns_in_seconds() -> None:
    rng = np.random.default_rng(0)
    names = tuple(f"feature_{number}" for number in range(60))
    reference = Sample(names, rng.normal(size=(5000, 60)), np.arange(5000))
    current = Sample(names, np.where(np.arange(60) == 1, np.nan, rng.normal(0.5, 1, size=(3000, 60))), np.arange(3000))
    started = time.process_time()  # of this process: others load the machine
    html = evidently_report(reference, current, names, bound=0.2)
    assert time.process_time() - started < 20
    assert "feature_0" in html
    assert "feature_1<" not in html
    assert '"feature_1"' not in html  # without a value now
    assert f'"feature_{EVIDENTLY_COLUMNS}"' in html
    assert f'"feature_{EVIDENTLY_COLUMNS + 1}"' not in html


def test_evidently_needs_a_feature_with_values_on_both_sides() -> None:
    nothing = Sample(("a",), np.full((5, 1), np.nan), np.arange(5))
    with pytest.raises(ValueError, match="no feature"):
        evidently_report(nothing, nothing, ("a", "unknown"), bound=0.2)
