"""What "now" is for a trial: freshness, outcomes and conditions are measured against it.

Historical and simulated trials have their records years away from the wall clock. Measured by the wall clock all of
their sources would be stale and all of their horizons passed, whatever the data say; their clock is their data.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from clinical_orchestration.trials.profile import TrialProfile


def trial_now(profile: TrialProfile, newest: datetime | None, wall: datetime) -> datetime:
    """Return the trial's present, in UTC.

    Args:
        profile: says which clock the trial has.
        newest: time of the newest record that the trial has, over all of its tables; None where it has none.
        wall: the wall clock.

    Returns:
        `newest` for a trial whose clock is its data, if it has data; else `wall`.

    Raises:
        ValueError: a time without a zone.
    """
    for name, time in (("newest", newest), ("wall", wall)):
        if time is not None and time.tzinfo is None:
            raise ValueError(f"{name} needs a time zone, got {time!r}")
    return (newest if profile.clock == "data" and newest is not None else wall).astimezone(UTC)
