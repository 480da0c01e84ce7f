"""IBM MQ through its messaging REST API, version 3 (IBM MQ 9.3 and later): list, browse, get and put text messages.

The API has no syncpoint: a destructive get is final when the server has done it, even where its answer is lost. So a
mover browses, stores the message elsewhere, and only then gets it by its id; :class:`MessageQueue` has these steps.

A message id is 48 hexadecimal digits here; the ``ID:`` that version 3 puts before it is added and removed on the way.
The server cannot give messages that are no text (MQMD format other than MQSTR, no JMS TextMessage): these stay on the
queue and are :class:`UnreadableMessageError`.

No error repeats a body, a header or a credential: it names the operation, the queue, the HTTP status, MQ's reason code
and the REST API's message id.
"""

from __future__ import annotations

import re
import ssl
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol
from urllib.parse import quote, urlsplit

from pydantic import Field, SecretStr, field_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from clinical_orchestration.settings import ConnectionSource

if TYPE_CHECKING:
    import httpx

MESSAGE_ID = re.compile(r"[0-9a-f]{48}")

REASONS: dict[int, str] = {
    2009: "MQRC_CONNECTION_BROKEN",
    2016: "MQRC_GET_INHIBITED",
    2030: "MQRC_MSG_TOO_BIG_FOR_Q",
    2031: "MQRC_MSG_TOO_BIG_FOR_Q_MGR",
    2033: "MQRC_NO_MSG_AVAILABLE",
    2035: "MQRC_NOT_AUTHORIZED",
    2051: "MQRC_PUT_INHIBITED",
    2053: "MQRC_Q_FULL",
    2059: "MQRC_Q_MGR_NOT_AVAILABLE",
    2085: "MQRC_UNKNOWN_OBJECT_NAME",
    2110: "MQRC_FORMAT_ERROR",
    2161: "MQRC_Q_MGR_QUIESCING",
    2162: "MQRC_Q_MGR_STOPPING",
    2192: "MQRC_STORAGE_MEDIUM_FULL",
    2195: "MQRC_UNEXPECTED_ERROR",
}
"""Reason codes that a mover meets, by their names in the product's documentation."""

LOOPBACK = ("127.0.0.1", "localhost", "::1")


class MqError(RuntimeError):
    """The queue manager's web server refused an operation.

    Attributes:
        status: HTTP status; None where there was no answer.
        reason_code: MQ's reason code (MQRC), where the answer has one.
    """

    def __init__(self, message: str, status: int | None = None, reason_code: int | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.reason_code = reason_code


class MqUnavailableError(MqError):
    """No answer, or a queue manager that does not run: it may be asked again. What was asked may have been done."""


class MqRefusedError(MqError):
    """Credentials or authorities are not enough, or the request is wrong: asking again does not help."""


class UnreadableMessageError(MqError):
    """The message is no text: the REST API can neither give nor remove it."""


class Listed(NamedTuple):
    """One message of a queue as listed, without its body."""

    message_id: str
    format: str = "MQSTR"


class MqMessage(NamedTuple):
    """One message with its body. `persistence` is ``persistent`` or ``nonPersistent``."""

    message_id: str
    body: str
    correlation_id: str | None = None
    persistence: str | None = None
    properties: str | None = None


class MessageQueue(Protocol):
    """The queues of one queue manager."""

    def listing(self, queue: str, *, limit: int, correlation_id: str | None = None) -> Sequence[Listed]:
        """Return the first messages of a queue, in the order in which they would be got. Nothing is removed."""

    def browse(self, queue: str, message_id: str) -> MqMessage | None:
        """Return a message and leave it on the queue; None where it is not there.

        Raises:
            UnreadableMessageError: it is no text.
        """

    def remove(self, queue: str, message_id: str) -> bool:
        """Get a message destructively; return whether it was there."""

    def put(
        self, queue: str, body: str, *, correlation_id: str | None = None, properties: Mapping[str, str] | None = None
    ) -> str:
        """Put a persistent text message and return its id. After an error it may have been put all the same."""

    def close(self) -> None:
        """Release connections."""


class MqSettings(BaseSettings):
    """Where the queues are and how to get in; from ``CLINICAL_MQ_*``."""

    model_config = SettingsConfigDict(env_prefix="CLINICAL_MQ_", extra="ignore", hide_input_in_errors=True)

    url: str = Field("", description="Address of the MQ web server, such as https://mq.example:9443; empty: off.")
    queue_manager: str = "QM1"
    queue: str = Field("LAB.RESULTS", description="Queue that results arrive on.")
    backout_queue: str = Field("LAB.RESULTS.BACKOUT", description="Queue for messages that cannot be read.")
    user: str = ""
    password: SecretStr = SecretStr("")
    password_file: Path | None = Field(None, description="File with the password, in place of CLINICAL_MQ_PASSWORD.")
    auth: Literal["basic", "ltpa"] = Field("basic", description="ltpa: log in once and send the token.")
    ca_file: Path | None = Field(None, description="CA certificates (PEM) of the web server; default: the system's.")
    allow_http: bool = Field(False, description="Send credentials without TLS to a host that is not this one.")
    trial: str = Field("", description="Trial of the messages; default: the deployment's.")
    time_zone: str = Field("UTC", description="Zone of HL7 times without an offset.")
    identifier_types: str = Field("", description="Comma-separated CX.5 codes of the PID-3 that is the patient.")
    batch: int = Field(50, ge=1, le=1000, description="Messages moved in one Kafka transaction at most.")
    backout_threshold: int = Field(3, ge=1, description="Tries after which a message that cannot be read is set aside.")
    poll_seconds: float = Field(1.0, gt=0, description="Pause while the queue is empty.")
    timeout_seconds: float = Field(10.0, gt=0, description="Of one request.")
    progress_topic: str = Field("mq-bridge-progress", description="Compacted Kafka topic of moved message ids.")
    remember_seconds: float = Field(3600.0, ge=0, description="How long the id of a removed message is remembered.")

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Put the connection ``lab_processor`` behind the environment, or before it where it is asked for."""
        return (
            init_settings,
            ConnectionSource(settings_cls, first=True),
            env_settings,
            ConnectionSource(settings_cls, first=False),
        )

    @field_validator("url")
    @classmethod
    def _plain_url(cls, value: str) -> str:
        address = urlsplit(value.strip())
        if value.strip() and (address.scheme not in ("http", "https") or not address.hostname):
            raise ValueError("CLINICAL_MQ_URL must be http(s)://host:port")
        if address.username or address.password:
            raise ValueError("CLINICAL_MQ_URL must not hold credentials: use CLINICAL_MQ_USER and _PASSWORD")
        return value.strip().rstrip("/")

    @property
    def configured(self) -> bool:
        """Whether there is a queue manager to talk to."""
        return bool(self.url)

    def secret(self) -> str:
        """Return the password.

        Raises:
            OSError: the password file cannot be read.
        """
        if self.password_file is not None:
            return self.password_file.read_text().strip()
        return self.password.get_secret_value()


class RestMessageQueue:
    """:class:`MessageQueue` through the messaging REST API.

    Safe to share between threads. Nothing is asked before the first operation.

    Args:
        settings: address, credentials, TLS.
        transport: takes the place of the network; for tests.

    Raises:
        ValueError: credentials would travel without TLS to another host.
    """

    def __init__(self, settings: MqSettings, *, transport: httpx.BaseTransport | None = None) -> None:
        import httpx

        address = urlsplit(settings.url)
        if address.scheme == "http" and address.hostname not in LOOPBACK and settings.user and not settings.allow_http:
            raise ValueError(
                "CLINICAL_MQ_URL is http, which would show the credentials to the network: use https, or set "
                "CLINICAL_MQ_ALLOW_HTTP=true"
            )
        self._settings = settings
        # a period ends a path segment for some proxies: MQ wants it encoded in the name of a queue manager
        self._root = f"/ibmmq/rest/v3/messaging/qmgr/{quote(settings.queue_manager, safe='').replace('.', '%2E')}"
        self._where = f"{settings.queue_manager} at {address.hostname}:{address.port or 443}"
        verify: ssl.SSLContext | bool = True
        if settings.ca_file is not None:
            verify = ssl.create_default_context(cafile=str(settings.ca_file))
        basic = settings.auth == "basic" and settings.user
        self._client = httpx.Client(
            base_url=settings.url,
            auth=(settings.user, settings.secret()) if basic else None,
            headers={"ibm-mq-rest-csrf-token": "clinical", "Accept-Language": "en"},
            timeout=settings.timeout_seconds,
            verify=verify,
            transport=transport,
            trust_env=False,
        )

    def listing(self, queue: str, *, limit: int, correlation_id: str | None = None) -> list[Listed]:
        """See :class:`MessageQueue`."""
        parameters: dict[str, str | int] = {"limit": limit}
        if correlation_id is not None:
            parameters["correlationId"] = f"ID:{correlation_id}"
        answer = self._ask("GET", queue, "messagelist", "listing", params=parameters)
        if answer.status_code == 204:
            return []
        try:
            found = answer.json()["messages"]
            listed = [Listed(_plain(str(item["messageId"])), str(item.get("format", "")).strip()) for item in found]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise MqUnavailableError(
                f"listing queue {queue} of {self._where}: the answer is no message list", answer.status_code
            ) from error
        return listed

    def browse(self, queue: str, message_id: str) -> MqMessage | None:
        """See :class:`MessageQueue`."""
        answer = self._ask("GET", queue, "message", "browsing", params={"messageId": f"ID:{message_id}"})
        if answer.status_code == 204:
            return None
        headers = answer.headers
        correlation = headers.get("ibm-mq-md-correlationId")
        found = _plain(headers.get("ibm-mq-md-messageId", message_id))
        if found != message_id:
            raise MqUnavailableError(f"browsing queue {queue} of {self._where}: another message than asked for came")
        return MqMessage(
            found,
            answer.text,
            _plain(correlation) if correlation else None,
            headers.get("ibm-mq-md-persistence"),
            headers.get("ibm-mq-usr"),
        )

    def remove(self, queue: str, message_id: str) -> bool:
        """See :class:`MessageQueue`."""
        answer = self._ask("DELETE", queue, "message", "removing from", params={"messageId": f"ID:{message_id}"})
        return answer.status_code == 200

    def put(
        self, queue: str, body: str, *, correlation_id: str | None = None, properties: Mapping[str, str] | None = None
    ) -> str:
        """See :class:`MessageQueue`."""
        headers = {"Content-Type": "text/plain; charset=utf-8", "ibm-mq-md-persistence": "persistent"}
        if correlation_id is not None:
            headers["ibm-mq-md-correlationId"] = f"ID:{correlation_id}"
        if properties:
            headers["ibm-mq-usr"] = ", ".join(f'{name};"{_quoted(text)}";string' for name, text in properties.items())
        answer = self._ask("POST", queue, "message", "putting to", content=body.encode("utf-8"), headers=headers)
        return _plain(answer.headers.get("ibm-mq-md-messageId", ""))

    def close(self) -> None:
        """See :class:`MessageQueue`."""
        self._client.close()

    def _ask(self, method: str, queue: str, what: str, doing: str, **request: Any) -> httpx.Response:
        """Send a request; of several addresses, log in where the token has run out. Return an answer below 300."""
        import httpx

        path = f"{self._root}/queue/{quote(queue, safe='.')}/{what}"
        try:
            answer = self._client.request(method, path, **request)
            if answer.status_code == 401 and self._settings.auth == "ltpa":
                self._log_in()
                answer = self._client.request(method, path, **request)
        except httpx.HTTPError as error:  # its text may hold what was sent
            raise MqUnavailableError(
                f"{doing} queue {queue} of {self._where}: no answer ({type(error).__name__}); look whether the MQ web "
                "server (mqweb) runs and CLINICAL_MQ_URL is right"
            ) from None
        if answer.status_code < 300:
            return answer
        raise self._error(answer, f"{doing} queue {queue} of {self._where}")

    def _log_in(self) -> None:
        answer = self._client.post(
            "/ibmmq/rest/v3/login", json={"username": self._settings.user, "password": self._settings.secret()}
        )
        if answer.status_code >= 300:
            raise self._error(answer, f"logging in to {self._where}")

    def _error(self, answer: httpx.Response, doing: str) -> MqError:
        status = answer.status_code
        reason, message_id = _reason(answer)
        code = f"{reason} {REASONS.get(reason, '')}".strip() if reason else ""
        said = ", ".join(filter(None, [f"HTTP {status}", code, message_id]))
        if status in (401, 403) or reason == 2035:
            cure = "look at CLINICAL_MQ_USER, its password, its role MQWebUser and its authority for the queue"
            return MqRefusedError(f"{doing}: not allowed ({said}); {cure}", status, reason)
        if status == 404:
            cure = "look at CLINICAL_MQ_QUEUE_MANAGER, CLINICAL_MQ_QUEUE and CLINICAL_MQ_BACKOUT_QUEUE"
            return MqRefusedError(f"{doing}: there is no such queue or queue manager ({said}); {cure}", status, reason)
        if status == 405:
            return MqUnavailableError(f"{doing}: the queue is inhibited ({said}); allow get and put", status, reason)
        if status == 501 or reason == 2110:
            cure = "the REST API gives text only: have the sender use the format MQSTR"
            return UnreadableMessageError(f"{doing}: the message is no text ({said}); {cure}", status, reason)
        if status in (400, 406, 413, 415) or reason in (2030, 2031):
            return MqRefusedError(f"{doing}: the request was refused ({said})", status, reason)
        return MqUnavailableError(
            f"{doing}: the queue manager cannot do it now ({said}); look whether it runs and has room", status, reason
        )


def _plain(identifier: str) -> str:
    """Return an id of the REST API as 48 lower-case hexadecimal digits; an application's own text stays as it is."""
    text = identifier.strip()
    bare = text[3:] if text[:3].upper() == "ID:" else text
    return bare.lower() if MESSAGE_ID.fullmatch(bare.lower()) else text


def _quoted(text: str) -> str:
    """Return a text as it may stand in a header: printable ASCII without quotes, of bounded length."""
    return re.sub(r'[^ -~]|["\\;,]', " ", text)[:900]


def _reason(answer: httpx.Response) -> tuple[int | None, str]:
    """Return MQ's reason code and the REST API's message id from an error's body, where it has them."""
    try:
        first = answer.json()["error"][0]
        reason = first.get("reasonCode")
        identifier = str(first.get("msgId") or first.get("messageId") or "")
    except (ValueError, KeyError, IndexError, TypeError, AttributeError):
        return None, ""
    return (
        int(reason) if isinstance(reason, int) or str(reason).isdigit() else None,
        identifier if re.fullmatch(r"MQWB[0-9]{4}[IWEST]", identifier) else "",
    )
