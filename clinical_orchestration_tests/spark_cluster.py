"""A stand-in for a standalone Spark master and a driver's page: the answers of Spark 4.1.1, as recorded from one."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

VERSION = "4.1.1"
TRACE = "\n\torg.apache.spark.deploy.rest.SubmitRestProtocolMessage.validate(SubmitRestProtocolMessage.scala:70)"
REQUIRED = ("appArgs", "appResource", "clientSparkVersion", "environmentVariables", "mainClass", "sparkProperties")


class SparkCluster:
    """State of the cluster; `advance` moves a driver on, as time does on a real one."""

    def __init__(self) -> None:
        self.drivers: dict[str, dict[str, Any]] = {}
        self.requests: list[dict[str, Any]] = []
        self.applications: list[dict[str, Any]] = []
        self.application_jobs: dict[str, list[dict[str, Any]]] = {}
        self.url = ""

    def advance(self, driver: str, state: str, message: str | None = None) -> None:
        self.drivers[driver].update(state=state, message=message, worker="worker-1")

    def get(self, path: str, query: dict[str, list[str]]) -> tuple[int, Any]:
        if path.startswith("/v1/submissions/status/"):
            driver = self.drivers.get(path.rsplit("/", 1)[-1])
            answer: dict[str, Any] = {
                "action": "SubmissionStatusResponse",
                "serverSparkVersion": VERSION,
                "submissionId": path.rsplit("/", 1)[-1],
                "success": driver is not None,
            }
            if driver is not None:
                answer["driverState"] = driver["state"]
                if driver["worker"]:
                    answer |= {"workerId": driver["worker"], "workerHostPort": "10.0.0.5:37078"}
                if driver["message"]:
                    answer["message"] = "Exception from the cluster:\n" + driver["message"] + TRACE
            return 200, answer
        if path == "/json/":
            known = [
                {"id": key, "starttime": "1795455874192", "state": item["state"], "worker": item["worker"] or "None"}
                for key, item in self.drivers.items()
            ]
            over = ("FINISHED", "KILLED", "FAILED", "ERROR")
            return 200, {
                "workers": [{"id": "worker-1", "webuiaddress": self.url}],
                "activedrivers": [item for item in known if item["state"] not in over],
                "completeddrivers": [item for item in known if item["state"] in over],
            }
        if path == "/log":
            return 302, "/log/?" + "&".join(f"{key}={values[0]}" for key, values in query.items())
        if path == "/log/":
            kind = query["logType"][0]
            text = f"{kind} of {query['driverId'][0]}"
            return 200, f"==== Bytes 0-{len(text)} of {len(text)} of /opt/spark/work/{kind} ====\n{text}\n"
        if path == "/api/v1/applications":
            return 200, self.applications
        if path.startswith("/api/v1/applications/") and path.endswith("/jobs"):
            return 200, self.application_jobs[path.split("/")[4]]
        return 404, "no such app"

    def post(self, path: str, body: bytes) -> tuple[int, Any]:
        if path == "/v1/submissions/create":
            try:
                said = json.loads(body)
            except ValueError:
                return 400, self._error("Malformed request: com.fasterxml.jackson.core.JsonParseException: x" + TRACE)
            self.requests.append(said)
            properties = said.get("sparkProperties", {})
            if [name for name in REQUIRED if name not in said] or "spark.app.name" not in properties:
                why = "Malformed request: org.apache.spark.deploy.rest.SubmitRestProtocolException: Validation of "
                return 400, self._error(f"{why}message CreateSubmissionRequest failed!{TRACE}")
            driver = f"driver-20261123174434-{len(self.drivers):04d}"
            self.drivers[driver] = {"state": "SUBMITTED", "message": None, "worker": None}
            return 200, {
                "action": "CreateSubmissionResponse",
                "message": f"Driver successfully submitted as {driver}",
                "serverSparkVersion": VERSION,
                "submissionId": driver,
                "success": True,
            }
        if path.startswith("/v1/submissions/kill/"):
            name = path.rsplit("/", 1)[-1]
            found = self.drivers.get(name)
            going_on = found is not None and found["state"] in ("SUBMITTED", "RUNNING")
            if found is not None and going_on:
                found["state"] = "KILLED"
            said_back = (
                f"Kill request for {name} submitted"
                if going_on
                else f"Driver {name} has already finished or does not exist"
            )
            return 200, {
                "action": "KillSubmissionResponse",
                "message": said_back,
                "serverSparkVersion": VERSION,
                "submissionId": name,
                "success": going_on,
            }
        return 468, self._error("Unknown protocol version 'v2'.") | {"highestProtocolVersion": "v1"}

    @staticmethod
    def _error(message: str) -> dict[str, Any]:
        return {"action": "ErrorResponse", "message": message, "serverSparkVersion": VERSION}


@contextlib.contextmanager
def spark_cluster() -> Iterator[SparkCluster]:
    """Serve a cluster on a free port of loopback; its address is in `url`."""
    cluster = SparkCluster()

    class Handler(BaseHTTPRequestHandler):
        def answer(self, status: int, content: Any) -> None:
            data = (content if isinstance(content, str) else json.dumps(content)).encode()
            self.send_response(status)
            if status == 302:
                self.send_header("Location", content)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def do_GET(self) -> None:
            address = urlsplit(self.path)
            self.answer(*cluster.get(address.path, parse_qs(address.query)))

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            self.answer(*cluster.post(self.path, body))

        def log_message(self, format: str, *args: Any) -> None:
            """Keep the test's output clean."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    cluster.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield cluster
    finally:
        server.shutdown()
        server.server_close()
        thread.join(5)
