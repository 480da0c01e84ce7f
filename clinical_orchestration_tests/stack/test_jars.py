"""Jars: checksums, resumption, an unreachable repository."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from clinical_orchestration.stack import jars
from clinical_orchestration.stack.jars import Jar
from clinical_orchestration.stack.model import StackError
from clinical_orchestration.stack.ports import Reservations

CONTENT = {f"/org/example/{name}.jar": name.encode() * 5000 for name in ("one", "two", "three")}


class Repository(BaseHTTPRequestHandler):
    """Serves :data:`CONTENT` with ranges; remembers what was asked."""

    asked: list[tuple[str, str | None]]

    def do_GET(self) -> None:
        content, wanted = CONTENT.get(self.path), self.headers.get("Range")
        self.asked.append((self.path, wanted))
        if content is None:
            self.send_error(404)
            return
        start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted else 0
        self.send_response(206 if wanted else 200)
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        self.wfile.write(content[start:])

    def log_message(self, format: str, *args: object) -> None:
        """Stay silent."""


@pytest.fixture
def repository() -> Iterator[str]:
    Repository.asked = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Repository)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def lock() -> list[Jar]:
    return [
        Jar(path.rsplit("/", 1)[1], path.lstrip("/"), hashlib.sha256(content).hexdigest(), len(content))
        for path, content in CONTENT.items()
    ]


def test_missing_jars_are_downloaded_once_with_progress(repository: str, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []

    assert jars.install(tmp_path, lock(), repository, lambda done, total: seen.append((done, total))) == 3
    assert jars.missing(tmp_path, lock()) == []
    assert seen[-1] == (sum(map(len, CONTENT.values())),) * 2
    assert seen == sorted(seen)
    assert jars.install(tmp_path, lock(), repository) == 0
    assert len(Repository.asked) == 3


def test_a_file_with_another_checksum_is_refused_and_discarded(repository: str, tmp_path: Path) -> None:
    first, *others = lock()
    forged = Jar(first.name, first.path, hashlib.sha256(b"other").hexdigest(), first.size)

    with pytest.raises(StackError, match=r"one\.jar .* does not have the locked checksum"):
        jars.install(tmp_path, [forged, *others], repository)

    assert jars.missing(tmp_path, [forged]) == [forged]
    assert not list(tmp_path.glob("*one.jar*"))


def test_an_unfinished_download_is_continued(repository: str, tmp_path: Path) -> None:
    jar = lock()[0]
    content = CONTENT[f"/{jar.path}"]
    # what a killed process left: the pid in the name belongs to nobody
    part = jars.jar_file(tmp_path, jar).with_name(f"{jars.jar_file(tmp_path, jar).name}.999999999.part")
    part.write_bytes(content[:4000])

    jars.install(tmp_path, [jar], repository)

    assert jars.jar_file(tmp_path, jar).read_bytes() == content
    assert Repository.asked == [(f"/{jar.path}", "bytes=4000-")]
    assert not part.exists()


def test_an_unreachable_repository_says_how_to_get_on(tmp_path: Path) -> None:
    with pytest.raises(StackError, match="cannot be reached") as raised:
        jars.install(tmp_path, lock(), f"http://127.0.0.1:{Reservations().pick()}")

    assert "CLINICAL_MAVEN_URL" in raised.value.cure
    assert "CLINICAL_JARS" in raised.value.cure


def test_a_file_that_the_repository_lacks_is_named(repository: str, tmp_path: Path) -> None:
    absent = Jar("absent.jar", "org/example/absent.jar", "0" * 64, 10)

    with pytest.raises(StackError, match=r"HTTP 404 for org/example/absent\.jar"):
        jars.install(tmp_path, [absent], repository)


def test_a_damaged_file_is_found_and_removed(repository: str, tmp_path: Path) -> None:
    jars.install(tmp_path, lock(), repository)
    damaged = jars.jar_file(tmp_path, lock()[1])
    damaged.write_bytes(b"x" * damaged.stat().st_size)

    assert jars.verify(tmp_path, lock()) == [lock()[1]]
    assert jars.missing(tmp_path, lock()) == [lock()[1]]


@pytest.mark.parametrize("group", jars.GROUPS)
def test_the_lock_is_complete(group: str) -> None:
    found = jars.locked(group)

    assert len(found) > 40
    assert len({jar.name for jar in found}) == len(found)
    for jar in found:
        assert len(jar.sha256) == 64
        assert jar.path.endswith(f"/{jar.name}")
        assert jar.size > 0
