"""The file outside of the database: what it keeps, crashes, rotation, several writers."""

from __future__ import annotations

import os
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from clinical_orchestration.audit import anchor as anchor_module
from clinical_orchestration.audit.anchor import Anchor
from clinical_orchestration.audit.chain import verify
from clinical_orchestration_tests.audit.rows import chained, entries, signer

KEY = signer()
ROWS = chained(entries(40), KEY)


def test_rows_are_named_with_their_hash(tmp_path: Path) -> None:
    anchor = Anchor(tmp_path / "audit" / "head.jsonl")
    assert not anchor.exists
    for row in ROWS[:3]:
        anchor.append(row, KEY)
    read = anchor.read(KEY)
    assert (read.hashes, read.forged) == ({row.seq: row.hash for row in ROWS[:3]}, 0)
    assert (anchor.path.stat().st_mode & 0o777, anchor.path.parent.stat().st_mode & 0o777) == (0o600, 0o700)


def test_a_row_that_was_named_survives_a_power_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[tuple[str, str]] = []

    def note(handle: int) -> None:
        name = Path(os.readlink(f"/proc/self/fd/{handle}"))
        synced.append((name.name, (name / "head.jsonl" if name.is_dir() else name).read_text()))

    monkeypatch.setattr(os, "fdatasync", note)
    monkeypatch.setattr(os, "fsync", note)
    anchor = Anchor(tmp_path / "head.jsonl")
    anchor.append(ROWS[0], KEY)
    assert [name for name, _ in synced] == ["head.jsonl", tmp_path.name], "the new file, then its name"
    assert all(ROWS[0].hash in text for _, text in synced)
    anchor.append(ROWS[1], KEY)
    assert synced[2:] == [("head.jsonl", anchor.path.read_text())]


def test_a_writer_that_comes_late_leaves_the_newer_row(tmp_path: Path) -> None:
    anchor = Anchor(tmp_path / "head.jsonl")
    anchor.append(ROWS[4], KEY)
    anchor.append(ROWS[3], KEY)
    assert anchor.read(KEY).hashes == {5: ROWS[4].hash}


@pytest.mark.parametrize("left", [b"", b'{"seq": 2, "ha', b"\x00\xff"])
def test_a_line_cut_off_by_a_crash_is_made_up_for(tmp_path: Path, left: bytes) -> None:
    anchor = Anchor(tmp_path / "head.jsonl")
    anchor.append(ROWS[0], KEY)
    with anchor.path.open("ab") as file:
        file.write(left)
    anchor.append(ROWS[2], KEY)
    read = anchor.read(KEY)
    assert (read.hashes, read.forged) == ({1: ROWS[0].hash, 3: ROWS[2].hash}, 0)


def test_a_full_file_makes_room_and_the_newest_rows_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(anchor_module, "FULL_BYTES", 1500)
    anchor = Anchor(tmp_path / "head.jsonl")
    for row in ROWS:
        anchor.append(row, KEY)
        assert max(anchor.read(KEY).hashes) == row.seq
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) < 5000
    assert anchor.read(KEY).hashes.items() <= {row.seq: row.hash for row in ROWS}.items()


def test_a_line_written_without_the_key_is_told(tmp_path: Path) -> None:
    anchor = Anchor(tmp_path / "head.jsonl")
    anchor.append(ROWS[0], KEY)
    anchor.append(replace(ROWS[1], hash="0" * 64), signer())
    assert anchor.read(KEY).forged == 2
    assert anchor.read(None).forged == 0


def test_writers_at_once_leave_the_newest_row(tmp_path: Path) -> None:
    anchor = Anchor(tmp_path / "head.jsonl")

    def write(start: int) -> None:
        for row in ROWS[start::4]:
            anchor.append(row, KEY)

    threads = [threading.Thread(target=write, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    hashes = anchor.read(KEY).hashes
    assert max(hashes) == 40
    assert hashes.items() <= {row.seq: row.hash for row in ROWS}.items()
    assert list(hashes) == sorted(hashes)


def test_a_trail_that_grows_again_does_not_push_out_what_was_taken_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    anchor = Anchor(tmp_path / "head.jsonl")
    for row in ROWS[:8]:
        anchor.append(row, KEY)
    other = [*ROWS[:6], *chained(entries(200)[::-1], KEY)[6:]]
    monkeypatch.setattr(anchor_module, "FULL_BYTES", 1000)
    for row in other[6:]:
        anchor.append(row, KEY)
    finding = verify(other, None, anchor.read(KEY).hashes).finding
    assert finding is not None
    assert finding.seq <= 7
    assert anchor.read(KEY).hashes[7] == ROWS[6].hash
