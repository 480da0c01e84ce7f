"""The jars of Kafka and of Spark's connectors: a lock of names and checksums, and a download from a Maven repository.

``jars.lock.json`` holds two groups: ``kafka`` (the broker with all it needs) and ``spark`` (Delta, S3A and Kafka
connectors without what the ``pyspark`` wheel already has). Files are shared by all stacks of a user and checked
against their SHA-256 before they get their final name, so a file that is there is whole.
"""

from __future__ import annotations

import functools
import hashlib
import http.client
import json
import os
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import psutil

from clinical_orchestration.stack.model import StackError
from clinical_orchestration.stack.process import disk_cure

GROUPS = ("kafka", "spark")
PARALLEL = 6
TIMEOUT_SECONDS = 20.0
ATTEMPTS = 3

Progress = Callable[[int, int], None]
"""Called with the bytes done and the bytes in all, from several threads but never at the same time."""


@dataclass(frozen=True)
class Jar:
    """One locked file; ``path`` is its place in a Maven repository, ``size`` is in bytes."""

    name: str
    path: str
    sha256: str
    size: int


@functools.cache
def locked(group: str) -> tuple[Jar, ...]:
    """Return the locked jars of a group of :data:`GROUPS`."""
    lock = json.loads(Path(__file__).with_name("jars.lock.json").read_text())
    return tuple(Jar(**item) for item in lock["groups"][group])


def jar_file(folder: Path, jar: Jar) -> Path:
    """Return where a jar lies; the checksum in the name keeps two versions of a lock apart."""
    return folder / f"{jar.sha256[:12]}-{jar.name}"


def missing(folder: Path, jars: Sequence[Jar]) -> list[Jar]:
    """Return the jars that are not there in full size. Checksums were verified when they were downloaded."""

    def there(jar: Jar) -> bool:
        try:
            return jar_file(folder, jar).stat().st_size == jar.size
        except OSError:
            return False

    return [jar for jar in jars if not there(jar)]


def installed(folder: Path, group: str) -> bool:
    """Whether all jars of a group are there."""
    return not missing(folder, locked(group))


def class_path(folder: Path, group: str) -> list[str]:
    """Return the files of a group in lock order."""
    return [str(jar_file(folder, jar)) for jar in locked(group)]


def install(folder: Path, jars: Sequence[Jar], base_url: str, progress: Progress | None = None) -> int:
    """Download the missing jars; return how many. Unfinished downloads are continued.

    Raises :class:`StackError`: repository out of reach, a file that does not match its checksum, no space or no right
    to write. What was downloaded whole stays for the next attempt.
    """
    wanted = missing(folder, jars)
    if not wanted:
        return 0
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StackError(f"{folder} cannot be made: {error}", _folder_cure(error, folder)) from error
    total = sum(jar.size for jar in wanted)
    done = 0
    lock = threading.Lock()
    giving_up = threading.Event()

    def advance(count: int) -> None:
        nonlocal done
        with lock:
            done += count
            if progress:
                progress(min(done, total), total)

    with ThreadPoolExecutor(PARALLEL, thread_name_prefix="jars") as pool:
        futures = [pool.submit(_fetch, folder, jar, base_url, advance, giving_up) for jar in wanted]
        try:
            for future in as_completed(futures):
                future.result()
        except BaseException:
            giving_up.set()
            for future in futures:
                future.cancel()
            raise
    return len(wanted)


def verify(folder: Path, jars: Sequence[Jar]) -> list[Jar]:
    """Return the jars whose file does not have the locked checksum, and remove those files."""
    wrong = []
    for jar in jars:
        path = jar_file(folder, jar)
        if path.exists() and _sha256(path) != jar.sha256:
            path.unlink()
            wrong.append(jar)
    return wrong


def unreachable(base_url: str, reason: str) -> StackError:
    """Return the error for a repository that does not answer."""
    return StackError(
        f"the Maven repository {base_url} cannot be reached: {reason}",
        "Allow access to it, or set CLINICAL_MAVEN_URL to a mirror, or copy the jar folder of another machine and set "
        "CLINICAL_JARS to it; then start again. Until then the stack runs without Kafka and without Spark's "
        "connectors, and the main pipeline reads files.",
    )


def _fetch(folder: Path, jar: Jar, base_url: str, advance: Callable[[int], None], giving_up: threading.Event) -> None:
    final = jar_file(folder, jar)
    part = final.with_name(f"{final.name}.part")
    claim = final.with_name(f"{final.name}.{os.getpid()}.part")
    try:
        # another process may download into the same folder: each writes a file of its own, and takes over what an
        # ended process left
        for left in (part, *final.parent.glob(f"{final.name}.*.part")):
            if not claim.exists() and left.exists() and not _of_live_process(left):
                left.replace(claim)
        counted = 0
        for attempt in range(1, ATTEMPTS + 1):
            if giving_up.is_set():
                break
            try:
                counted = _download(claim, jar, base_url, advance, counted, giving_up)
                break
            except (OSError, http.client.HTTPException) as error:
                if isinstance(error, urllib.error.HTTPError):
                    reason = f"HTTP {error.code} for {jar.path}"
                    final_answer = error.code < 500
                elif isinstance(error, OSError) and error.errno is not None and error.filename is not None:
                    raise StackError(f"{error.filename}: {error.strerror}", _folder_cure(error, folder)) from error
                else:
                    cause = getattr(error, "reason", None) or error
                    reason, final_answer = f"{type(cause).__name__}: {cause}", False
                    if isinstance(cause, OSError) and cause.errno in _DISK_ERRORS:
                        raise StackError(f"{folder}: {cause.strerror}", _folder_cure(cause, folder)) from error
                if final_answer or attempt == ATTEMPTS:
                    raise unreachable(base_url, reason) from None
                time.sleep(0.5 * attempt)
        if giving_up.is_set():
            if claim.exists():
                claim.replace(part)
            return
        if claim.stat().st_size != jar.size or _sha256(claim) != jar.sha256:
            claim.unlink()
            raise StackError(
                f"{jar.name} from {base_url} does not have the locked checksum",
                "The repository or a proxy on the way changed the file. Set CLINICAL_MAVEN_URL to one you trust; the "
                "file was discarded.",
            )
        claim.replace(final)
    except OSError as error:
        raise StackError(f"{folder}: {error}", _folder_cure(error, folder)) from error
    except StackError:
        if claim.exists():
            claim.replace(part)  # the next attempt continues it
        raise


def _of_live_process(part: Path) -> bool:
    pid = part.name.split(".")[-2]
    return pid.isdigit() and int(pid) != os.getpid() and psutil.pid_exists(int(pid))


def _download(
    part: Path, jar: Jar, base_url: str, advance: Callable[[int], None], counted: int, giving_up: threading.Event
) -> int:
    """Append what is missing of ``part``; return how many bytes were reported so far."""
    have = part.stat().st_size if part.exists() else 0
    if have > jar.size:
        part.unlink()
        have = 0
    if have < jar.size:
        request = urllib.request.Request(f"{base_url}/{jar.path}")  # noqa: S310 - the scheme is the user's setting
        if have:
            request.add_header("Range", f"bytes={have}-")
        with urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS) as answer:  # noqa: S310
            if have and answer.status != 206:
                have = 0  # a server without ranges sends the whole file again
            with open(part, "ab" if have else "wb") as stream:
                if have > counted:
                    advance(have - counted)
                    counted = have
                while block := answer.read(1 << 16):
                    stream.write(block)
                    have += len(block)
                    if have > counted:
                        advance(have - counted)
                        counted = have
                    if giving_up.is_set():
                        return counted
        if have < jar.size:
            raise http.client.IncompleteRead(b"", jar.size - have)
    elif have > counted:
        advance(have - counted)
        counted = have
    return counted


def _sha256(path: Path) -> str:
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _folder_cure(error: OSError, folder: Path) -> str:
    return disk_cure(error, folder).replace("CLINICAL_HOME", "CLINICAL_JARS")


_DISK_ERRORS = {28, 122, 30, 13}  # ENOSPC, EDQUOT, EROFS, EACCES
