"""Bronze records to silver rows, or to the reasons why not: the one decoder of the platform.

The gateway (one record at a time, through :mod:`clinical_orchestration.transforms.messages`), Spark (Arrow batches on
the executors) and tests all run this code, so a record is judged the same wherever it is looked at. Decoding never
raises for what a record contains: every record gives silver rows or reasons, and never both.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from clinical_orchestration.tables import SILVER_COLUMNS, arrow_schema
from clinical_orchestration.transforms import messages, sdtm
from clinical_orchestration.transforms.messages import parse_object

if TYPE_CHECKING:
    import pyarrow as pa

    from clinical_orchestration.trials import TrialProfile

MESSAGE_FORMAT = "message"
SDTM_FORMAT_PREFIX = "sdtm:"

REJECTED_COLUMNS = ("trial", "source", "source_position", "ingested_at", "payload", "reasons")
"""What a rejected record carries on: enough for one row of ``quarantine/records``."""


@dataclass(frozen=True)
class Decoded:
    """The outcome for one bronze record: exactly one of `rows` and `reasons` is non-empty."""

    rows: list[dict[str, object]] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)


def decode(domain: str, record: Mapping[str, object], profile: TrialProfile) -> Decoded:
    """Turn one bronze record into silver rows of `domain`, or say everything that is wrong with it.

    Args:
        domain: bronze table, one of :data:`clinical_orchestration.tables.DOMAINS`.
        record: one row of that table (:data:`clinical_orchestration.tables.BRONZE_COLUMNS`); times are aware datetimes.
        profile: the trial that the record belongs to.

    Returns:
        Rows with exactly the columns of ``SILVER_COLUMNS[domain]`` and UTC datetimes; or reasons, each
        ``"<rule>: <text>"`` without patient identifiers.
    """
    if record.get("payload_encoding") == "base64":
        return Decoded(reasons=["not_utf8: the record is not UTF-8 text"])
    parsed, reasons = parse_object(record.get("payload"))
    record_format = record.get("record_format")
    if record_format == MESSAGE_FORMAT:
        if parsed is None:
            return Decoded(reasons=reasons)
        rows, found = messages.decode_message(domain, parsed, record)
    elif isinstance(record_format, str) and record_format.startswith(SDTM_FORMAT_PREFIX):
        if parsed is None:
            return Decoded(reasons=reasons)
        rows, found = sdtm.decode_row(domain, record_format[len(SDTM_FORMAT_PREFIX) :], parsed, record, profile)
    else:
        rows, found = [], ["unknown_format: the record is neither a message nor an SDTM row"]
    reasons = reasons + found
    return Decoded(reasons=reasons) if reasons else Decoded(rows=rows)


def decode_batch(
    domain: str, records: Iterable[Mapping[str, object]], profile_by_name: Mapping[str, TrialProfile]
) -> tuple[list[dict[str, object]], list[dict[str, object]]]:
    """Decode many records of one bronze table.

    Args:
        domain: bronze table.
        records: bronze rows.
        profile_by_name: profiles of all trials that may occur; a record of another trial is rejected.

    Returns:
        ``(accepted, rejected)``: silver rows, and one mapping with :data:`REJECTED_COLUMNS` a rejected record. A
        column of `records` that is no bronze column is not looked at.
    """
    accepted: list[dict[str, object]] = []
    rejected: list[dict[str, object]] = []
    for record in records:
        outcome = _decode_known(domain, record, profile_by_name)
        if outcome.reasons:
            rejected.append({name: record.get(name) for name in REJECTED_COLUMNS[:-1]} | {"reasons": outcome.reasons})
        else:
            accepted.extend(outcome.rows)
    return accepted, rejected


def _decode_known(domain: str, record: Mapping[str, object], profiles: Mapping[str, TrialProfile]) -> Decoded:
    profile = profiles.get(str(record.get("trial")))
    if profile is None:
        return Decoded(reasons=["unknown_trial: the record belongs to a trial without a profile"])
    return decode(domain, record, profile)


def decoded_columns(domain: str, passthrough: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return columns and types (as in :mod:`clinical_orchestration.tables`) of what :func:`decode_arrow` gives.

    The silver columns of `domain`, then ``reasons`` (null for accepted rows), ``payload`` (null for accepted rows),
    then `passthrough` (name -> type) unchanged from the bronze batch.
    """
    return {**SILVER_COLUMNS[domain], "reasons": "array<string>", "payload": "string", **(passthrough or {})}


def decode_arrow(
    domain: str,
    batch: pa.RecordBatch | pa.Table,
    profiles: Mapping[str, TrialProfile],
    passthrough: Mapping[str, str] | None = None,
) -> pa.RecordBatch:
    """Decode an Arrow batch of bronze records; made for Spark's ``mapInArrow``.

    Args:
        domain: bronze table.
        batch: bronze columns, and those of `passthrough`; column order does not matter.
        profiles: profile by trial name.
        passthrough: further columns of `batch` to hand on, name -> type, such as ``{"bronze_order": "long"}``.

    Returns:
        A batch with the schema of ``decoded_columns(domain, passthrough)``, whatever the records hold (zero rows for
        zero records). A record gives one row a silver row, with ``reasons`` null; a rejected record gives one row
        with ``trial, source, source_position, ingested_at, payload`` and ``reasons``, all else null. Rows stay in the
        order of the records.
    """
    import pyarrow as pa

    extra = dict(passthrough or {})
    columns = decoded_columns(domain, extra)
    schema = arrow_schema(columns)
    records = _bronze_records(batch, extra)
    out: list[Mapping[str, object]] = []
    origins: list[Mapping[str, object]] = []
    for record in records:
        outcome = _decode_known(domain, record, profiles)
        if outcome.reasons:
            out.append({name: record.get(name) for name in REJECTED_COLUMNS[:-1]} | {"reasons": outcome.reasons})
            origins.append(record)
        else:
            out.extend(outcome.rows)
            origins.extend([record] * len(outcome.rows))
    arrays = []
    for schema_field in schema:
        name = schema_field.name
        values: list[Any] = [row.get(name) for row in (origins if name in extra else out)]
        if columns[name] == "timestamp":
            values = _to_micros(values)
        arrays.append(pa.array(values, type=schema_field.type))
    return pa.RecordBatch.from_arrays(arrays, schema=schema)


_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


@lru_cache(maxsize=65536)
def _from_micros(value: int) -> datetime:
    return _EPOCH + timedelta(microseconds=value)


def _to_micros(values: list[Any]) -> list[int | None]:
    """Return datetimes as microseconds since 1970: Arrow takes these ten times as fast as datetimes with a zone."""
    seen: dict[int, int | None] = {id(None): None}
    micros: list[int | None] = []
    for value in values:
        # the rows of one record share their datetime objects, which `values` keeps alive: identity is enough
        key = id(value)
        if key not in seen:
            since = value - _EPOCH
            seen[key] = (since.days * 86_400 + since.seconds) * 1_000_000 + since.microseconds
        micros.append(seen[key])
    return micros


_BRONZE_FIELDS = (
    "source", "source_position", "ingested_at", "received_at", "trial", "record_format", "payload", "payload_encoding",
)  # fmt: skip


def _bronze_records(batch: pa.RecordBatch | pa.Table, extra: Mapping[str, str]) -> list[dict[str, Any]]:
    """Return the batch as mappings. Times go by integers: Arrow's own conversion looks the zone up for every cell."""
    import pyarrow as pa

    names = [*_BRONZE_FIELDS, *extra]
    present = set(batch.schema.names)
    lists: list[list[Any]] = []
    for name in names:
        if name not in present:
            lists.append([None] * batch.num_rows)
            continue
        column = batch.column(name)
        if name not in extra and pa.types.is_timestamp(column.type):
            micros = column.cast(pa.timestamp("us", tz=column.type.tz)).cast(pa.int64()).to_pylist()
            lists.append([None if value is None else _from_micros(value) for value in micros])
        else:
            lists.append(column.to_pylist())
    return [dict(zip(names, values, strict=True)) for values in zip(*lists, strict=True)]
