"""How fast runs start and go: this platform's run launcher, stock Dagster and Airflow, side by side in one run."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MANY_STEPS = 1000
SCHEDULE = "every_minute"


def say(message: str) -> None:
    """Tell how far it is."""
    print(message, file=sys.stderr, flush=True)
