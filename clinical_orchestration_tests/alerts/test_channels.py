"""Slack and e-mail, against servers on loopback."""

from __future__ import annotations

import json
import logging
import socket
from datetime import UTC, datetime, timedelta

import pytest
from pydantic import SecretStr

from clinical_orchestration.alerts.policy import Kind
from clinical_orchestration.alerts.templates import Message
from clinical_orchestration.platform.connection import Connection
from clinical_orchestration.settings import ClientSettings, Variables
from clinical_orchestration.stores.alert_channels import (
    ChannelError,
    EmailChannel,
    SlackChannel,
    SmtpSettings,
    parse_recipients,
    parse_smtp_url,
    smtp_of_connection,
)
from clinical_orchestration.stores.alerts import build_channels, smtp_settings
from clinical_orchestration_tests.alerts.stand_ins import mail_server, slack_server
from clinical_orchestration_tests.alerts.test_messages import ALERT, NOW, PAGE

MESSAGE = Message(Kind.OPENED, ALERT, NOW, NOW)


def test_slack_gets_the_blocks() -> None:
    with slack_server() as slack:
        SlackChannel(slack.url, PAGE).send(MESSAGE)
    (body,) = slack.bodies
    assert body["blocks"][0]["text"]["text"] == "Warning: Data drift [simulated]"
    assert "https://page.example:8085/dagster/assets/monitoring/data_drift" in json.dumps(body)


def test_a_short_retry_after_is_waited_for() -> None:
    waits: list[float] = []
    with slack_server() as slack:
        slack.answers = [(429, {"Retry-After": "2"}, "rate_limited")]
        SlackChannel(slack.url, PAGE, sleep=waits.append).send(MESSAGE)
        assert waits == [2.0]
        assert len(slack.bodies) == 1


def test_a_long_retry_after_is_handed_on() -> None:
    waits: list[float] = []
    with slack_server() as slack:
        slack.answers = [(429, {"Retry-After": "120"}, "rate_limited")]
        with pytest.raises(ChannelError) as caught:
            SlackChannel(slack.url, PAGE, sleep=waits.append).send(MESSAGE)
    assert caught.value.retry_after == timedelta(minutes=2)
    assert not caught.value.permanent
    assert waits == []


@pytest.mark.parametrize(("status", "permanent"), [(404, True), (400, True), (302, True), (500, False), (408, False)])
def test_what_slack_refuses_for_good_is_not_repeated(status: int, permanent: bool) -> None:
    with slack_server() as slack:
        slack.answers = [(status, {}, "no_team")]
        with pytest.raises(ChannelError, match=f"{status} no_team") as caught:
            SlackChannel(slack.url, PAGE).send(MESSAGE)
    assert caught.value.permanent is permanent


def test_the_webhook_address_is_in_no_log_and_no_error(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    with slack_server() as slack:
        channel = SlackChannel(slack.url, PAGE)
        channel.send(MESSAGE)
        slack.answers = [(500, {}, f"broken {slack.url}")]
        with pytest.raises(ChannelError) as refused:
            channel.send(MESSAGE)
    with pytest.raises(ChannelError) as away:  # the server is gone
        channel.send(MESSAGE)
    assert [record for record in caplog.records if record.name == "httpx"], "httpx logged nothing: the test is blind"
    assert "very-secret-part" not in caplog.text
    for error in (refused, away):
        assert "very-secret-part" not in str(error.value)
        assert error.value.__cause__ is None
        assert error.value.__context__ is None or error.value.__suppress_context__
    assert "very-secret-part" not in repr(channel)


def test_a_mail_server_gets_text_and_html_for_all_recipients() -> None:
    with mail_server("alerts@example.org", "p@ss/word") as mail:
        settings = parse_smtp_url(f"smtp://alerts%40example.org:p%40ss%2Fword@127.0.0.1:{mail.port}")
        EmailChannel(settings, ["a@example.org", "b@example.org"], PAGE).send(MESSAGE)
    (content,) = mail.messages
    assert mail.recipients == [["a@example.org", "b@example.org"]]
    assert content["Subject"] == "Warning: Data drift [simulated]"
    assert content["From"] == "alerts@example.org"
    assert [part.get_content_type() for part in content.iter_parts()] == ["text/plain", "text/html"]  # type: ignore[union-attr]
    for part in content.iter_parts():
        assert "largest PSI 0.41" in part.get_content()  # type: ignore[union-attr]


def test_a_refused_login_is_said_without_the_password() -> None:
    with mail_server("user", "right") as mail:
        channel = EmailChannel(parse_smtp_url(f"smtp://user:wrong-pw@127.0.0.1:{mail.port}"), ["a@example.org"], PAGE)
        with pytest.raises(ChannelError, match=r"login \(535\)") as caught:
            channel.send(MESSAGE)
    assert "wrong-pw" not in f"{caught.value} {channel!r} {parse_smtp_url('smtp://u:wrong-pw@h')!r}"


@pytest.mark.parametrize(("code", "permanent"), [(451, False), (554, True)])
def test_a_refused_mail_is_repeated_only_where_that_can_help(code: int, permanent: bool) -> None:
    with mail_server() as mail:
        mail.refuse = (code, "no")
        with pytest.raises(ChannelError, match=str(code)) as caught:
            EmailChannel(SmtpSettings("127.0.0.1", mail.port), ["a@example.org"], PAGE).send(MESSAGE)
    assert caught.value.permanent is permanent


def test_a_mail_server_that_hangs_is_left_after_the_timeout() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        settings = SmtpSettings("127.0.0.1", silent.getsockname()[1])
        with pytest.raises(ChannelError, match="does not answer"):
            EmailChannel(settings, ["a@example.org"], PAGE, timeout_seconds=0.2).send(MESSAGE)


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("smtp://mail", SmtpSettings("mail", 25, sender="clinical-orchestration@mail")),
        (
            "smtp://u:p@mail.example.org:2525?starttls=true&from=a@example.org",
            SmtpSettings("mail.example.org", 2525, "u", "p", starttls=True, sender="a@example.org"),
        ),
        ("smtps://mail?from=a@example.org", SmtpSettings("mail", 465, tls=True, sender="a@example.org")),
        ("smtp://mail?starttls=1&from=a@b", SmtpSettings("mail", 587, starttls=True, sender="a@b")),
    ],
)  # fmt: skip
def test_smtp_urls(url: str, expected: SmtpSettings) -> None:
    assert parse_smtp_url(url) == expected


@pytest.mark.parametrize("url", ["http://host", "smtp://", "smtp://u:hush-hush@host:port"])
def test_a_wrong_smtp_url_is_refused_without_repeating_it(url: str) -> None:
    with pytest.raises(ValueError, match="CLINICAL_SMTP_URL") as caught:
        parse_smtp_url(url)
    assert "hush-hush" not in str(caught.value)


def test_recipients() -> None:
    assert parse_recipients("a@b.org, c@d.org;a@b.org\n nobody") == ("a@b.org", "c@d.org")
    assert parse_recipients("") == ()


def test_without_configuration_there_is_no_channel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CLINICAL_SMTP_URL", raising=False)
    assert build_channels(ClientSettings(), Variables()) == []


def test_channels_come_from_variables_and_environment(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CLINICAL_SMTP_URL", "smtp://user:hush-hush@mail.example.org")
    variables = Variables(
        slack_webhook_url=SecretStr("https://hooks.slack.com/services/x"), alert_email_recipients="a@example.org"
    )
    assert [channel.name for channel in build_channels(ClientSettings(), variables)] == ["slack", "email"]
    monkeypatch.setenv("CLINICAL_SMTP_URL", "ftp://user:hush-hush@mail.example.org")
    assert [channel.name for channel in build_channels(ClientSettings(), variables)] == ["slack"]
    assert "e-mail is off" in caplog.text
    assert "hush-hush" not in caplog.text


def test_the_mail_server_may_come_from_a_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CLINICAL_SMTP_URL", raising=False)
    monkeypatch.setenv(
        "AIRFLOW_CONN_SMTP_DEFAULT",
        '{"conn_type": "smtp", "host": "mail", "port": 587, "login": "a@b.org", "password": "hush-hush"}',
    )
    assert smtp_settings() == SmtpSettings("mail", 587, "a@b.org", "hush-hush", starttls=True, sender="a@b.org")
    channels = build_channels(ClientSettings(), Variables(alert_email_recipients="a@example.org"))
    assert [channel.name for channel in channels] == ["email"]
    assert "hush-hush" not in repr(channels)


@pytest.mark.parametrize(
    ("connection", "expected"),
    [
        (Connection("c", "smtp", host="m"), (465, True, False)),
        (Connection("c", "smtp", host="m", port=465), (465, True, False)),
        (Connection("c", "smtp", host="m", extra='{"disable_ssl": true}'), (587, False, True)),
        (Connection("c", "smtp", host="m", extra='{"disable_ssl": true, "disable_tls": true}'), (25, False, False)),
        (Connection("c", "smtp", host="m", port=2525, extra='{"disable_tls": "true"}'), (2525, False, False)),
    ],
)
def test_tls_of_a_connection_as_airflows_provider_has_it(
    connection: Connection, expected: tuple[int, bool, bool]
) -> None:
    settings = smtp_of_connection(connection)
    assert (settings.port, settings.tls, settings.starttls) == expected


def test_a_retry_after_date_is_understood() -> None:
    moment = datetime.now(UTC) + timedelta(seconds=40)
    with slack_server() as slack:
        slack.answers = [(429, {"Retry-After": moment.strftime("%a, %d %b %Y %H:%M:%S GMT")}, "")]
        with pytest.raises(ChannelError) as caught:
            SlackChannel(slack.url, PAGE, sleep=lambda _: None).send(MESSAGE)
    assert caught.value.retry_after is not None
    assert timedelta(seconds=30) < caught.value.retry_after <= timedelta(seconds=41)
