"""Training frames in the shape that the feature room gives, with a known truth."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import polars as pl

FEATURES = ("risk", "noise_1", "noise_2", "noise_3", "with_gaps", "never_there")


def training_frame(
    subjects: int = 60, visits: int = 8, *, seed: int = 1, signal: float = 1.2, subject_effect: float = 0.0
) -> pl.DataFrame:
    """Return rows whose label depends on ``risk`` (by `signal`) and on who the subject is (`subject_effect`).

    ``noise_1`` to ``noise_3`` are constant within a subject: they identify the subject and say nothing about others.
    """
    import polars as pl

    rng = np.random.default_rng(seed)
    rows = subjects * visits
    subject = np.repeat(np.arange(subjects), visits)
    risk = rng.normal(size=rows)
    log_odds = -1.1 + signal * risk + subject_effect * rng.normal(size=subjects)[subject]
    label = (rng.random(rows) < 1 / (1 + np.exp(-log_odds))).astype(int)
    gaps = np.where(rng.random(rows) < 0.3, np.nan, rng.normal(size=rows))
    start = datetime(2025, 1, 1, 23, 59, 59, tzinfo=UTC)
    times = [start + timedelta(days=14 * (row % visits)) for row in range(rows)]
    own = rng.normal(size=(subjects, 3))
    frame = pl.DataFrame(
        {
            "trial": ["made-up"] * rows,
            "patient_id": [f"SECRET-{number:04d}" for number in subject],
            "feature_time": times,
            "feature_date": [time.date() for time in times],
            "risk": risk,
            **{f"noise_{i + 1}": own[subject, i] for i in range(3)},
            "with_gaps": gaps,
            "never_there": pl.Series([None] * rows, dtype=pl.Float64),
            "label": label,
            "site": [f"site {number % 4}" for number in subject],
            "sex": [None if number == 0 else "FM"[number % 2] for number in subject],
            "arm": [("placebo", "active")[int(number % 3 > 0)] for number in subject],
        }
    )
    return frame.with_columns(pl.col("with_gaps").fill_nan(None))
