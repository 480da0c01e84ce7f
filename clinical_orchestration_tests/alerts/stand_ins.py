"""Real servers on loopback that stand in for Slack and for a mail server."""

from __future__ import annotations

import base64
import json
import socketserver
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from email import message_from_bytes, policy
from email.message import EmailMessage
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Slack:
    """What the webhook got, and what it answers: a list of (status, headers, body), then 200 for ever."""

    url: str = ""
    bodies: list[dict[str, Any]] = field(default_factory=list)
    answers: list[tuple[int, dict[str, str], str]] = field(default_factory=list)
    requests: int = 0


@contextmanager
def slack_server() -> Iterator[Slack]:
    """Serve an incoming webhook."""
    slack = Slack()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            slack.requests += 1
            status, headers, text = slack.answers.pop(0) if slack.answers else (200, {}, "ok")
            if status == 200:
                slack.bodies.append(body)
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    slack.url = f"http://127.0.0.1:{server.server_port}/services/T000/B000/very-secret-part"
    try:
        yield slack
    finally:
        server.shutdown()
        server.server_close()


@dataclass
class Mail:
    """What the mail server got, and how it behaves."""

    port: int = 0
    user: str | None = None
    password: str | None = None
    refuse: tuple[int, str] | None = None  # its answer to DATA
    messages: list[EmailMessage] = field(default_factory=list)
    recipients: list[list[str]] = field(default_factory=list)


@contextmanager
def mail_server(user: str | None = None, password: str | None = None) -> Iterator[Mail]:
    """Serve SMTP with AUTH PLAIN, as much of it as a client needs."""
    mail = Mail(user=user, password=password)

    class Handler(socketserver.StreamRequestHandler):
        def say(self, line: str) -> None:
            self.wfile.write(line.encode() + b"\r\n")

        def handle(self) -> None:
            self.say("220 stand-in ESMTP")
            logged_in = mail.user is None
            recipients: list[str] = []
            while line := self.rfile.readline():
                word, _, rest = line.decode().strip().partition(" ")
                match word.upper():
                    case "EHLO" | "HELO":
                        self.say("250-stand-in")
                        self.say("250 AUTH PLAIN")
                    case "AUTH":
                        _, name, secret = base64.b64decode(rest.split()[-1]).decode().split("\0")
                        logged_in = (name, secret) == (mail.user, mail.password)
                        self.say("235 fine" if logged_in else "535 no")
                    case "MAIL":
                        recipients = []
                        self.say("250 fine" if logged_in else "530 log in first")
                    case "RCPT":
                        recipients.append(rest.partition("<")[2].partition(">")[0])
                        self.say("250 fine")
                    case "DATA":
                        self.say("354 go on")
                        lines = []
                        while (data := self.rfile.readline()) != b".\r\n":
                            lines.append(data[1:] if data.startswith(b"..") else data)
                        if mail.refuse:
                            self.say(f"{mail.refuse[0]} {mail.refuse[1]}")
                            continue
                        content = message_from_bytes(b"".join(lines), policy=policy.default)
                        assert isinstance(content, EmailMessage)
                        mail.messages.append(content)
                        mail.recipients.append(recipients)
                        self.say("250 taken")
                    case "QUIT":
                        self.say("221 bye")
                        return
                    case _:
                        self.say("250 fine")

    class Server(socketserver.ThreadingTCPServer):
        allow_reuse_address = True
        daemon_threads = True

    server = Server(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    mail.port = server.server_address[1]
    try:
        yield mail
    finally:
        server.shutdown()
        server.server_close()
