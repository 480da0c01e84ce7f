"""Point-in-time join: for each entity row the newest features that were valid at its time, never later ones."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import polars as pl


def join_as_of(
    entities: pl.DataFrame,
    rows: pl.DataFrame,
    *,
    features: Sequence[str],
    time_column: str = "time",
    max_age: timedelta | None = None,
) -> pl.DataFrame:
    """Return the entity rows, in their order, with ``feature_time`` and the features of the newest row up to then.

    Args:
        entities: ``patient_id`` and a UTC datetime in `time_column`, and any other columns; rows may repeat.
        rows: ``patient_id``, ``feature_time`` (UTC) and the features; one row a patient and time.
        features: names to add, in this order.
        time_column: the column that says at which time the features must have been valid.
        max_age: features that are older than this at that time count as missing.

    Returns:
        As many rows as `entities`; nulls where a patient has no features up to its time, or only too old ones.

    Raises:
        ValueError: a column is missing, is there twice, or is no time.
    """
    import polars as pl

    for column in ("patient_id", time_column):
        if column not in entities.columns:
            raise ValueError(f"the entities have no column {column!r}; they have {', '.join(entities.columns)}")
    taken = sorted({"feature_time", *features} & set(entities.columns) - {time_column})
    if taken or time_column == "feature_time":
        raise ValueError(f"the entities have a column {', '.join(taken) or 'feature_time'} already; rename it")
    moment = entities.schema[time_column]
    if not isinstance(moment, pl.Datetime):
        raise ValueError(f"{time_column} holds {moment}, which is no time")
    if moment.time_zone is None:
        raise ValueError(f"{time_column} has no time zone; make it UTC: .dt.replace_time_zone('UTC')")
    place, key = "__place", "__time"
    left = entities.with_row_index(place).with_columns(
        pl.col(time_column).dt.convert_time_zone("UTC").dt.cast_time_unit("us").alias(key)
    )
    right = rows.select("patient_id", "feature_time", *features).with_columns(
        pl.col("feature_time").dt.convert_time_zone("UTC").dt.cast_time_unit("us").alias(key)
    )
    joined = left.sort(key).join_asof(
        right.sort(key),
        on=key,
        by="patient_id",
        strategy="backward",
        tolerance=max_age,
        check_sortedness=False,  # both are sorted by time, which is what the join needs within each patient
    )
    return joined.sort(place).select(*entities.columns, "feature_time", *features)
