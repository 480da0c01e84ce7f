"""What messages say, and what they never say."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clinical_orchestration.alerts.model import Alert, Severity
from clinical_orchestration.alerts.policy import Kind
from clinical_orchestration.alerts.redact import short_error, without_secrets
from clinical_orchestration.alerts.templates import Message, absolute_link, email, slack, subject

PAGE = "https://page.example:8085/"
NOW = datetime(2025, 3, 1, 12, 30, tzinfo=UTC)
ALERT = Alert(
    key="data_drift:simulated",
    severity=Severity.WARNING,
    title="Data drift",
    what="3 of 153 features drifted (bound 0), largest PSI 0.41 > 0.2.",
    where="/dagster/assets/monitoring/data_drift",
    action="Look at the report; retrain if the change is real.",
    source="monitoring/data_drift",
    trial="simulated",
    details={"features": 153, "largest PSI": 0.4123},
)
OPENED = Message(Kind.OPENED, ALERT, NOW, NOW)
RESOLVED = replace(OPENED, kind=Kind.RESOLVED, at=NOW + timedelta(hours=2), note="all features are stable", times=3)
SUMMARY = replace(OPENED, kind=Kind.SUMMARY, held=("Error: one", "Error: two <b>"))
PARTS = (
    ALERT.what, "warning: somebody should look this week", "https://page.example:8085/dagster/assets/monitoring/data_drift",
    ALERT.action, "simulated", "monitoring/data_drift", "2025-03-01 12:30:00 UTC", "0.4123",
)  # fmt: skip


def test_every_form_says_what_how_bad_where_what_to_do_trial_source_and_time() -> None:
    mail = email(OPENED, PAGE)
    block = json.dumps(slack(OPENED, PAGE), ensure_ascii=False)
    for part in PARTS:
        assert part in mail.text
        assert part in mail.html.replace("&gt;", ">")
        assert part in block.replace("&gt;", ">")


def test_a_resolved_message_says_that_it_is_over_and_why() -> None:
    assert subject(RESOLVED) == "Resolved: Data drift [simulated]"
    for text in (email(RESOLVED, PAGE).text, email(RESOLVED, PAGE).html, json.dumps(slack(RESOLVED, PAGE))):
        assert "all features are stable" in text
        assert "open since" in text.lower()


def test_a_summary_counts_and_names_what_was_held_back() -> None:
    assert subject(SUMMARY) == "2 more messages were held back"
    assert "two &lt;b&gt;" in email(SUMMARY, PAGE).html
    assert "Error: two <b>" in email(SUMMARY, PAGE).text
    assert "two &lt;b&gt;" in json.dumps(slack(SUMMARY, PAGE))


def test_values_cannot_become_markup() -> None:
    alert = replace(ALERT, what="<script>x</script> <!channel> & <https://evil|here>", title="<img src=x>")
    mail = email(replace(OPENED, alert=alert), PAGE)
    assert "<script>" not in mail.html
    assert "<img" not in mail.html
    body = slack(replace(OPENED, alert=alert), PAGE)
    sections = [block["text"]["text"] for block in body["blocks"] if block["type"] == "section" and "text" in block]
    assert not any("<!channel>" in text or "<https://evil" in text for text in sections)


def test_a_line_break_in_a_title_cannot_become_a_header() -> None:
    alert = replace(ALERT, title="bad\r\nBcc: all@example.org")
    assert "\n" not in subject(replace(OPENED, alert=alert))
    assert "\r" not in subject(replace(OPENED, alert=alert))


_texts = st.text(max_size=4000)


@given(_texts, _texts, _texts, _texts, st.dictionaries(st.text(max_size=50), st.text(max_size=3000), max_size=15))
def test_slack_limits_hold_for_any_text(
    title: str, what: str, where: str, action: str, details: dict[str, str]
) -> None:
    alert = replace(ALERT, title=title, what=what, where="/" + where, action=action, details=details)
    for kind in (Kind.OPENED, Kind.RESOLVED):
        body = slack(replace(OPENED, alert=alert, kind=kind), PAGE)
        for block in body["blocks"]:
            if block["type"] == "header":
                assert 1 <= len(block["text"]["text"]) <= 150
            elif "fields" in block:
                assert len(block["fields"]) <= 10
                assert all(1 <= len(field["text"]) <= 2000 for field in block["fields"])
            elif "text" in block:
                assert 1 <= len(block["text"]["text"]) <= 3000
        email(replace(OPENED, alert=alert, kind=kind), PAGE)


@pytest.mark.parametrize(
    ("where", "link"),
    [
        ("/dagster/runs/1", "https://page.example:8085/dagster/runs/1"),
        ("http://mlflow:5000/x", "http://mlflow:5000/x"),
        ("s3://bucket/report.html", None),
        ("javascript:alert(1)", None),
    ],
)
def test_links(where: str, link: str | None) -> None:
    assert absolute_link(where, PAGE) == link


@pytest.mark.parametrize(
    ("text", "secret"),
    [
        ("could not connect to postgresql://dagster:s3cr3t-pw@db:5432/x", "s3cr3t-pw"),
        ("POST https://hooks.slack.com/services/T00/B00/XXXXXXXX failed", "XXXXXXXX"),
        ("password=hunter22 rejected", "hunter22"),
        ("{'secret_key': 'abcdef123'}", "abcdef123"),
        ("AWS_SECRET_ACCESS_KEY: wJalrXUtnFEMI", "wJalrXUtnFEMI"),
        ("Authorization: Bearer eyJhbGciOi.abc.def", "eyJhbGciOi"),
        ("InvalidAccessKeyId AKIAIOSFODNN7EXAMPLE", "AKIAIOSFODNN7EXAMPLE"),
    ],
)
def test_what_looks_like_a_secret_is_hidden(text: str, secret: str) -> None:
    assert secret not in without_secrets(text)


def test_known_secrets_are_hidden_wherever_they_stand() -> None:
    assert without_secrets("the value zyx-987 leaked", ["zyx-987"]) == "the value *** leaked"


def test_an_ordinary_error_is_left_as_it_is() -> None:
    text = "the source folder /data/landing does not exist; give --source a folder"
    assert without_secrets(text) == text


def test_a_short_error_is_its_first_line() -> None:
    assert (
        short_error("\n\n  ValueError: 3 rows are not enough\nTraceback ...\n") == "ValueError: 3 rows are not enough"
    )
    assert len(short_error("x" * 1000)) == 300
    assert re.fullmatch(r"x+…", short_error("x" * 1000))
