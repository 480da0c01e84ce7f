"""Safe corrections applied to silver, each once, recorded record by record, and reversible.

A batch is written to ``quality/cleaning_log`` with its rows before and after *before* anything is changed. A run that
is killed in between leaves an unfinished batch; the next run finishes it from the log. Rows are appended with the
batch as Delta app transaction, and removals and changes name their records, so finishing twice changes nothing.

A record that is cleaned out of quarantine is, at the end, in silver (or in ``quarantine/duplicates``, where silver
holds the same observation) and no longer in quarantine: the accounts stay balanced.

The tables are written by delta-rs. On S3 no Spark job may write them at the same time (see :mod:`..stores.spark`):
callers hold the lock :data:`clinical_orchestration.stores.locks.REFINE`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from clinical_orchestration.quality.cleaning import Proposal, batch_id, patched, with_original
from clinical_orchestration.stores.tables import TableStore
from clinical_orchestration.tables import (
    BRONZE_COLUMNS,
    CLEANING_LOG,
    CLEANING_LOG_COLUMNS,
    DUPLICATES,
    DUPLICATES_COLUMNS,
    QUARANTINE,
    QUARANTINE_COLUMNS,
    SILVER_COLUMNS,
    arrow_schema,
    bronze,
    silver,
)
from clinical_orchestration.transforms.decode import decode

if TYPE_CHECKING:
    import polars as pl
    import pyarrow as pa

    from clinical_orchestration.trials import TrialProfile

MAX_RECORDS = 2000
"""Records of one batch at most; the rest follows in the next run."""

_PREDICATE = 400  # positions in one predicate


class UnknownBatchError(LookupError):
    """There is no applied batch of this id; the message lists those there are."""


@dataclass
class CleaningReport:
    """What was proposed and done.

    Attributes:
        proposed: proposals that are new in the log.
        open: proposals there are now and that are not applied.
        applied: rule -> records that this call applied.
        batches: ids of the batches that this call applied.
        finished: ids of batches that a killed run had left unfinished and this call finished.
        kept: records whose correction was given up, with the reason: their correction does not decode, or another
            record of the same observation says something else.
    """

    proposed: int = 0
    open: int = 0
    applied: dict[str, int] = field(default_factory=dict)
    batches: list[str] = field(default_factory=list)
    finished: list[str] = field(default_factory=list)
    kept: dict[str, int] = field(default_factory=dict)


def log_proposals(
    tables: TableStore, trial: str, proposals: Sequence[Proposal], *, now: datetime, run_id: str
) -> tuple[int, list[Proposal]]:
    """Record proposals that the log does not have yet.

    Returns:
        How many were recorded, and those that are open: neither applied nor reverted nor given up before.
    """
    log = _log(tables, trial)
    known = {_key(row) for row in log if row["event"] == "proposed"}
    decided = {_key(row) for row in log if row["event"] in ("begun", "kept")}
    fresh = [item for item in proposals if _key_of(item) not in known]
    if fresh:
        rows = [_log_row(trial, None, "proposed", item, now, run_id) for item in fresh]
        tables.append(CLEANING_LOG, _table(rows, CLEANING_LOG_COLUMNS))
    return len(fresh), [item for item in proposals if _key_of(item) not in decided]


def apply_safe(
    tables: TableStore, profile: TrialProfile, proposals: Sequence[Proposal], *, now: datetime, run_id: str
) -> CleaningReport:
    """Apply the safe ones of proposals, after finishing what a killed run left.

    Args:
        tables: the lakehouse.
        profile: the trial.
        proposals: those that are open (see :func:`log_proposals`); proposals for people are left alone.
        now: written to the log; aware.
        run_id: the run, for the log.
    """
    report = CleaningReport(finished=finish_unfinished(tables, profile.name, now=now, run_id=run_id))
    safe = [item for item in proposals if item.safe]
    for start in range(0, len(safe), MAX_RECORDS):
        chosen = safe[start : start + MAX_RECORDS]
        rows, kept = _prepare(tables, profile, chosen)
        if kept:
            given_up = [
                {**_log_row(profile.name, None, "kept", item, now, run_id), "reason": why} for item, why in kept
            ]
            tables.append(CLEANING_LOG, _table(given_up, CLEANING_LOG_COLUMNS))
        for _, why in kept:
            report.kept[why] = report.kept.get(why, 0) + 1
        if not rows:
            continue
        batch = batch_id(profile.name, [item for item, *_ in rows])
        log_rows = [
            {**_log_row(profile.name, batch, "begun", item, now, run_id), "action": action, **_json(before, after)}
            for item, action, before, after in rows
        ]
        tables.append(CLEANING_LOG, _table(log_rows, CLEANING_LOG_COLUMNS), transactions={f"cleaning:{batch}": 1})
        _carry_out(tables, profile.name, batch, log_rows, now)
        _close(tables, profile.name, batch, log_rows, "applied", 2, now, run_id)
        report.batches.append(batch)
        for item, *_ in rows:
            report.applied[item.rule] = report.applied.get(item.rule, 0) + 1
    return report


def finish_unfinished(tables: TableStore, trial: str, *, now: datetime, run_id: str) -> list[str]:
    """Finish the batches, and reversals, that a killed run left; return their ids."""
    log = _log(tables, trial)
    done: dict[str, set[str]] = {}
    for row in log:
        if row["batch_id"] is not None:
            done.setdefault(row["batch_id"], set()).add(row["event"])
    finished = []
    for batch, events in sorted(done.items()):
        rows = [row for row in log if row["batch_id"] == batch and row["event"] == "begun"]
        if "applied" not in events:
            _carry_out(tables, trial, batch, rows, now)
            _close(tables, trial, batch, rows, "applied", 2, now, run_id)
            finished.append(batch)
        if "revert_begun" in events and "reverted" not in events:
            _undo(tables, trial, batch, rows)
            _close(tables, trial, batch, rows, "reverted", 4, now, run_id)
            finished.append(batch)
    return finished


def revert(tables: TableStore, trial: str, batch: str, *, now: datetime, run_id: str) -> int:
    """Restore the records of an applied batch as they were and return how many.

    Reverting twice changes nothing. Reverted records are not cleaned by the same rule again.

    Raises:
        UnknownBatchError: there is no such batch of the trial.
    """
    finish_unfinished(tables, trial, now=now, run_id=run_id)
    log = _log(tables, trial)
    rows = [row for row in log if row["batch_id"] == batch and row["event"] == "begun"]
    if not rows:
        there = sorted({str(row["batch_id"]) for row in log if row["event"] == "applied"})
        raise UnknownBatchError(
            f"there is no applied batch {batch!r} of the trial {trial}; "
            + (f"there are: {', '.join(there)}" if there else "none was ever applied")
        )
    if any(row["batch_id"] == batch and row["event"] == "reverted" for row in log):
        return 0
    _close(tables, trial, batch, rows, "revert_begun", 3, now, run_id)
    _undo(tables, trial, batch, rows)
    _close(tables, trial, batch, rows, "reverted", 4, now, run_id)
    return len(rows)


def applied_batches(tables: TableStore, trial: str) -> list[dict[str, Any]]:
    """Return the batches of a trial: ``batch_id, rule, records, applied_at, reverted``, newest first."""
    batches: dict[str, dict[str, Any]] = {}
    for row in _log(tables, trial):
        if row["event"] == "applied":
            entry = batches.setdefault(
                row["batch_id"],
                {"batch_id": row["batch_id"], "rules": set(), "records": 0, "applied_at": row["logged_at"],
                 "reverted": False},
            )  # fmt: skip
            entry["rules"].add(row["rule"])
            entry["records"] += 1
    for row in _log(tables, trial):
        if row["event"] == "reverted" and row["batch_id"] in batches:
            batches[row["batch_id"]]["reverted"] = True
    ordered = sorted(batches.values(), key=lambda entry: entry["applied_at"], reverse=True)
    return [{**entry, "rule": ", ".join(sorted(entry.pop("rules")))} for entry in ordered]


# --- preparing ------------------------------------------------------------------------------------------------------

_Prepared = tuple[Proposal, str, list[dict[str, Any]], list[dict[str, Any]]]
"""(proposal, action, rows before, rows after)"""


_Kept = list[tuple[Proposal, str]]
"""Proposals that are given up, with why."""


def _prepare(tables: TableStore, profile: TrialProfile, chosen: Sequence[Proposal]) -> tuple[list[_Prepared], _Kept]:
    accepts = [item for item in chosen if item.action == "accept"]
    changes = [item for item in chosen if item.action == "change"]
    accepted, kept = _prepare_accepts(tables, profile, accepts)
    return [*accepted, *_prepare_changes(tables, profile.name, changes)], kept


def _prepare_accepts(
    tables: TableStore, profile: TrialProfile, chosen: Sequence[Proposal]
) -> tuple[list[_Prepared], _Kept]:
    """Decode the corrected records; a record that says again what silver holds becomes a duplicate."""
    prepared: list[_Prepared] = []
    kept: _Kept = []
    for table in sorted({item.table for item in chosen}):
        items = [item for item in chosen if item.table == table]
        positions = [item.source_position for item in items]
        raw = _by_position(_read(tables, bronze(table), profile.name, positions, BRONZE_COLUMNS))
        rejected = _by_position(_read(tables, QUARANTINE, profile.name, positions, QUARANTINE_COLUMNS))
        decoded: list[tuple[Proposal, list[dict[str, Any]]]] = []
        for item in sorted(items, key=lambda item: (len(item.source_position), item.source_position)):
            record = raw.get(item.source_position)
            if record is None or item.source_position not in rejected:
                kept.append((item, "no longer in quarantine"))
                continue
            rows = _decode(table, record, profile)
            if rows is None:
                kept.append((item, "the corrected record is not valid"))
                continue
            decoded.append((item, rows))
        held = _accepted_keys(tables, table, profile.name, [rows[0]["record_key"] for _, rows in decoded])
        for item, rows in decoded:
            key, content = rows[0]["record_key"], rows[0]["content_hash"]
            before = [rejected[item.source_position]]
            if key not in held:
                held[key] = (item.source_position, content)
                prepared.append((item, "accept", before, rows))
            elif held[key][1] == content:
                duplicate = {
                    "table": table, "trial": profile.name, "source": rows[0]["source"],
                    "source_position": item.source_position, "duplicate_of": held[key][0],
                    "detected_at": before[0]["quarantined_at"],
                }  # fmt: skip
                prepared.append((item, "duplicate", before, [duplicate]))
            else:
                kept.append((item, "another record of the same observation says something else"))
    return prepared, kept


def _decode(table: str, record: Mapping[str, Any], profile: TrialProfile) -> list[dict[str, Any]] | None:
    import orjson

    payload = orjson.loads(record["payload"])
    corrected = patched(record["record_format"], payload)
    outcome = decode(table, {**record, "payload": orjson.dumps(corrected).decode()}, profile)
    return None if outcome.reasons else with_original([dict(row) for row in outcome.rows], payload)


def _accepted_keys(tables: TableStore, table: str, trial: str, keys: Iterable[str]) -> dict[str, tuple[str, str]]:
    """Return record key -> (position, content hash) of those of `keys` that silver holds."""
    import polars as pl

    columns = ["record_key", "source_position", "content_hash"]
    rows = pl.DataFrame(pl.from_arrow(tables.read(silver(table), columns=columns, filters=[("trial", "=", trial)])))
    rows = rows.filter(pl.col("record_key").is_in(list(set(keys)))).unique("record_key")
    return {key: (position, content) for key, position, content in rows.select(columns).iter_rows()}


def _prepare_changes(tables: TableStore, trial: str, chosen: Sequence[Proposal]) -> list[_Prepared]:
    prepared: list[_Prepared] = []
    for table in sorted({item.table for item in chosen}):
        items = [item for item in chosen if item.table == table]
        rows = _by_position(
            _read(tables, silver(table), trial, [item.source_position for item in items], SILVER_COLUMNS[table])
        )
        for item in items:
            row = rows.get(item.source_position)
            if row is not None and row[item.column] == item.old:
                before, after = {item.column: item.old}, {item.column: item.new}
                prepared.append((item, "change", [before], [after]))
    return prepared


# --- carrying out and undoing ---------------------------------------------------------------------------------------


def _carry_out(tables: TableStore, trial: str, batch: str, rows: Sequence[Mapping[str, Any]], now: datetime) -> None:
    """Bring the tables to what the batch says; what was done already stays as it is."""
    for table in sorted({row["table"] for row in rows}):
        accepted = [row for row in rows if row["table"] == table and row["action"] == "accept"]
        if accepted:
            new = [item for row in accepted for item in _rows_of(row["after"], SILVER_COLUMNS[table])]
            tables.append(silver(table), _table(new, SILVER_COLUMNS[table]), transactions={f"cleaning:{batch}": 1})
    repeated = [row for row in rows if row["action"] == "duplicate"]
    if repeated:
        new = [item for row in repeated for item in _rows_of(row["after"], DUPLICATES_COLUMNS)]
        tables.append(DUPLICATES, _table(new, DUPLICATES_COLUMNS), transactions={f"cleaning:{batch}": 1})
    _remove(tables, QUARANTINE, QUARANTINE_COLUMNS, trial, [row["source_position"] for row in rows
                                                            if row["action"] in ("accept", "duplicate")])  # fmt: skip
    _change(tables, trial, rows, "after")


def _undo(tables: TableStore, trial: str, batch: str, rows: Sequence[Mapping[str, Any]]) -> None:
    moved = [row for row in rows if row["action"] in ("accept", "duplicate")]
    if moved:
        old = [item for row in moved for item in _rows_of(row["before"], QUARANTINE_COLUMNS)]
        tables.append(QUARANTINE, _table(old, QUARANTINE_COLUMNS), transactions={f"cleaning:{batch}:reverted": 1})
    for table in sorted({row["table"] for row in rows}):
        accepted = [row["source_position"] for row in rows if row["table"] == table and row["action"] == "accept"]
        _remove(tables, silver(table), SILVER_COLUMNS[table], trial, accepted)
    repeated = [row["source_position"] for row in rows if row["action"] == "duplicate"]
    _remove(tables, DUPLICATES, DUPLICATES_COLUMNS, trial, repeated)
    _change(tables, trial, rows, "before")


def _change(tables: TableStore, trial: str, rows: Sequence[Mapping[str, Any]], to: str) -> None:
    """Set the columns of changed rows to what the log says of them `before` or `after`."""
    changed = [row for row in rows if row["action"] == "change"]
    for table in sorted({row["table"] for row in changed}):
        values: dict[str, dict[str, Any]] = {}
        for row in changed:
            if row["table"] == table:
                values.setdefault(row["source_position"], {}).update(_rows_of(row[to], SILVER_COLUMNS[table])[0])
        for chunk in _chunks(sorted(values)):
            found = _read(tables, silver(table), trial, chunk, SILVER_COLUMNS[table])
            if all(row[name] == value for row in found for name, value in values[row["source_position"]].items()):
                continue
            new = [{**row, **values[row["source_position"]]} for row in found]
            tables.replace(
                silver(table), _table(new, SILVER_COLUMNS[table]), predicate=_predicate(trial, chunk),
                metadata={"cleaning": "change"},
            )  # fmt: skip


def _remove(tables: TableStore, name: str, columns: Mapping[str, str], trial: str, positions: Sequence[str]) -> None:
    for chunk in _chunks(sorted(set(positions))):
        if tables.read(name, columns=["source_position"], filters=_filters(trial, chunk)).num_rows:
            empty = arrow_schema(dict(columns)).empty_table()
            tables.replace(name, empty, predicate=_predicate(trial, chunk), metadata={"cleaning": "remove"})


def _chunks(positions: Sequence[str]) -> Iterable[list[str]]:
    for start in range(0, len(positions), _PREDICATE):
        yield list(positions[start : start + _PREDICATE])


def _predicate(trial: str, positions: Sequence[str]) -> str:
    quoted = ", ".join("'" + position.replace("'", "''") + "'" for position in positions)
    return f"trial = '{trial}' AND source_position IN ({quoted})"


def _filters(trial: str, positions: Sequence[str]) -> list[tuple[str, str, Any]]:
    return [("trial", "=", trial), ("source_position", "in", list(positions))]


# --- rows and the log -----------------------------------------------------------------------------------------------


def _read(
    tables: TableStore, name: str, trial: str, positions: Sequence[str], columns: Mapping[str, str]
) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for chunk in _chunks(sorted(set(positions))):
        rows += _plain(tables.read(name, columns=list(columns), filters=_filters(trial, chunk)))
    return rows


def _plain(rows: pa.Table) -> list[dict[str, Any]]:
    import polars as pl

    frame: pl.DataFrame = pl.DataFrame(pl.from_arrow(rows))
    return [
        {name: value.astimezone(UTC) if isinstance(value, datetime) else value for name, value in row.items()}
        for row in frame.iter_rows(named=True)
    ]


def _by_position(rows: Iterable[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {row["source_position"]: row for row in rows}


def _table(rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str]) -> pa.Table:
    import pyarrow as pa

    schema = arrow_schema(dict(columns))
    return pa.Table.from_pylist([{name: row.get(name) for name in columns} for row in rows], schema=schema)


def _json(before: list[dict[str, Any]], after: list[dict[str, Any]]) -> dict[str, str]:
    import orjson

    return {"before": orjson.dumps(before).decode(), "after": orjson.dumps(after).decode()}


def _rows_of(text: str, columns: Mapping[str, str]) -> list[dict[str, Any]]:
    """Read rows of the log; times become aware datetimes again."""
    import orjson

    rows: list[dict[str, Any]] = orjson.loads(text)
    for row in rows:
        for name, value in row.items():
            if columns[name] == "timestamp" and value is not None:
                row[name] = datetime.fromisoformat(value)
    return rows


def _log(tables: TableStore, trial: str) -> list[dict[str, Any]]:
    if not tables.exists(CLEANING_LOG):
        return []
    return _plain(tables.read(CLEANING_LOG, filters=[("trial", "=", trial)]))


def _key(row: Mapping[str, Any]) -> tuple[str, ...]:
    return row["rule"], row["table"], row["source_position"], row["column"]


def _key_of(item: Proposal) -> tuple[str, ...]:
    return item.rule, item.table, item.source_position, item.column


def _log_row(trial: str, batch: str | None, event: str, item: Proposal, now: datetime, run_id: str) -> dict[str, Any]:
    return {
        "trial": trial, "batch_id": batch, "event": event, "rule": item.rule, "table": item.table,
        "source_position": item.source_position, "action": item.action, "column": item.column, "old_value": item.old,
        "new_value": item.new, "reason": item.reason, "safe": item.safe, "before": None, "after": None,
        "logged_at": now, "run_id": run_id,
    }  # fmt: skip


def _close(
    tables: TableStore,
    trial: str,
    batch: str,
    rows: Sequence[Mapping[str, Any]],
    event: str,
    step: int,
    now: datetime,
    run_id: str,
) -> None:
    """Record that a batch reached a step, once."""
    done = [
        {**row, "trial": trial, "event": event, "before": None, "after": None, "logged_at": now, "run_id": run_id}
        for row in rows
    ]
    tables.append(CLEANING_LOG, _table(done, CLEANING_LOG_COLUMNS), transactions={f"cleaning:{batch}": step})
