"""Locks between processes of one deployment: who refines silver does so alone.

Delta's commits are atomic for delta-rs, but not between it and a Spark driver on S3, so that the tables that both
write have one writer at a time. Where the deployment has PostgreSQL (``POSTGRES_URL``) the lock is an advisory lock
there, for all its machines; else a file lock, for one machine. Either is released when its holder dies.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from clinical_orchestration.settings import ClientSettings

REFINE = "refine"
"""The lock of who brings silver, duplicates and quarantine up to bronze, or merges their files."""


class LockedError(RuntimeError):
    """Another process holds the lock for longer than was waited."""


@contextlib.contextmanager
def exclusive(name: str, scope: str, *, wait: float, settings: ClientSettings | None = None) -> Iterator[None]:
    """Hold a lock during the block.

    Args:
        name: what is locked, such as :data:`REFINE`.
        scope: of which deployment: the address of a table that its holders write.
        wait: seconds to wait for another holder; 0 tries once.
        settings: where PostgreSQL is.

    Raises:
        LockedError: another process held it all the time.
    """
    settings = settings or ClientSettings()
    digest = hashlib.sha256(f"{name}\0{scope}".encode()).digest()
    url = settings.postgres_url.get_secret_value()
    with _in_postgres(url, digest, name, wait) if url else _in_file(digest, name, wait):
        yield


def _patience(wait: float) -> Iterator[None]:
    """Yield for each try, until the time is over."""
    deadline = time.monotonic() + wait
    while True:
        yield
        if time.monotonic() >= deadline:
            return
        time.sleep(0.25)


def _locked(name: str, wait: float) -> LockedError:
    return LockedError(f"another process has held the lock {name!r} for {wait:.0f} s; look which run is at work")


@contextlib.contextmanager
def _in_postgres(url: str, digest: bytes, name: str, wait: float) -> Iterator[None]:
    import psycopg2

    key = int.from_bytes(digest[:8], "big", signed=True)
    connection = psycopg2.connect(url, connect_timeout=10, application_name="clinical-lock")
    try:
        connection.autocommit = True
        with connection.cursor() as cursor:
            for _ in _patience(wait):
                cursor.execute("select pg_try_advisory_lock(%s)", (key,))
                row = cursor.fetchone()
                if row is not None and row[0]:
                    break
            else:
                raise _locked(name, wait)
        yield
    finally:
        connection.close()


@contextlib.contextmanager
def _in_file(digest: bytes, name: str, wait: float) -> Iterator[None]:
    folder = Path(tempfile.gettempdir()) / f"clinical-locks-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    handle = os.open(folder / f"{digest.hex()[:32]}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        for _ in _patience(wait):
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                continue
        else:
            raise _locked(name, wait)
        yield
    finally:
        os.close(handle)
