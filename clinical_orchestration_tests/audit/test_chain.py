"""The chain without a database: whatever is done to rows, the first bad one is named."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clinical_orchestration.audit.chain import COLUMNS, GENESIS, STORED, Row, link, seal, verify
from clinical_orchestration.audit.keys import Signer, UnknownKeyError, fingerprint
from clinical_orchestration.audit.trail import LONGEST_JSON, LONGEST_NAME, AuditEntry
from clinical_orchestration.platform.crypto import SecretKeyError, new_key
from clinical_orchestration_tests.audit.rows import START, chained, entries, signer

KEY = signer()
ROWS = chained(entries(6), KEY)

texts = st.one_of(st.none(), st.text(max_size=8))
written = st.builds(
    AuditEntry,
    event=st.text(max_size=8),
    who=st.text(max_size=8),
    origin=st.sampled_from(["api", "cli", "page", "graphql"]),
    dag_id=texts,
    task_id=texts,
    run_id=texts,
    map_index=st.one_of(st.none(), st.integers(-1, 5)),
    old=st.one_of(st.none(), st.integers(), st.text(max_size=5)),
    new=st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
    when=st.datetimes(timezones=st.just(UTC)),
)
other: dict[str, Any] = {
    name: st.text(max_size=6) for name in STORED if name not in ("seq", "at", "map_index", "try_number")
} | {
    "seq": st.integers(-3, 20),
    "at": st.datetimes(timezones=st.just(UTC)),
    "map_index": st.one_of(st.none(), st.integers(-1, 9)),
    "try_number": st.one_of(st.none(), st.integers(0, 9)),
}


@given(st.lists(written, max_size=6))
@settings(deadline=None)
def test_an_untouched_trail_is_right(given_entries: list[AuditEntry]) -> None:
    rows = chained(given_entries, KEY)
    verdict = verify(rows, KEY, {row.seq: row.hash for row in rows})
    assert (verdict.finding, verdict.rows, verdict.signed) == (None, len(rows), len(rows))


@given(st.data())
@settings(deadline=None, max_examples=300)
def test_any_single_change_is_found_and_its_row_named(data: st.DataObject) -> None:
    at = data.draw(st.integers(0, len(ROWS) - 1))
    name = data.draw(st.sampled_from(STORED))
    value = data.draw(other[name])
    if value == getattr(ROWS[at], name):
        return
    rows = [*ROWS[:at], replace(ROWS[at], **{name: value}), *ROWS[at + 1 :]]
    finding = verify(rows, KEY, {}).finding
    assert finding is not None
    # a row whose number grew stands for one that is missing; one whose number shrank is named by the number it has now
    assert finding.seq == (value if name == "seq" and value < at + 1 else at + 1)


@given(st.integers(0, len(ROWS) - 1))
def test_any_removal_is_found(at: int) -> None:
    anchors = {len(ROWS): ROWS[-1].hash}
    finding = verify([*ROWS[:at], *ROWS[at + 1 :]], KEY, anchors).finding
    assert finding is not None
    assert finding.seq == at + 1
    assert "removed" in finding.what


@given(st.integers(0, len(ROWS)), st.booleans())
def test_any_insertion_is_found(at: int, resealed: bool) -> None:
    before = ROWS[at - 1].hash if at else GENESIS
    stranger = seal(AuditEntry("x", "y", "api", when=START).values(), at + 1, before, signer() if resealed else None)
    finding = verify([*ROWS[:at], stranger, *ROWS[at:]], KEY, {}).finding
    assert finding is not None
    assert finding.seq == at + 1


@given(st.lists(st.integers(0, len(ROWS) - 1), min_size=2, max_size=2, unique=True), st.booleans())
def test_any_two_rows_put_in_each_others_place_are_found(places: list[int], renumbered: bool) -> None:
    low, high = sorted(places)
    rows = list(ROWS)
    rows[low], rows[high] = ROWS[high], ROWS[low]
    if renumbered:
        rows[low], rows[high] = replace(rows[low], seq=low + 1), replace(rows[high], seq=high + 1)
    finding = verify(rows, KEY, {}).finding
    assert finding is not None
    assert finding.seq == low + 1


@given(st.integers(0, len(ROWS) - 1), st.sampled_from(["none", "own key", "old signatures"]))
def test_a_chain_rewritten_with_right_hashes_is_found_by_the_signature(at: int, how: str) -> None:
    forged: list[Row] = list(ROWS[:at])
    key = signer() if how == "own key" else None
    for row in ROWS[at:]:
        values = {**vars(row), "who": "somebody else"}
        made = seal(values, row.seq, forged[-1].hash if forged else GENESIS, key)
        if how == "old signatures":
            made = replace(made, key_id=row.key_id, hash="", mac=row.mac)
            made = replace(made, hash=link(vars(made)))
        forged.append(made)
    assert verify(forged, None, {}).finding is None, "the hashes alone are right"
    finding = verify(forged, KEY, {}).finding
    assert finding is not None
    assert finding.seq == at + 1
    # and by the anchor alone, where nobody has the key
    anchored = verify(forged, None, {row.seq: row.hash for row in ROWS}).finding
    assert anchored is not None
    assert anchored.seq == at + 1


def test_rows_of_a_time_without_a_key_are_accepted_only_where_it_is_said() -> None:
    unsigned = chained(entries(3), None)
    later = seal(entries(4)[3].values(), 4, unsigned[-1].hash, KEY)
    rows = [*unsigned, later]
    finding = verify(rows, KEY, {}).finding
    assert finding is not None
    assert (finding.seq, "not signed" in finding.what) == (1, True)
    verdict = verify(rows, KEY, {}, unsigned_up_to=3)
    assert (verdict.finding, verdict.signed) == (None, 1)
    assert verify(chained(entries(4), None), KEY, {}, unsigned_up_to=3).finding is not None


def test_a_changed_key_leaves_old_rows_valid() -> None:
    old, new = new_key(), new_key()
    before, after = Signer.from_fernet(old), Signer.from_fernet(f"{new},{old}")
    assert before is not None
    assert after is not None
    rows = chained(entries(2), before)
    rows.append(seal(entries(3)[2].values(), 3, rows[-1].hash, after))
    assert rows[0].key_id != rows[2].key_id
    assert verify(rows, after, {}).finding is None
    only_new = Signer.from_fernet(new)
    finding = verify(rows, only_new, {}).finding
    assert finding is not None
    assert (finding.seq, str(rows[0].key_id) in finding.what) == (1, True)
    with pytest.raises(UnknownKeyError):
        after.check("unknown", "text", "00")


def test_a_key_cannot_be_told_from_its_name_and_a_wrong_one_is_said() -> None:
    text = new_key()
    made = Signer.from_fernet(text)
    assert made is not None
    key = made.keys[made.current]
    assert made.current == fingerprint(key)
    assert made.current not in key.hex()
    assert Signer.from_fernet("") is None
    with pytest.raises(SecretKeyError, match="key 2 in CLINICAL_FERNET_KEY"):
        Signer.from_fernet(f"{text},short")


def test_the_hash_is_that_of_the_published_form() -> None:
    east = timezone(timedelta(hours=2))
    entry = AuditEntry("é", "who", "api", new={"b": 1, "a": None}, when=datetime(2026, 1, 1, 2, tzinfo=east))
    row = seal(entry.values(), 1, GENESIS, None)
    text = (
        '[1,"2026-01-01T00:00:00.000000+00:00","\\u00e9","who","api","",null,null,null,null,null,null,'
        '"{\\"a\\":null,\\"b\\":1}",null,null,"' + "0" * 64 + '"]'
    )
    assert row.hash == hashlib.sha256(text.encode()).hexdigest()
    assert len(COLUMNS) == len(json.loads(text))


def test_what_is_stored_has_no_secrets_and_fits() -> None:
    entry = AuditEntry(
        "e" * 1000, "nul\x00", "api", dag_id="\ud800",
        old={"password": "tiger-1", "nested": [{"api_key": "tiger-2"}], "url": "http://u:tiger-3@h/"},
        new='{"extra": {"token": "tiger-4"}}',
        extra={"long": "x" * LONGEST_JSON},
    )  # fmt: skip
    values = entry.values()
    assert "tiger" not in str(values)
    assert json.loads(values["old"])["password"] == "***"
    assert len(values["event"]) == LONGEST_NAME
    assert "\x00" not in values["who"]
    values["dag_id"].encode()
    assert len(values["extra"]) < LONGEST_JSON
    assert json.loads(values["extra"])["length"] > LONGEST_JSON
