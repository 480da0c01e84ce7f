"""One real, cheap request to each kind of service. A probe returns when the service works and raises otherwise.

They speak the protocols themselves where a client library would cost seconds to import; every one of them is bounded
by ``timeout`` seconds.
"""

from __future__ import annotations

import hashlib
import hmac
import http.client
import socket
import struct
from datetime import UTC, datetime

from clinical_orchestration.stack.ports import LOOPBACK


class ProbeError(Exception):
    """The service does not answer as it should; the message says how."""


def redis(port: int, timeout: float) -> None:
    """PING; an answer while data is still being loaded is not yet ready."""
    with socket.create_connection((LOOPBACK, port), timeout) as connection:
        connection.settimeout(timeout)
        connection.sendall(b"*1\r\n$4\r\nPING\r\n")
        answer = connection.recv(128)
    if not answer.startswith(b"+PONG"):
        raise ProbeError(f"PING answered {answer[:60].decode(errors='replace').strip()!r}")


def postgres(port: int, user: str, password: str, database: str, timeout: float, query: str = "select 1") -> object:
    """Log in and run a query; return its first value, or ``None`` without rows."""
    import psycopg2

    connection = psycopg2.connect(
        host=LOOPBACK,
        port=port,
        user=user,
        password=password,
        dbname=database,
        connect_timeout=max(2, round(timeout)),
        application_name="clinical-stack",
        options=f"-c statement_timeout={int(timeout * 1000)}",
    )
    try:
        connection.autocommit = True
        with connection.cursor() as cursor:
            cursor.execute(query)
            row = cursor.fetchone()
            return row[0] if row else None
    finally:
        connection.close()


def http_ok(port: int, path: str, timeout: float) -> bytes:
    """GET; anything but 200 is a failure. Returns the first 64 KiB of the body."""
    connection = http.client.HTTPConnection(LOOPBACK, port, timeout=timeout)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        body = answer.read(1 << 16)
    finally:
        connection.close()
    if answer.status != 200:
        raise ProbeError(f"GET {path} answered {answer.status}: {body[:200].decode(errors='replace')}")
    return body


def s3_request(
    port: int, access_key: str, secret_key: str, method: str, path: str, timeout: float, query: str = ""
) -> tuple[int, bytes]:
    """Send one signed S3 request (AWS Signature Version 4, empty body); return status and body."""
    now = datetime.now(UTC)
    stamp, day = now.strftime("%Y%m%dT%H%M%SZ"), now.strftime("%Y%m%d")
    host = f"{LOOPBACK}:{port}"
    empty = hashlib.sha256(b"").hexdigest()
    signed = "host;x-amz-content-sha256;x-amz-date"
    canonical = "\n".join(
        [method, path, query, f"host:{host}", f"x-amz-content-sha256:{empty}", f"x-amz-date:{stamp}", "", signed, empty]
    )
    scope = f"{day}/us-east-1/s3/aws4_request"
    to_sign = "\n".join(["AWS4-HMAC-SHA256", stamp, scope, hashlib.sha256(canonical.encode()).hexdigest()])
    key = f"AWS4{secret_key}".encode()
    for part in (day, "us-east-1", "s3", "aws4_request"):
        key = hmac.new(key, part.encode(), hashlib.sha256).digest()
    signature = hmac.new(key, to_sign.encode(), hashlib.sha256).hexdigest()
    headers = {
        "x-amz-date": stamp,
        "x-amz-content-sha256": empty,
        "Authorization": f"AWS4-HMAC-SHA256 Credential={access_key}/{scope}, SignedHeaders={signed}, "
        f"Signature={signature}",
    }
    connection = http.client.HTTPConnection(LOOPBACK, port, timeout=timeout)
    try:
        connection.request(method, f"{path}?{query}" if query else path, headers=headers)
        answer = connection.getresponse()
        return answer.status, answer.read(1 << 16)
    finally:
        connection.close()


def s3_bucket(port: int, access_key: str, secret_key: str, bucket: str, timeout: float) -> None:
    """HEAD a bucket with the stack's own key."""
    status, _ = s3_request(port, access_key, secret_key, "HEAD", f"/{bucket}", timeout)
    if status != 200:
        raise ProbeError(f"HEAD bucket {bucket} answered {status}")


def kafka_topics(port: int, timeout: float) -> set[str]:
    """Ask for the cluster's metadata (version 1); return the topics that have a leader in each partition."""
    client = b"clinical-stack"
    # request header: API key 3 (metadata), version 1, correlation id 7, client id; body: null array = all topics
    message = struct.pack(">hhih", 3, 1, 7, len(client)) + client + struct.pack(">i", -1)
    with socket.create_connection((LOOPBACK, port), timeout) as connection:
        connection.settimeout(timeout)
        connection.sendall(struct.pack(">i", len(message)) + message)
        (size,) = struct.unpack(">i", _exactly(connection, 4))
        answer = _exactly(connection, size)
    reader = _KafkaReader(answer)
    if reader.int32() != 7:
        raise ProbeError("the answer to the metadata request is not Kafka's")
    brokers = reader.int32()
    for _ in range(brokers):
        reader.int32(), reader.string(), reader.int32(), reader.string()
    reader.int32()  # the controller
    if brokers < 1:
        raise ProbeError("no broker is registered yet")
    topics = set()
    for _ in range(reader.int32()):
        error, name = reader.int16(), reader.string()
        reader.int8()  # whether the topic is internal
        led = error == 0
        for _ in range(reader.int32()):
            partition_error = reader.int16()
            reader.int32()
            leader = reader.int32()
            for _ in range(2):  # replicas and those in sync
                for _ in range(reader.int32()):
                    reader.int32()
            led = led and partition_error == 0 and leader >= 0
        if led and name is not None:
            topics.add(name)
    return topics


def grpc_call(port: int, method: str, request: bytes, timeout: float) -> bytes:
    """Make one unary gRPC call with an encoded message; return the encoded answer."""
    import grpc

    options = [("grpc.enable_http_proxy", 0), ("grpc.use_local_subchannel_pool", 1)]
    with grpc.insecure_channel(f"{LOOPBACK}:{port}", options=options) as channel:
        call = channel.unary_unary(method, request_serializer=_same, response_deserializer=_same)
        try:
            answer: bytes = call(request, timeout=timeout, wait_for_ready=False)
        except grpc.RpcError as error:
            raise ProbeError(f"{method}: {error.code().name}: {str(error.details())[:200]}") from None
    return answer


def spark_connect(port: int, timeout: float) -> str:
    """Ask for the server's Spark version, in one fixed session, so that probing leaves no trail of sessions."""
    session = b"00000000-0000-4000-8000-00000000beef"
    # spark.connect.AnalyzePlanRequest: 1 session_id, 2 user_context {1 user_id}, 10 spark_version {}
    request = _field(1, session) + _field(2, _field(1, b"clinical-stack")) + _field(10, b"")
    answer = grpc_call(port, "/spark.connect.SparkConnectService/AnalyzePlan", request, timeout)
    marker = answer.find(b"4.")
    if marker < 0:
        raise ProbeError("the answer holds no Spark version")
    return answer[marker : marker + 6].decode(errors="replace")


def dagster_code_server(port: int, timeout: float) -> None:
    """Ping a Dagster code server (``api.DagsterApi/Ping``: field 1 is echoed)."""
    answer = grpc_call(port, "/api.DagsterApi/Ping", _field(1, b"stack"), timeout)
    if b"stack" not in answer:
        raise ProbeError("the ping was not echoed")


def _same(message: bytes) -> bytes:
    return message


def _field(number: int, value: bytes) -> bytes:
    """Encode one length-delimited protobuf field shorter than 128 bytes."""
    return bytes([number << 3 | 2, len(value)]) + value


def _exactly(connection: socket.socket, count: int) -> bytes:
    parts = bytearray()
    while len(parts) < count:
        block = connection.recv(count - len(parts))
        if not block:
            raise ProbeError("the connection was closed in the middle of an answer")
        parts += block
    return bytes(parts)


class _KafkaReader:
    """Reads the big-endian fields of a Kafka answer."""

    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0

    def _take(self, layout: str) -> int:
        (value,) = struct.unpack_from(layout, self._data, self._at)
        self._at += struct.calcsize(layout)
        return int(value)

    def int8(self) -> int:
        return self._take(">b")

    def int16(self) -> int:
        return self._take(">h")

    def int32(self) -> int:
        return self._take(">i")

    def string(self) -> str | None:
        length = self.int16()
        if length < 0:
            return None
        self._at += length
        return self._data[self._at - length : self._at].decode()
