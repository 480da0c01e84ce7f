"""Whether each source still sends, judged by its own rhythm.

A source is a table of a trial, a site, a test at a site or a laboratory. Its rhythm comes from its history: of the gaps
between its records, weighted by their length (the gap that a random moment falls into), the high quantile, without
outages. Weighting makes bursts harmless: a laboratory that sends 300 results each morning has a rhythm of a day, not of
seconds. For a regular source the quantile is its period; for a Poisson source of mean gap m it is 4.7 m, so that the
bound of 2.5 times the quantile is passed by chance once in 10^5 looks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import numpy as np
    import polars as pl

FACTOR = 2.5
"""A source is stale when its silence is longer than this many times its rhythm: two turns were missed."""

QUANTILE = 0.95
OUTAGE = 5.0
"""Gaps of more than this many times the middle one are outages of the past and no part of the rhythm."""

_DAY = 86_400.0
DAYS_KNOWN = 3
"""Before so many days nobody knows what a source does at night: until then it may be silent for FIRST_BOUND."""

FIRST_BOUND = 1.25 * _DAY
OUTAGE_SHARE = 0.4
"""Largest share of the time that outages can have taken."""

MIN_GAPS = 4
"""With fewer distinct gaps than this there is no rhythm yet."""

MIN_PATIENTS = 3
"""A source below a table needs so many patients: numbers that only name one specimen are no source."""

ACTIVE_SHARE = 0.34
"""A source is expected to send while at least this share of its patients is still observed."""

LENDERS = 3
"""A source without a rhythm of its own borrows the middle one of so many others or more."""

Status = Literal["fresh", "stale", "closed", "new"]


@dataclass(frozen=True)
class Freshness:
    """One source and its silence.

    Attributes:
        source: name, from coarse to fine, such as ``lab_results/SITE-003/ALT``.
        level: ``table``, ``site``, ``test`` or ``laboratory``.
        table: the table of the records.
        site: the site, None for a whole table.
        test: test code or laboratory, None above.
        status: ``fresh``; ``stale``; ``closed`` (its patients have ended the trial); ``new`` (too little history).
        newest: time of its newest record.
        silence: seconds from there to the trial's present.
        rhythm: seconds; None for a new source.
        bound: silence above which it is stale, seconds; None for a new source.
        records: how many it has sent.
        patients: how many patients these are of.
    """

    source: str
    level: str
    table: str
    site: str | None
    test: str | None
    status: Status
    newest: datetime
    silence: float
    rhythm: float | None
    bound: float | None
    records: int
    patients: int

    def as_dict(self) -> dict[str, Any]:
        """Return it as plain JSON types."""
        return {
            "source": self.source,
            "level": self.level,
            "status": self.status,
            "newest": self.newest.isoformat(),
            "silence_hours": round(self.silence / 3600, 2),
            "rhythm_hours": None if self.rhythm is None else round(self.rhythm / 3600, 2),
            "bound_hours": None if self.bound is None else round(self.bound / 3600, 2),
            "records": self.records,
        }


def rhythm_of(times: np.ndarray) -> float | None:
    """Return the rhythm of sorted distinct times (seconds), None with too little history."""
    import numpy as np

    gaps = np.diff(times)
    gaps = np.sort(gaps[gaps > 0])
    if gaps.size < MIN_GAPS:
        return None
    middle = _weighted_quantile(gaps, 0.5)
    usual = gaps[gaps <= OUTAGE * middle]
    if usual.sum() < (1 - OUTAGE_SHARE) * gaps.sum():
        usual = gaps  # what fills so much of the time is no outage but the rhythm after a busier beginning
        middle = _weighted_quantile(gaps, 0.6)
    # a handful of long gaps is a rhythm only when it was kept a few times
    long = int((usual >= 0.5 * middle).sum())
    return _weighted_quantile(usual, QUANTILE) if long >= MIN_GAPS - 1 else None


def _weighted_quantile(sorted_gaps: np.ndarray, share: float) -> float:
    import numpy as np

    cumulative = np.cumsum(sorted_gaps)
    return float(sorted_gaps[min(int(np.searchsorted(cumulative, share * cumulative[-1])), sorted_gaps.size - 1)])


def newest_record(times: pl.DataFrame) -> datetime | None:
    """Return the time of the newest record that is no slip of the pen.

    Args:
        times: ``patient_id, time`` of all tables.

    Returns:
        Of ten patients or more, the third newest last record of a patient: one record dated years ahead would make
        every source look silent. Of fewer, the newest. None without records.
    """
    import polars as pl

    last = (
        times.select("patient_id", "time")
        .drop_nulls()
        .group_by("patient_id")
        .agg(pl.col("time").max())
        .get_column("time")
        .sort(descending=True)
    )
    if last.is_empty():
        return None
    found: datetime = last[2 if last.len() >= 10 else 0]
    return found


def source_freshness(
    arrivals: pl.DataFrame, observed_until: pl.DataFrame, now: datetime, *, tables: Sequence[str]
) -> list[Freshness]:
    """Judge every source of a trial.

    Args:
        arrivals: ``table, patient_id, site, test_code, lab_id, time``: records that arrived, accepted or quarantined.
        observed_until: ``patient_id, until``: end of each patient's observation, null while it goes on.
        now: the trial's present; records after it do not count.
        tables: tables to look at on the level of sites and tests; the others have no rhythm of their own below the
            table, because they only say something when something happens.

    Returns:
        By level, then source. Sources below a stale one are not judged again: they are stale with it.
    """
    import polars as pl

    rows = arrivals.filter(pl.col("time").is_not_null() & (pl.col("time") <= now))
    rows = rows.join(observed_until, on="patient_id", how="left")
    rows = rows.with_columns(active=pl.col("until").is_null() | (pl.col("until") >= now))
    measured = pl.col("table").is_in(list(tables))
    sited = rows.filter(measured & pl.col("site").is_not_null())
    levels = (
        ("table", rows, ["table"]),
        ("site", sited, ["table", "site"]),
        ("laboratory", sited.filter(pl.col("lab_id").is_not_null()), ["table", "lab_id"]),
        ("test", sited.filter(pl.col("test_code").is_not_null()), ["table", "site", "test_code"]),
    )
    found: list[Freshness] = []
    for level, frame, keys in levels:
        stale_above = {item.source for item in found if item.status == "stale"}
        for group in _groups(frame, keys):
            if any(group["source"].startswith(f"{above}/") for above in stale_above):
                continue
            if level != "table" and group["patients"] < MIN_PATIENTS:
                continue
            found.append(_judge(group, level, now))
    return _with_borrowed_rhythms(found, {"table", *(level for level, _, _ in levels[1:])})


def _with_borrowed_rhythms(found: list[Freshness], levels: set[str]) -> list[Freshness]:
    """Judge young sources by the middle rhythm of the same test, else table, at the other sites."""
    import statistics

    known: dict[tuple[str, str, str | None], list[float]] = {}
    for item in found:
        if item.rhythm is not None and item.level in levels - {"table"}:
            test = item.test if item.level == "test" else None
            known.setdefault((item.level, item.table, test), []).append(item.rhythm)
    out, stale_above = [], {item.source for item in found if item.status == "stale"}
    for item in found:
        rhythms = known.get((item.level, item.table, item.test if item.level == "test" else None), [])
        if any(item.source.startswith(f"{above}/") for above in stale_above):
            continue
        if item.status == "new" and len(rhythms) >= LENDERS:
            rhythm = statistics.median(rhythms)
            bound = max(FACTOR * rhythm, FIRST_BOUND)
            late = item.silence > bound
            item = replace(item, rhythm=rhythm, bound=bound, status="stale" if late else "fresh")
            if late:
                stale_above.add(item.source)
        out.append(item)
    return out


def _groups(frame: pl.DataFrame, keys: list[str]) -> list[dict[str, Any]]:
    import polars as pl

    if frame.is_empty():
        return []
    last_of_patient = frame.group_by(*keys, "patient_id").agg(pl.col("active").last()).group_by(*keys).agg(
        pl.len().alias("patients"), pl.col("active").mean().alias("active")
    )  # fmt: skip
    times = frame.group_by(keys).agg(
        pl.col("time").unique().sort().dt.epoch("us").alias("times"), pl.len().alias("records"),
        pl.col("time").max().alias("newest"),
    )  # fmt: skip
    joined = times.join(last_of_patient, on=keys).sort(keys)
    return [{**row, "source": "/".join(str(row[key]) for key in keys)} for row in joined.iter_rows(named=True)]


def _judge(group: dict[str, Any], level: str, now: datetime) -> Freshness:
    import numpy as np

    rhythm = rhythm_of(np.asarray(group["times"], dtype=float) / 1e6)
    silence = (now - group["newest"]).total_seconds()
    bound = None if rhythm is None else FACTOR * rhythm
    if bound is not None and (group["times"][-1] - group["times"][0]) / 1e6 < DAYS_KNOWN * _DAY:
        bound = max(bound, FIRST_BOUND)
    status: Status = "new"
    if bound is not None:
        status = "fresh" if silence <= bound else "stale" if group["active"] >= ACTIVE_SHARE else "closed"
    elif group["active"] < ACTIVE_SHARE:
        status = "closed"
    return Freshness(
        source=group["source"],
        level=level,
        table=group["table"],
        site=group.get("site"),
        test=group.get("test_code") or group.get("lab_id"),
        status=status,
        newest=group["newest"],
        silence=max(0.0, silence),
        rhythm=rhythm,
        bound=bound,
        records=int(group["records"]),
        patients=int(group["patients"]),
    )


def observation_ends(subjects: pl.DataFrame, grace: timedelta = timedelta(0)) -> pl.DataFrame:
    """Return ``patient_id, until`` for :func:`source_freshness`: the end of treatment, death, or a failed screening."""
    import polars as pl

    ends = pl.min_horizontal(
        pl.col("treatment_end") + grace,
        pl.col("death_time"),
        pl.when(pl.col("screen_failure").fill_null(False)).then(pl.col("event_time")),
    )
    return subjects.select("patient_id", ends.alias("until")).unique("patient_id")
