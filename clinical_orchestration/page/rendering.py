"""Templates to answers, with the headers that every page has."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from starlette.responses import HTMLResponse

from clinical_orchestration.page.alerts import browser_link
from clinical_orchestration.page.pipelines import duration
from clinical_orchestration.page.visitor import visitor_of

if TYPE_CHECKING:
    import jinja2
    from starlette.requests import Request

TEMPLATES, STATIC = Path(__file__).parent / "templates", Path(__file__).parent / "static"
HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; connect-src 'self'; style-src 'self'; "
    "img-src 'self' data:; base-uri 'none'; form-action 'self'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "same-origin",
}
"""Nothing is loaded but the page's own script and style, no script or style stands in the page, no frame holds it."""


@cache
def environment() -> jinja2.Environment:
    """Return the templates; everything that is put into one is escaped."""
    import jinja2

    made = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True, trim_blocks=True, lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )  # fmt: skip
    made.filters["duration"] = duration
    made.filters["away"] = _away
    made.globals["browser_link"] = browser_link
    made.globals["static"] = static
    return made


@cache
def static(name: str) -> str:
    """Return the address of a file of ours; a new content has a new address, so that no browser keeps the old one."""
    return f"/static/{name}?{hashlib.sha256((STATIC / name).read_bytes()).hexdigest()[:12]}"


def render(request: Request, template: str, values: Mapping[str, Any] | None = None, status: int = 200) -> HTMLResponse:
    """Return a page: the template with its values, the visitor (``visitor``) and the time (``now``, UTC)."""
    text = environment().get_template(template).render(
        {"visitor": visitor_of(request), "now": datetime.now(UTC), **(values or {})}
    )  # fmt: skip
    return HTMLResponse(text, status_code=status, headers=HEADERS)


def render_error(request: Request, status: int, title: str, text: str) -> HTMLResponse:
    """Return a page that says what went wrong and what to do."""
    return render(request, "error.html", {"title": title, "text": text}, status)


def _away(moment: datetime, now: datetime) -> str:
    """Return how far a moment is from another, in one unit: ``in 2 h``, ``5 min ago``, ``now``."""
    seconds = (moment - now).total_seconds()
    for size, unit in ((86_400, "d"), (3600, "h"), (60, "min")):
        if abs(seconds) >= size:
            count = int(abs(seconds) // size)
            return f"in {count} {unit}" if seconds > 0 else f"{count} {unit} ago"
    return "in less than a minute" if seconds > 0 else "just now"
