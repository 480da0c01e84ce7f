"""A queue manager's messaging REST API (version 3) as documented, over real HTTP, with faults on demand.

Documented and kept: paths, the CSRF header, basic and LTPA authentication, 200/201/204, 401, 403, 404 (MQRC 2085),
405 (2016, 2051), 415, 501 for messages that are no text, 503 (2059), error bodies, ``ID:`` and 48 hexadecimal digits,
`messageId`, `correlationId` and `limit`, headers of message properties, JMS-like order.

Faults: a function sees each request before and after its effect and may end the connection, answer with a status,
wait, or do anything else (such as kill the client).
"""

from __future__ import annotations

import base64
import json
import secrets
import ssl
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Literal, NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

Phase = Literal["before", "after"]


class Drop(Exception):  # noqa: N818 - a way to say it, no failure
    """The connection ends without an answer."""


class Answer(Exception):  # noqa: N818
    """The request is answered with this status and reason code, and has no effect (any more)."""

    def __init__(self, status: int, reason: int | None = None) -> None:
        super().__init__(status)
        self.status, self.reason = status, reason


class Seen(NamedTuple):
    """A request as the fault function sees it; `number` counts from 1."""

    number: int
    method: str
    queue: str
    what: str
    phase: Phase


@dataclass
class Message:
    """One message on a queue."""

    body: str
    message_id: str
    correlation_id: str = "0" * 48
    format: str = "MQSTR"
    persistence: str = "persistent"
    properties: str | None = None


@dataclass
class QueueManager:
    """Queues, credentials and the server; start it as a context."""

    name: str = "QM1"
    user: str = "bridge"
    password: str = "pass-word-1"
    fault: Callable[[Seen], None] | None = None
    running: bool = True
    certificate: Path | None = None  # PEM with key: https
    queues: dict[str, list[Message]] = field(default_factory=lambda: {"LAB.RESULTS": [], "LAB.RESULTS.BACKOUT": []})
    inhibited: set[tuple[str, str]] = field(default_factory=set)  # (queue, "GET" or "PUT")
    log: list[Seen] = field(default_factory=list)
    tokens: set[str] = field(default_factory=set)
    logins: int = 0

    def __post_init__(self) -> None:
        self.lock = threading.RLock()
        self._count = 0
        self._requests = 0

    def new_id(self) -> str:
        """Return a message id as queue managers make them: AMQ, the padded name, a number."""
        with self.lock:
            self._count += 1
            return (b"AMQ " + self.name.encode().ljust(12)).hex() + f"{self._count:016x}"

    def put(self, body: str, queue: str = "LAB.RESULTS", *, message_format: str = "MQSTR") -> str:
        """Put a message as another application would."""
        with self.lock:
            message = Message(body, self.new_id(), format=message_format)
            self.queues[queue].append(message)
            return message.message_id

    def __enter__(self) -> QueueManager:
        manager = self

        class Handler(_Handler):
            qmgr = manager

        self.server = _Server(("127.0.0.1", 0), Handler)
        if self.certificate is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(self.certificate)
            self.server.socket = context.wrap_socket(self.server.socket, server_side=True)
        scheme = "http" if self.certificate is None else "https"
        self.url = f"{scheme}://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def seen(self, method: str, queue: str, what: str, phase: Phase) -> None:
        """Note a request and let the fault function act."""
        with self.lock:
            self._requests += phase == "before"
            seen = Seen(self._requests, method, queue, what, phase)
            self.log.append(seen)
        if self.fault is not None:
            self.fault(seen)


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_: object) -> None:
        """Say nothing of clients that are killed in a request."""


class _Handler(BaseHTTPRequestHandler):
    qmgr: QueueManager
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self._serve("GET")

    def do_POST(self) -> None:
        self._serve("POST")

    def do_DELETE(self) -> None:
        self._serve("DELETE")

    def _serve(self, method: str) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        try:
            self._handle(method, body)
        except Drop:
            self.close_connection = True
            self.connection.close()
        except Answer as answer:
            self._error(answer.status, answer.reason)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    def _handle(self, method: str, body: bytes) -> None:
        address = urlsplit(self.path)
        parts = [unquote(part) for part in address.path.split("/")[1:]]
        if parts == ["ibmmq", "rest", "v3", "login"] and method == "POST":
            self._log_in(body)
            return
        self._authenticate()
        if self.headers.get("ibm-mq-rest-csrf-token") is None:
            raise Answer(403)
        if len(parts) != 9 or parts[:5] != ["ibmmq", "rest", "v3", "messaging", "qmgr"] or parts[6] != "queue":
            raise Answer(404)
        manager, queue, what = parts[5], parts[7], parts[8]
        query = {name: values[0] for name, values in parse_qs(address.query).items()}
        qmgr = self.qmgr
        qmgr.seen(method, queue, what, "before")
        if not qmgr.running:
            raise Answer(503, 2059)
        if manager != qmgr.name:
            raise Answer(404, 2058)
        if queue not in qmgr.queues:
            raise Answer(404, 2085)
        if method != "POST" and (queue, "GET") in qmgr.inhibited and what == "message":
            raise Answer(405, 2016)
        if method == "POST" and (queue, "PUT") in qmgr.inhibited:
            raise Answer(405, 2051)
        status, headers, answer = getattr(self, f"_{method.lower()}_{what}")(queue, query, body)
        qmgr.seen(method, queue, what, "after")
        self._answer(status, headers, answer)

    def _log_in(self, body: bytes) -> None:
        qmgr = self.qmgr
        given = json.loads(body)
        if (given.get("username"), given.get("password")) != (qmgr.user, qmgr.password):
            raise Answer(401)
        token = secrets.token_hex(8)
        with qmgr.lock:
            qmgr.tokens = {token}
            qmgr.logins += 1
        self._answer(204, {"Set-Cookie": f"LtpaToken2={token}; Path=/; HttpOnly"}, b"")

    def _authenticate(self) -> None:
        qmgr = self.qmgr
        given = self.headers.get("Authorization", "")
        expected = base64.b64encode(f"{qmgr.user}:{qmgr.password}".encode()).decode()
        cookies = self.headers.get("Cookie", "")
        if given != f"Basic {expected}" and not any(f"LtpaToken2={token}" in cookies for token in qmgr.tokens):
            raise Answer(401)

    def _matching(self, queue: str, query: dict[str, str]) -> list[Message]:
        def plain(name: str) -> str | None:
            value = query.get(name)
            if value is None:
                return None
            if not value.startswith("ID:") or len(value) != 51:
                raise Answer(400)
            return value[3:].lower()

        identifier, correlation = plain("messageId"), plain("correlationId")
        return [
            message
            for message in self.qmgr.queues[queue]
            if (identifier is None or message.message_id == identifier)
            and (correlation is None or message.correlation_id == correlation)
        ]

    def _get_messagelist(self, queue: str, query: dict[str, str], _: bytes) -> tuple[int, dict[str, str], bytes]:
        with self.qmgr.lock:
            found = self._matching(queue, query)[: int(query.get("limit", "10"))]
        if (queue, "GET") in self.qmgr.inhibited:
            found = []
        items = [
            {"format": item.format, "messageId": f"ID:{item.message_id}", "correlationId": f"ID:{item.correlation_id}"}
            for item in found
        ]
        return 200, {"Content-Type": "application/json; charset=utf-8"}, json.dumps({"messages": items}).encode()

    def _first_text(self, queue: str, query: dict[str, str]) -> Message | None:
        found = self._matching(queue, query)
        if found and found[0].format != "MQSTR":
            raise Answer(501, 2110)
        return found[0] if found else None

    def _described(self, message: Message) -> dict[str, str]:
        headers = {
            "Content-Type": "text/plain; charset=utf-8",
            "ibm-mq-md-messageId": f"ID:{message.message_id}",
            "ibm-mq-md-persistence": message.persistence,
            "ibm-mq-md-expiry": "unlimited",
        }
        if message.correlation_id.strip("0"):
            headers["ibm-mq-md-correlationId"] = f"ID:{message.correlation_id}"
        if message.properties:
            headers["ibm-mq-usr"] = message.properties
        return headers

    def _get_message(self, queue: str, query: dict[str, str], _: bytes) -> tuple[int, dict[str, str], bytes]:
        with self.qmgr.lock:
            message = self._first_text(queue, query)
        return (204, {}, b"") if message is None else (200, self._described(message), message.body.encode())

    def _delete_message(self, queue: str, query: dict[str, str], _: bytes) -> tuple[int, dict[str, str], bytes]:
        deadline = time.monotonic() + int(query.get("wait", "0")) / 1000
        while True:
            with self.qmgr.lock:
                message = self._first_text(queue, query)
                if message is not None:
                    self.qmgr.queues[queue].remove(message)
                    return 200, self._described(message), message.body.encode()
            if time.monotonic() >= deadline:
                return 204, {}, b""
            time.sleep(0.01)

    def _post_message(self, queue: str, _: dict[str, str], body: bytes) -> tuple[int, dict[str, str], bytes]:
        if not self.headers.get("Content-Type", "").startswith(("text/", "application/json", "application/xml")):
            raise Answer(415)
        correlation = self.headers.get("ibm-mq-md-correlationId", "ID:" + "0" * 48)
        message = Message(
            body.decode("utf-8"),
            self.qmgr.new_id(),
            correlation.removeprefix("ID:"),
            persistence=self.headers.get("ibm-mq-md-persistence", "nonPersistent"),
            properties=self.headers.get("ibm-mq-usr"),
        )
        with self.qmgr.lock:
            self.qmgr.queues[queue].append(message)
        return 201, {"ibm-mq-md-messageId": f"ID:{message.message_id}"}, b""

    def _error(self, status: int, reason: int | None) -> None:
        error: dict[str, object] = {
            "type": "java" if reason else "rest",
            "msgId": "MQWB0303E" if reason else "MQWB0104E",
            "message": f"The request of user {self.qmgr.user} failed.",  # must not show in the client's errors
        }
        if reason:
            error |= {"completionCode": 2, "reasonCode": reason}
        body = json.dumps({"error": [error]}).encode()
        self._answer(status, {"Content-Type": "application/json; charset=utf-8"}, body)

    def _answer(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if status != 204:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if status != 204:
            self.wfile.write(body)
