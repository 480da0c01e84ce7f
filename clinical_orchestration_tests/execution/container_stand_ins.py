"""Docker and Kubernetes as the step handlers see them: their HTTP APIs, with processes in the place of containers.

What is asked for is really started, so that a step's events arrive through the database.
"""

from __future__ import annotations

import json
import re
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

Answer = tuple[int, Any]


@dataclass
class Container:
    """A process that stands for a container or a pod."""

    name: str
    image: str
    command: list[str]
    environment: dict[str, str]
    process: subprocess.Popen[bytes] | None = None
    stopped: bool = False

    @property
    def status(self) -> int | None:
        """The exit status; None while it runs."""
        return self.process.poll() if self.process is not None else None

    def stop(self, seconds: float) -> None:
        """Stop it as both do: SIGTERM, then SIGKILL."""
        self.stopped = True
        if self.process is None:
            return
        self.process.terminate()
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


@dataclass
class StandIn:
    """An engine of containers.

    Attributes:
        base: variables that images bring.
        log: where containers write.
        images: those that need not be pulled first.
    """

    base: Mapping[str, str]
    log: Path
    images: set[str] = field(default_factory=set)
    containers: dict[str, Container] = field(default_factory=dict)
    away: bool = False
    url: str = ""

    def start(self, container: Container) -> None:
        """Start the process of a container."""
        with self.log.open("ab") as log:
            container.process = subprocess.Popen(
                container.command,
                env={**self.base, "IMAGE": container.image, **container.environment},
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def answer(self, method: str, path: str, query: dict[str, list[str]], body: Any) -> Answer:
        """Answer a request."""
        raise NotImplementedError


class Docker(StandIn):
    """The part of the Docker Engine API that starts, shows and stops containers."""

    def answer(self, method: str, path: str, query: dict[str, list[str]], body: Any) -> Answer:
        path = re.sub(r"^/v1\.\d+", "", path)
        if path == "/version":
            return 200, {"ApiVersion": "1.44", "MinAPIVersion": "1.24", "Version": "28.0.0"}
        if path == "/containers/create":
            return self._create(query["name"][0], body)
        if path == "/images/create":
            self.images.add(f"{query['fromImage'][0]}:{query['tag'][0]}")
            return 200, {"status": "Download complete"}
        if image := re.fullmatch(r"/images/(.+)/json", path):
            return 200, {"Id": "sha256:1", "RepoTags": [image[1]]}
        found = re.fullmatch(r"/containers/([^/]+)/(json|start|stop|wait)", path)
        container = self.containers.get(found[1]) if found else None
        if found is None or container is None:
            return 404, {"message": f"No such container: {path}"}
        if found[2] == "start":
            self.start(container)
            return 204, None
        if found[2] == "stop":
            container.stop(float(query.get("t", ["10"])[0]))
            return 204, None
        if found[2] == "wait":
            return 200, {"StatusCode": container.process.wait() if container.process else 0}
        ended = container.process is None or container.status is not None
        state = {"Status": "exited" if ended else "running", "ExitCode": container.status or 0}
        return 200, {"Id": container.name, "Name": f"/{container.name}", "State": state, "Image": "sha256:1"}

    def _create(self, name: str, body: Any) -> Answer:
        if body["Image"] not in self.images:
            return 404, {"message": f"No such image: {body['Image']}"}
        if name in self.containers:
            return 409, {"message": f'Conflict. The container name "/{name}" is already in use'}
        given = dict(one.split("=", 1) for one in body["Env"])
        self.containers[name] = Container(name, body["Image"], body["Cmd"], given)
        return 201, {"Id": name, "Warnings": []}


class Kubernetes(StandIn):
    """The part of the API of Kubernetes that starts, shows and deletes jobs and their pods."""

    def answer(self, method: str, path: str, query: dict[str, list[str]], body: Any) -> Answer:
        if method == "POST" and path == "/apis/batch/v1/namespaces/trials/jobs":
            return self._create(body)
        if path == "/api/v1/namespaces/trials/pods":
            name = query["labelSelector"][0].removeprefix("job-name=")
            return 200, {"items": [{"metadata": {"name": f"{name}-pod"}}] if name in self.containers else []}
        pod = re.fullmatch("/api/v1/namespaces/trials/pods/(.+)-pod", path)
        job = re.fullmatch("/apis/batch/v1/namespaces/trials/jobs/([^/]+)(/status)?", path)
        container = self.containers.get((pod or job or [None, ""])[1])
        if container is None:
            return 404, {"kind": "Status", "reason": "NotFound", "code": 404}
        if method == "DELETE":
            if pod:
                del self.containers[container.name]
                threading.Thread(target=container.stop, args=(5.0,)).start()  # the API does not wait
            return 200, {"kind": "Status", "status": "Success"}
        kind = "active" if container.status is None else "failed" if container.status else "succeeded"
        return 200, {"metadata": {"name": container.name}, "status": {kind: 1}}

    def _create(self, body: Any) -> Answer:
        name = body["metadata"]["name"]
        if name in self.containers:
            return 409, {"kind": "Status", "reason": "AlreadyExists", "code": 409}
        [wanted] = body["spec"]["template"]["spec"]["containers"]
        given = {one["name"]: one["value"] for one in wanted["env"]}
        container = Container(name, wanted["image"], wanted["args"], given)
        self.containers[name] = container
        self.start(container)
        return 201, body

    def configuration(self) -> dict[str, Any]:
        """Return what a kubeconfig file says of it."""
        return {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "here", "cluster": {"server": self.url}}],
            "users": [{"name": "me", "user": {}}],
            "contexts": [{"name": "here", "context": {"cluster": "here", "user": "me"}}],
            "current-context": "here",
        }


@contextmanager
def serving(engine: StandIn) -> Iterator[None]:
    """Let an engine listen; what it started is ended afterwards."""

    def answering(method: str) -> Callable[[BaseHTTPRequestHandler], None]:
        def answer(self: BaseHTTPRequestHandler) -> None:
            length = int(self.headers.get("content-length") or 0)
            body = json.loads(self.rfile.read(length)) if length else None
            url = urlsplit(self.path)
            status, said = (
                (500, {"message": "it is away"})
                if engine.away
                else engine.answer(method, url.path, parse_qs(url.query), body)
            )
            text = b"" if said is None else json.dumps(said).encode()
            self.send_response(status)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        return answer

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        do_GET, do_POST, do_DELETE = answering("GET"), answering("POST"), answering("DELETE")  # noqa: N815

        def log_message(self, format: str, *args: Any) -> None:
            with engine.log.open("a") as log:
                log.write(f"{time.time():.2f} {format % args}\n")

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    engine.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        for container in engine.containers.values():
            if container.process is not None and container.status is None:
                container.process.kill()
                container.process.wait()
