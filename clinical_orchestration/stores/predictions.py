"""``gold/predictions``: what the served models said, one row a prediction.

The model server writes here from its local spool. Every commit records, as a Delta app transaction
``serving/predictions/<log id>``, the sequence number up to which that spool is stored, in the same version as the
rows: a server that dies between two steps goes on without losing or doubling a prediction.

A row on its way (:data:`Row`) is plain JSON: the columns of ``tables.PREDICTIONS_COLUMNS`` without
``prediction_date``, with times as whole microseconds since 1970-01-01 UTC.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from clinical_orchestration.tables import PREDICTIONS, PREDICTIONS_COLUMNS, arrow_schema

if TYPE_CHECKING:
    import pyarrow as pa

    from clinical_orchestration.stores.tables import TableStore

Row = Mapping[str, Any]

_TRANSACTION_PREFIX = "serving/predictions/"


def predictions_table(rows: Sequence[Row]) -> pa.Table:
    """Return rows as Arrow with exactly the columns of ``tables.PREDICTIONS_COLUMNS``.

    Raises:
        pyarrow.ArrowInvalid: a value does not fit its column.
    """
    import pyarrow as pa

    schema = arrow_schema(PREDICTIONS_COLUMNS)
    columns = []
    for field in schema:
        if field.name == "prediction_date":
            moments = pa.array([row["predicted_at"] for row in rows], pa.int64()).cast(pa.timestamp("us", tz="UTC"))
            columns.append(moments.cast(pa.date32()))
        elif pa.types.is_timestamp(field.type):
            columns.append(pa.array([row.get(field.name) for row in rows], pa.int64()).cast(field.type))
        else:
            columns.append(pa.array([row.get(field.name) for row in rows], field.type))
    return pa.Table.from_arrays(columns, schema=schema)


class PredictionTable:
    """The table behind the prediction log.

    Args:
        tables: where ``gold/predictions`` is.
    """

    def __init__(self, tables: TableStore) -> None:
        self._tables = tables

    def last_sequence(self, log_id: str) -> int:
        """Return the sequence number up to which a log is stored; 0 for a log that the table has never seen."""
        return self._tables.transaction_version(PREDICTIONS, _TRANSACTION_PREFIX + log_id) or 0

    def append(self, rows: Sequence[Row], log_id: str, after: int, last_sequence: int) -> None:
        """Append the rows that follow sequence number `after` of a log, and record that it is stored up to the last.

        Calling it again with the same arguments does nothing.

        Args:
            rows: at least one row.
            log_id: the spool's id.
            after: what :meth:`last_sequence` must be now for `rows` to be the right ones.
            last_sequence: the number of the last row.

        Raises:
            TransactionMovedError: the log is stored up to another number: ask :meth:`last_sequence` again.
        """
        app = _TRANSACTION_PREFIX + log_id
        self._tables.append(
            PREDICTIONS,
            predictions_table(rows),
            transactions={app: last_sequence},
            expected={app: after or None},
            metadata={"writer": "model serving"},
        )

    def compact(self) -> None:
        """Merge the small files that frequent appends leave, where there are many."""
        self._tables.maintain(PREDICTIONS, min_small_files=64)
