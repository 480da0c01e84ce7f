"""The ways by which a message reaches people: a Slack incoming webhook and SMTP.

Addresses of webhooks and passwords are secrets: they are in no log line, no error and no `repr`.
"""

from __future__ import annotations

import email.utils
import logging
import smtplib
import ssl
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from email.message import EmailMessage
from typing import Protocol
from urllib.parse import parse_qs, unquote, urlsplit

from clinical_orchestration.alerts import templates
from clinical_orchestration.alerts.redact import short_error
from clinical_orchestration.alerts.templates import Message
from clinical_orchestration.platform.connection import Connection

TIMEOUT_SECONDS = 5.0
_LONGEST_WAIT_SECONDS = 3.0  # a step that alerts waits this long for a busy channel; beyond it the message waits alone


class ChannelError(RuntimeError):
    """A channel did not take a message. The text names no secret.

    Attributes:
        retry_after: when the channel wants to be asked again; None where it did not say.
        permanent: whether asking again with the same message cannot help.
    """

    def __init__(self, reason: str, *, retry_after: timedelta | None = None, permanent: bool = False) -> None:
        super().__init__(reason)
        self.retry_after = retry_after
        self.permanent = permanent


class Channel(Protocol):
    """One way to people."""

    @property
    def name(self) -> str:
        """The name under which the channel's messages are counted and its failures shown."""

    def send(self, message: Message) -> None:
        """Deliver a message, within seconds.

        Raises:
            ChannelError: the channel did not take it.
        """


class _HideAddresses(logging.Filter):
    """Replaces webhook addresses in what httpx logs about its requests."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        if isinstance(record.args, tuple):
            record.args = tuple(
                "<webhook>" if any(address in str(argument) for address in self.addresses) else argument
                for argument in record.args
            )
        return True


_HIDE = _HideAddresses()


class SlackChannel:
    """A Slack incoming webhook.

    Args:
        webhook_url: the address that Slack gave; whoever knows it can post.
        page_url: address of the page, for links.
        timeout_seconds: longest wait for connection and for answer.
        sleep: waits when Slack asks for a short pause.
    """

    name = "slack"

    def __init__(
        self,
        webhook_url: str,
        page_url: str,
        *,
        timeout_seconds: float = TIMEOUT_SECONDS,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._webhook_url = webhook_url
        self._page_url = page_url
        self._timeout = timeout_seconds
        self._sleep = sleep

    def __repr__(self) -> str:
        return "SlackChannel(***)"

    def send(self, message: Message) -> None:
        """Post the message; waits once for a short ``Retry-After``.

        Raises:
            ChannelError: Slack did not take it.
        """
        body = templates.slack(message, self._page_url)
        try:
            self._post(body)
        except ChannelError as error:
            if error.retry_after is None or error.retry_after.total_seconds() > _LONGEST_WAIT_SECONDS:
                raise
            self._sleep(error.retry_after.total_seconds())
            self._post(body)

    def _post(self, body: dict[str, object]) -> None:
        import httpx

        _HIDE.addresses.add(self._webhook_url)
        logger = logging.getLogger("httpx")
        if _HIDE not in logger.filters:
            logger.addFilter(_HIDE)
        try:
            with httpx.Client(timeout=self._timeout, follow_redirects=False) as client:
                answer = client.post(self._webhook_url, json=body)
        except (httpx.HTTPError, httpx.InvalidURL, OSError, ValueError) as error:
            # no cause: httpx errors carry the request, and with it the address
            raise ChannelError(f"Slack does not answer: {type(error).__name__}") from None
        if answer.status_code == 200:
            return
        if answer.status_code == 429:
            raise ChannelError("Slack asks to wait (429)", retry_after=_retry_after(answer.headers.get("retry-after")))
        said = short_error(answer.text[:2000], [self._webhook_url], limit=80)
        permanent = 300 <= answer.status_code < 500 and answer.status_code != 408
        raise ChannelError(f"Slack refused the message: {answer.status_code} {said}".rstrip(), permanent=permanent)


def _retry_after(value: str | None) -> timedelta:
    """Return the pause that a ``Retry-After`` header asks for: seconds or a date; half a minute where it is unclear."""
    if value is not None and value.strip().isdigit():
        return timedelta(seconds=min(int(value), 3600))
    try:
        moment = email.utils.parsedate_to_datetime(value or "")
    except ValueError:
        return timedelta(seconds=30)
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    return min(max(moment - datetime.now(UTC), timedelta()), timedelta(hours=1))


@dataclass(frozen=True)
class SmtpSettings:
    """Where mail is handed in.

    Attributes:
        host: name or address of the server.
        port: 465 for TLS from the start, 587 for STARTTLS, 25 for neither.
        user: login, or None for none.
        password: of the login.
        starttls: turn the connection into TLS before the login.
        tls: TLS from the start (``smtps://``).
        sender: address in ``From``.
    """

    host: str
    port: int
    user: str | None = None
    password: str | None = field(default=None, repr=False)
    starttls: bool = False
    tls: bool = False
    sender: str = "clinical-orchestration@localhost"


def parse_smtp_url(url: str) -> SmtpSettings:
    """Read ``smtp://user:password@host:587?starttls=true&from=alerts@example.org`` (or ``smtps://``).

    User and password are percent-encoded. Without ``from`` the sender is the user where that is an address.

    Raises:
        ValueError: it is no such URL; the message does not repeat it, because it may hold a password.
    """
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        raise ValueError("CLINICAL_SMTP_URL has no valid port") from None
    if parts.scheme not in ("smtp", "smtps") or not parts.hostname:
        raise ValueError("CLINICAL_SMTP_URL must look like smtp://user:password@host:587?starttls=true")
    options = {name: values[-1] for name, values in parse_qs(parts.query).items()}
    starttls = options.get("starttls", "false").lower() in ("true", "1", "yes")
    user = unquote(parts.username) if parts.username else None
    sender = options.get("from") or (user if user and "@" in user else f"clinical-orchestration@{parts.hostname}")
    default_port = 465 if parts.scheme == "smtps" else 587 if starttls else 25
    return SmtpSettings(
        host=parts.hostname,
        port=port or default_port,
        user=user,
        password=unquote(parts.password) if parts.password else None,
        starttls=starttls,
        tls=parts.scheme == "smtps",
        sender=sender,
    )


def smtp_of_connection(connection: Connection) -> SmtpSettings:
    """Read an Airflow connection of type ``smtp``: host, port, login, password and extra as its SMTP provider has them.

    ``disable_ssl`` (default: true unless the port is 465 or none), ``disable_tls`` (default: false) and ``from_email``.

    Raises:
        ValueError: it has no host.
    """
    if not connection.host:
        raise ValueError(f"the connection {connection.conn_id} has no host")
    extra = connection.extra_dejson
    plain = _flag(extra.get("disable_ssl"), connection.port not in (None, 465))
    starttls = plain and not _flag(extra.get("disable_tls"), False)
    user = connection.login or None
    sender = str(extra.get("from_email") or "") or (
        user if user and "@" in user else f"clinical-orchestration@{connection.host}"
    )
    return SmtpSettings(
        host=connection.host,
        port=connection.port or (465 if not plain else 587 if starttls else 25),
        user=user,
        password=connection.password,
        starttls=starttls,
        tls=not plain,
        sender=sender,
    )


def _flag(value: object, default: bool) -> bool:
    return default if value is None else str(value).lower() in ("true", "1", "yes")


def parse_recipients(text: str) -> tuple[str, ...]:
    """Return the addresses of a list separated by commas, semicolons or white space."""
    words = text.replace(",", " ").replace(";", " ").split()
    return tuple(dict.fromkeys(word for word in words if "@" in word))


class EmailChannel:
    """E-mail by SMTP, as text with an HTML alternative.

    Args:
        settings: the server.
        recipients: addresses; all get the same message.
        page_url: address of the page, for links.
        timeout_seconds: longest wait for each answer of the server.
    """

    name = "email"

    def __init__(
        self,
        settings: SmtpSettings,
        recipients: Sequence[str],
        page_url: str,
        *,
        timeout_seconds: float = TIMEOUT_SECONDS,
    ) -> None:
        self._settings = settings
        self._recipients = tuple(recipients)
        self._page_url = page_url
        self._timeout = timeout_seconds

    def __repr__(self) -> str:
        return f"EmailChannel({self._settings.host}:{self._settings.port}, {len(self._recipients)} recipients)"

    def send(self, message: Message) -> None:
        """Hand the message in.

        Raises:
            ChannelError: the server did not take it for any recipient.
        """
        content = self._content(message)
        settings = self._settings
        try:
            with self._connected() as server:
                if settings.starttls:
                    server.starttls(context=ssl.create_default_context())
                if settings.user is not None:
                    server.login(settings.user, settings.password or "")
                server.send_message(content, settings.sender, list(self._recipients))
        except smtplib.SMTPAuthenticationError as error:
            raise ChannelError(f"the mail server refused the login ({error.smtp_code})") from None
        except smtplib.SMTPResponseException as error:
            raise ChannelError(
                f"the mail server refused the message ({error.smtp_code})", permanent=error.smtp_code >= 550
            ) from None
        except smtplib.SMTPRecipientsRefused:
            raise ChannelError("the mail server refused every recipient", permanent=True) from None
        except (smtplib.SMTPException, OSError, ValueError) as error:
            raise ChannelError(f"the mail server does not answer: {type(error).__name__}") from None

    def _connected(self) -> smtplib.SMTP:
        settings = self._settings
        if settings.tls:
            return smtplib.SMTP_SSL(
                settings.host, settings.port, timeout=self._timeout, context=ssl.create_default_context()
            )
        return smtplib.SMTP(settings.host, settings.port, timeout=self._timeout)

    def _content(self, message: Message) -> EmailMessage:
        rendered = templates.email(message, self._page_url)
        content = EmailMessage()
        content["Subject"] = rendered.subject
        content["From"] = self._settings.sender
        content["To"] = ", ".join(self._recipients)
        content["Date"] = email.utils.format_datetime(message.at)
        content["Message-ID"] = email.utils.make_msgid(domain=self._settings.sender.rpartition("@")[2] or "localhost")
        content["Auto-Submitted"] = "auto-generated"
        content.set_content(rendered.text)
        content.add_alternative(rendered.html, subtype="html")
        return content
