"""The newest hashes of the trail in a file outside of the database, so that rows taken off its end are missed.

``head.jsonl`` has one line a row that was recorded: number, hash, and a signature where there is a key. A line is
written, to the disk, after the row's transaction, so that a crash between the two leaves the anchor behind the trail
and never before it; the next line makes up for it. A line that a crash cut off is passed over. The file becomes
``head.jsonl.1`` when it is full, in place of the older one. Where a new row takes a number that was named with another
hash, rows were taken off the end: the files are put aside as ``head.jsonl.conflict`` then, so that the trail cannot
outgrow them.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from clinical_orchestration.audit.chain import Row
from clinical_orchestration.audit.keys import Signer, UnknownKeyError

FULL_BYTES = 1_000_000
_LINE_BYTES = 4096  # more than one line has


@dataclass(frozen=True)
class Anchors:
    """What the file holds: hashes by row number, and the number of the first line whose signature is wrong, or 0."""

    hashes: dict[int, str]
    forged: int


class Anchor:
    """The file of one trail.

    Args:
        path: where it lies; its folder is made, for its owner only.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._older = path.with_name(f"{path.name}.1")
        self._evidence = path.with_name(f"{path.name}.conflict")

    @property
    def exists(self) -> bool:
        """Whether something was ever anchored here."""
        return self.path.exists() or self._older.exists()

    def append(self, row: Row, signer: Signer | None) -> None:
        """Name a row, unless a newer one is named already.

        Raises:
            OSError: the file cannot be written.
        """
        self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = os.open(self.path.with_name("lock"), os.O_CREAT | os.O_RDWR, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            self._append(row, signer)
        finally:
            os.close(lock)

    def _append(self, row: Row, signer: Signer | None) -> None:
        handle = os.open(self.path, os.O_CREAT | os.O_RDWR | os.O_APPEND, 0o600)
        try:
            size = os.fstat(handle).st_size
            tail = os.pread(handle, _LINE_BYTES, max(0, size - _LINE_BYTES))
            if next((seq for seq, *_ in _lines(tail, reverse=True)), 0) >= row.seq:
                self._keep_evidence(row)
                return
            line = {"seq": row.seq, "hash": row.hash}
            if signer is not None:
                line |= {"key_id": signer.current, "mac": signer.sign(_named(row.seq, row.hash))}
            cut_off = b"" if tail.endswith(b"\n") or not tail else b"\n"
            os.write(handle, cut_off + json.dumps(line).encode() + b"\n")
            os.fdatasync(handle)  # a power cut must not take what the database has kept
        finally:
            os.close(handle)
        if size > FULL_BYTES:
            os.replace(self.path, self._older)
        if size == 0 or size > FULL_BYTES:
            _sync_folder(self.path.parent)

    def _keep_evidence(self, row: Row) -> None:
        """Put the files aside where they name another row in the place of this one, before they make room for it."""
        if not self._evidence.exists() and self.read(None).hashes.get(row.seq, row.hash) != row.hash:
            part = self._evidence.with_suffix(".part")
            with part.open("wb") as stream:
                part.chmod(0o600)
                stream.write(b"\n".join(path.read_bytes() for path in (self._older, self.path) if path.exists()))
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(part, self._evidence)
            _sync_folder(self.path.parent)

    def read(self, signer: Signer | None) -> Anchors:
        """Return what was anchored, in the older file and in one that was put aside too.

        Raises:
            OSError: a file is there and cannot be read.
        """
        hashes: dict[int, str] = {}
        forged = 0
        for path in (self._evidence, self._older, self.path):
            content = path.read_bytes() if path.exists() else b""
            for seq, digest, key_id, mac in _lines(content):
                hashes.setdefault(seq, digest)  # what was said first counts
                if signer is not None and not forged and not _right(signer, seq, digest, key_id, mac):
                    forged = seq
        return Anchors(hashes, forged)


def _sync_folder(folder: Path) -> None:
    """Bring the names of a folder's files to the disk."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _named(seq: int, digest: str) -> str:
    return f"anchor {seq} {digest}"


def _right(signer: Signer, seq: int, digest: str, key_id: str | None, mac: str | None) -> bool:
    if key_id is None or mac is None:
        return True  # of a time without a key; the row that it names has to be accounted for
    try:
        return signer.check(key_id, _named(seq, digest), mac)
    except UnknownKeyError:
        return False


def _lines(content: bytes, *, reverse: bool = False) -> Iterator[tuple[int, str, str | None, str | None]]:
    for line in content.split(b"\n")[:: -1 if reverse else 1]:
        try:
            found = json.loads(line)
            yield int(found["seq"]), str(found["hash"]), found.get("key_id"), found.get("mac")
        except (ValueError, TypeError, KeyError, AttributeError):
            continue  # cut off by a crash, or where the window of the tail begins
