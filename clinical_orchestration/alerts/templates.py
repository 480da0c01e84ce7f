"""What a message says, as Slack Block Kit and as text and HTML for e-mail.

Every message has the same parts: what happened, how bad it is, where to look, what to do, trial, source and time.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from functools import cache
from typing import TYPE_CHECKING, Any

from clinical_orchestration.alerts.model import Alert, Severity
from clinical_orchestration.alerts.policy import Kind

if TYPE_CHECKING:
    import jinja2

HOW_BAD = {
    Severity.INFO: "information: nobody has to do anything",
    Severity.WARNING: "warning: somebody should look this week",
    Severity.ERROR: "error: somebody should look today",
    Severity.CRITICAL: "critical: somebody should look now",
}
_SIGNS = {
    Severity.INFO: ":information_source:",
    Severity.WARNING: ":warning:",
    Severity.ERROR: ":x:",
    Severity.CRITICAL: ":rotating_light:",
}
_COLOURS = {
    Severity.INFO: "#0b57c2", Severity.WARNING: "#8a4b00", Severity.ERROR: "#b0181c", Severity.CRITICAL: "#7a0012",
}  # fmt: skip
_RESOLVED_COLOUR = "#0b6b36"

# limits of Slack's Block Kit, in characters
_HEADER, _TEXT, _FIELD, _URL = 150, 3000, 2000, 1900
_DETAILS_SHOWN = 10
_HELD_SHOWN = 15


@dataclass(frozen=True)
class Message:
    """One message of one channel.

    Attributes:
        kind: why it goes out.
        alert: what it is about; for a summary the first of the alerts that were held back.
        at: when it was decided (UTC).
        opened_at: when the alert was opened (UTC).
        times: how often the alert was raised since then.
        note: what whoever resolved the alert said.
        held: titles of the messages that a summary stands for.
    """

    kind: Kind
    alert: Alert
    at: datetime
    opened_at: datetime
    times: int = 1
    note: str = ""
    held: tuple[str, ...] = ()


def absolute_link(where: str, page_url: str) -> str | None:
    """Return the address to open for an alert's `where`; None where there is nothing that a browser opens."""
    if where.startswith("/"):
        return page_url.rstrip("/") + where
    return where if where.startswith(("http://", "https://")) else None


def subject(message: Message) -> str:
    """Return one line that says what the message is about."""
    alert = message.alert
    if message.kind is Kind.SUMMARY:
        number = len(message.held)
        text = f"{number} more {'message was' if number == 1 else 'messages were'} held back"
    elif message.kind is Kind.RESOLVED:
        text = f"Resolved: {alert.title}"
    else:
        word = {Kind.ESCALATED: " (worse than before)", Kind.REMINDER: " (still open)"}.get(message.kind, "")
        text = f"{alert.severity.capitalize()}: {alert.title}{word}"
    return _one_line(text if alert.trial is None or message.kind is Kind.SUMMARY else f"{text} [{alert.trial}]")


def slack(message: Message, page_url: str) -> dict[str, Any]:
    """Return the JSON body of a Slack incoming webhook."""
    alert = message.alert
    link = absolute_link(alert.where, page_url)
    head = _cut(subject(message), _HEADER)
    blocks: list[dict[str, Any]] = [{"type": "header", "text": {"type": "plain_text", "text": head, "emoji": True}}]
    if message.kind is Kind.SUMMARY:
        shown = "\n".join(f"• {escape_slack(title)}" for title in message.held[:_HELD_SHOWN])
        more = len(message.held) - _HELD_SHOWN
        blocks.append(_section(shown + (f"\n… and {more} more" if more > 0 else "")))
        blocks.append(_section(f"<{page_url.rstrip('/')}/|The page> shows all of them."))
        return {"text": head, "blocks": blocks}
    sign = ":white_check_mark:" if message.kind is Kind.RESOLVED else _SIGNS[alert.severity]
    if message.kind is Kind.RESOLVED:
        said = message.note or "the condition no longer holds"
        blocks.append(_section(f"{sign} *It is over:* {escape_slack(said)}\n*It was:* {escape_slack(alert.what)}"))
    else:
        blocks.append(_section(f"{sign} *What happened*\n{escape_slack(alert.what)}"))
        blocks.append(_section(f"*What to do*\n{escape_slack(alert.action)}"))
    place = f"<{_url(link)}|open it>" if link else escape_slack(alert.where)
    fields = [("How bad", HOW_BAD[alert.severity]), ("Trial", alert.trial or "all"), ("Source", alert.source)]
    fields += [(str(name), str(value)) for name, value in _details(alert)]
    rendered = [f"*{escape_slack(name)}*\n{escape_slack(value) or '-'}" for name, value in fields]
    rendered.insert(0, f"*Where to look*\n{place or '-'}")
    blocks.append(
        {"type": "section", "fields": [{"type": "mrkdwn", "text": _cut(text, _FIELD)} for text in rendered[:10]]}
    )
    since = f", open since {message.opened_at:%Y-%m-%d %H:%M} UTC" if message.opened_at != message.at else ""
    raised = f", raised {message.times} times" if message.times > 1 else ""
    blocks.append(
        {
            "type": "context",
            "elements": [{"type": "mrkdwn", "text": f"{message.at:%Y-%m-%d %H:%M:%S} UTC{since}{raised}"}],
        }
    )
    return {"text": head, "blocks": blocks}


def escape_slack(text: str) -> str:
    """Return `text` so that Slack shows it as it is: no link, no mention of a channel or a person."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


@dataclass(frozen=True)
class Email:
    """Subject and both bodies of an e-mail."""

    subject: str
    text: str
    html: str


def email(message: Message, page_url: str) -> Email:
    """Return the e-mail of a message; all values are escaped in its HTML."""
    alert = message.alert
    values: dict[str, Any] = {
        "message": message,
        "alert": alert,
        "subject": subject(message),
        "how_bad": HOW_BAD[alert.severity],
        "link": absolute_link(alert.where, page_url),
        "page": f"{page_url.rstrip('/')}/",
        "facts": [
            ("Trial", alert.trial or "all"),
            ("Source", alert.source),
            ("Time", f"{message.at:%Y-%m-%d %H:%M:%S} UTC"),
            ("Open since", f"{message.opened_at:%Y-%m-%d %H:%M:%S} UTC, raised {message.times} time(s)"),
            *_details(alert),
        ],
        "resolved": message.kind is Kind.RESOLVED,
        "summary": message.kind is Kind.SUMMARY,
        "colour": _RESOLVED_COLOUR if message.kind is Kind.RESOLVED else _COLOURS[alert.severity],
    }
    environment = _environment()
    return Email(
        values["subject"],
        environment.get_template("email.txt").render(values).strip() + "\n",
        environment.get_template("email.html").render(values).strip() + "\n",
    )


_TEMPLATES = {
    "email.txt": """\
{{ subject }}

{% if summary -%}
More messages were decided than the channel carries in an hour. Held back were:

{% for title in message.held %}- {{ title }}
{% endfor %}
All of them: {{ page }}
{% else -%}
{% if resolved -%}
IT IS OVER
{{ message.note or "The condition no longer holds." }}

IT WAS
{{ alert.what }}
{% else -%}
WHAT HAPPENED
{{ alert.what }}

HOW BAD
{{ how_bad }}

WHAT TO DO
{{ alert.action }}
{% endif %}
WHERE TO LOOK
{{ link or alert.where }}

{% for name, value in facts %}{{ name }}: {{ value }}
{% endfor %}{% endif %}
All alerts: {{ page }}
""",
    "email.html": """\
<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{{ subject }}</title></head>
<body style="font:16px/1.5 sans-serif;color:#1a1f29;background:#ffffff;max-width:40rem">
<h1 style="font-size:1.2rem;border-left:6px solid {{ colour }};padding-left:.6rem">{{ subject }}</h1>
{% if summary %}
<p>More messages were decided than the channel carries in an hour. Held back were:</p>
<ul>{% for title in message.held %}<li>{{ title }}</li>{% endfor %}</ul>
{% else %}
{% if resolved %}
<h2 style="font-size:1rem">It is over</h2><p>{{ message.note or "The condition no longer holds." }}</p>
<h2 style="font-size:1rem">It was</h2><p>{{ alert.what }}</p>
{% else %}
<h2 style="font-size:1rem">What happened</h2><p>{{ alert.what }}</p>
<h2 style="font-size:1rem">How bad</h2><p>{{ how_bad }}</p>
<h2 style="font-size:1rem">What to do</h2><p>{{ alert.action }}</p>
{% endif %}
<h2 style="font-size:1rem">Where to look</h2>
<p>{% if link %}<a href="{{ link }}">{{ link }}</a>{% else %}{{ alert.where }}{% endif %}</p>
<table style="border-collapse:collapse">
{% for name, value in facts %}
<tr><th style="text-align:left;padding-right:1rem">{{ name }}</th><td>{{ value }}</td></tr>
{% endfor %}</table>
{% endif %}
<p><a href="{{ page }}">All alerts</a></p>
</body></html>
""",
}


@cache
def _environment() -> jinja2.Environment:
    import jinja2

    return jinja2.Environment(loader=jinja2.DictLoader(_TEMPLATES), autoescape=jinja2.select_autoescape(("html",)))


def _details(alert: Alert) -> list[tuple[str, str]]:
    details: Mapping[str, Any] = alert.details
    shown = [(str(name), _value(value)) for name, value in details.items()]
    return shown[:_DETAILS_SHOWN]


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _section(text: str) -> dict[str, Any]:
    return {"type": "section", "text": {"type": "mrkdwn", "text": _cut(text, _TEXT)}}


def _cut(text: str, limit: int) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _one_line(text: str) -> str:
    # also keeps a line break in a title from becoming a header of the e-mail
    return " ".join("".join(character if character.isprintable() else " " for character in text).split())


def _url(link: str) -> str:
    """Return an address that cannot end Slack's link early."""
    safe = link.replace("<", "%3C").replace(">", "%3E").replace("|", "%7C").replace(" ", "%20")
    return _cut(safe.replace("&", "&amp;"), _URL)
