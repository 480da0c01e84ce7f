"""Rows of the trail as a chain, and its verification; nothing here reads or writes anything.

A row's hash is SHA-256 over its canonical form: a JSON array of the values of :data:`COLUMNS` in this order, without
white space, non-ASCII characters escaped, times in UTC with microseconds. One of the columns is the hash of the row
before, so each hash stands for everything up to its row. The signature of a row is an HMAC over its hash.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from typing import Any

from clinical_orchestration.audit.keys import Signer, UnknownKeyError

GENESIS = "0" * 64
"""What stands as the hash before the first row."""


@dataclass(frozen=True)
class Row:
    """One row of the trail.

    Attributes:
        seq: 1, 2, 3 ... without gaps.
        at: when it was recorded, UTC.
        event: what happened, by Airflow's event names where it has one.
        who: name of the user.
        origin: by which way: api, cli, page, graphql.
        address: network address, or host of a command; may be empty.
        dag_id: what it was about, like the three below; None where there is none.
        task_id: see `dag_id`.
        run_id: see `dag_id`.
        map_index: see `dag_id`.
        try_number: see `dag_id`.
        old: JSON text of the value before, without secrets.
        new: JSON text of the value asked for or set, without secrets.
        extra: JSON text of everything else.
        key_id: fingerprint of the key of `mac`; None where the row was recorded without a key.
        previous: hash of the row before.
        hash: SHA-256 of the canonical form, hexadecimal.
        mac: signature of the hash, hexadecimal.
    """

    seq: int
    at: datetime
    event: str
    who: str
    origin: str
    address: str
    dag_id: str | None
    task_id: str | None
    run_id: str | None
    map_index: int | None
    try_number: int | None
    old: str | None
    new: str | None
    extra: str | None
    key_id: str | None
    previous: str
    hash: str
    mac: str | None


STORED = tuple(field.name for field in fields(Row))
"""All columns, in the order of the table."""
COLUMNS = STORED[:-2]
"""The columns that the hash is over: all but itself and the signature."""


def canonical(values: Mapping[str, Any]) -> bytes:
    """Return what the hash of a row is over; `values` holds :data:`COLUMNS`, other names are passed over."""
    moment: datetime = values["at"]
    listed = [values[name] for name in COLUMNS]
    listed[COLUMNS.index("at")] = moment.astimezone(UTC).isoformat(timespec="microseconds")
    return json.dumps(listed, separators=(",", ":"), ensure_ascii=True).encode()


def link(values: Mapping[str, Any]) -> str:
    """Return the hash of a row."""
    return hashlib.sha256(canonical(values)).hexdigest()


def seal(values: Mapping[str, Any], seq: int, previous: str, signer: Signer | None) -> Row:
    """Return the row that follows the one whose hash is `previous`, signed where there is a key."""
    whole = {**values, "seq": seq, "previous": previous, "key_id": signer.current if signer else None}
    whole["hash"] = link(whole)
    whole["mac"] = signer.sign(whole["hash"]) if signer else None
    return Row(**whole)


@dataclass(frozen=True)
class Finding:
    """The first thing that is wrong: number of the row, and what."""

    seq: int
    what: str


@dataclass(frozen=True)
class Verdict:
    """What verification found.

    Attributes:
        rows: rows that were read and found right.
        signed: how many of them carry a signature that was checked.
        anchored: number of the newest row that the anchor outside of the database names; 0 for none.
        finding: the first thing that is wrong; None where nothing is.
    """

    rows: int
    signed: int
    anchored: int
    finding: Finding | None


def verify(
    rows: Iterable[Row], signer: Signer | None, anchors: Mapping[int, str], *, unsigned_up_to: int = 0
) -> Verdict:
    """Check a trail from its first row on, one row in memory at a time.

    Args:
        rows: all rows by their number.
        signer: the keys; None leaves the signatures unchecked.
        anchors: hashes by row number that were kept outside of the database.
        unsigned_up_to: rows up to this one may be without signature: they were recorded before there was a key.
    """
    count = signed = 0
    previous = GENESIS
    newest = max(anchors, default=0)
    for row in rows:
        finding = _wrong(row, count + 1, previous, signer, anchors, unsigned_up_to)
        if finding is not None:
            return Verdict(count, signed, newest, finding)
        count, previous = row.seq, row.hash
        signed += signer is not None and row.mac is not None
    if newest > count:
        what = f"removed: the anchor outside of the database says that {newest} rows were recorded"
        return Verdict(count, signed, newest, Finding(count + 1, what))
    return Verdict(count, signed, newest, None)


def _wrong(
    row: Row, expected: int, previous: str, signer: Signer | None, anchors: Mapping[int, str], unsigned_up_to: int
) -> Finding | None:
    if row.seq > expected:
        return Finding(expected, f"removed, or put elsewhere: row {row.seq} stands in its place")
    if row.seq < expected:
        return Finding(row.seq, f"inserted, or put elsewhere: it stands behind row {expected - 1}")
    if row.previous != previous:
        return Finding(row.seq, "does not follow the row before it: one of the two was changed, removed or inserted")
    if row.hash != link(vars(row)):
        return Finding(row.seq, "changed after it was recorded: its hash is not that of its content")
    if signer is not None:
        what = _signature(row, signer, unsigned_up_to)
        if what:
            return Finding(row.seq, what)
    if anchors.get(row.seq, row.hash) != row.hash:
        return Finding(row.seq, "rewritten: the anchor outside of the database names another hash")
    return None


def _signature(row: Row, signer: Signer, unsigned_up_to: int) -> str:
    if row.key_id is None or row.mac is None:
        if row.key_id is None and row.mac is None and row.seq <= unsigned_up_to:
            return ""
        return "not signed: it was recorded by somebody without the key, or before there was one"
    try:
        right = signer.check(row.key_id, row.hash, row.mac)
    except UnknownKeyError:
        return f"signed with a key that is not known here (fingerprint {row.key_id}): add the old key behind the new"
    return "" if right else "rewritten by somebody without the key: its signature is not that of its content"
