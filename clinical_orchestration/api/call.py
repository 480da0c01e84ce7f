"""One request as a handler sees it: path parameters, checked query parameters, a checked body.

Airflow refuses unknown query parameters and values of the wrong type with 400, and takes any ISO 8601 time with a zone.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import orjson

from clinical_orchestration.api.problems import Problem, bad_request

if TYPE_CHECKING:
    from starlette.requests import Request

MAXIMUM_LIMIT = 100
FALLBACK_LIMIT = 100
_TIME = re.compile(r"^\d{4}-\d{2}-\d{2}([T ]\d{2}:\d{2}(:\d{2}(\.\d{1,9})?)?)?\s?(Z|[+-]\d{2}:?\d{2})?$")


@dataclass
class Call:
    """What a handler gets. `user` is the name of who asks, `origin` by which way: ``api``, ``page``."""

    path: Mapping[str, str]
    query: Mapping[str, list[str]] = field(default_factory=dict)
    content: bytes = b""
    content_type: str = ""
    accept: str = ""
    user: str = "anonymous"
    client: str = ""
    origin: str = "api"

    def text(self, name: str, default: str | None = None) -> str | None:
        """Return a query parameter's last value."""
        values = self.query.get(name)
        return values[-1] if values else default

    def texts(self, name: str) -> list[str]:
        """Return the values of a list parameter, given several times or with commas."""
        return [part for value in self.query.get(name, ()) for part in value.split(",") if part != ""]

    def integer(self, name: str, default: int | None = None) -> int | None:
        """Return an integer parameter.

        Raises:
            Problem: it is none.
        """
        value = self.text(name)
        if value is None:
            return default
        if not re.fullmatch(r"[+-]?\d{1,18}", value):
            raise bad_request(f"Wrong type, expected 'integer' for query parameter '{name}'")
        return int(value)

    def number(self, name: str) -> float | None:
        """Return a number parameter.

        Raises:
            Problem: it is none.
        """
        value = self.text(name)
        if value is None:
            return None
        if not re.fullmatch(r"[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d{1,3})?", value):
            raise bad_request(f"Wrong type, expected 'number' for query parameter '{name}'")
        return float(value)

    def boolean(self, name: str, default: bool | None = None) -> bool | None:
        """Return a boolean parameter.

        Raises:
            Problem: it is none.
        """
        value = self.text(name)
        if value is None:
            return default
        if value.lower() not in ("true", "false"):
            raise bad_request(f"Wrong type, expected 'boolean' for query parameter '{name}'")
        return value.lower() == "true"

    def time(self, name: str) -> datetime | None:
        """Return a time parameter in UTC; a ``+`` that arrived as a space is taken for one.

        Raises:
            Problem: it is no time.
        """
        value = self.text(name)
        if value is None:
            return None
        value = value.strip()
        if value and value[-1] != "Z":
            value = value.replace(" ", "+")
        try:
            return parse_time(value)
        except ValueError as error:
            raise bad_request(str(error), "Incorrect datetime argument") from None

    def page(self) -> tuple[int, int]:
        """Return limit and offset, the limit capped at the maximum as Airflow does.

        Raises:
            Problem: one is negative or no integer.
        """
        limit, offset = self.integer("limit", FALLBACK_LIMIT), self.integer("offset", 0)
        if limit is None or offset is None or limit < 0:
            raise Problem(400, None, "Page limit must be a positive integer")
        if offset < 0:
            raise bad_request(f"{offset} is less than the minimum of 0")
        return min(limit or FALLBACK_LIMIT, MAXIMUM_LIMIT), min(offset, 2**62)

    def order(self, allowed: Sequence[str], default: str) -> str:
        """Return the name to order by, ``-`` in front for descending.

        Raises:
            Problem: ordering by it is not allowed.
        """
        value = self.text("order_by") or default
        name = value.lstrip("-")
        if name not in allowed:
            raise bad_request(
                f"Ordering with '{name}' is disallowed or the attribute does not exist on the model"
            )  # fmt: skip
        return value

    def ranges(self, *names: str) -> dict[tuple[str, str], datetime]:
        """Return the bounds ``<name>_gte`` and ``<name>_lte`` that are given."""
        found = {}
        for name in names:
            for side in ("gte", "lte"):
                moment = self.time(f"{name}_{side}")
                if moment is not None:
                    found[name, side] = moment
        return found

    def body(self) -> dict[str, Any]:
        """Return the body, a JSON object.

        Raises:
            Problem: it is something else.
        """
        if not self.content:
            raise bad_request("Request body must not be empty" if not self.content_type else "Request body is empty")
        kind = self.content_type.partition(";")[0].strip().lower()
        if kind != "application/json" and not kind.endswith("+json"):
            raise Problem(
                415, f"Invalid Content-type ({self.content_type}), expected JSON data", "Unsupported Media Type"
            )
        try:
            value = orjson.loads(self.content)
        except ValueError:
            raise bad_request("Request body is not valid JSON") from None
        if not isinstance(value, dict):
            raise bad_request(f"{_shown(value)} is not of type 'object'")
        if b"\\u0000" in self.content and _has_nul(value):
            raise bad_request(_NUL)
        return value


class Body:
    """A JSON object whose members are asked for one by one; what is wrong is said in one answer."""

    def __init__(self, values: Mapping[str, Any], known: Sequence[str] | None = None) -> None:
        self.values = values
        if known is not None:
            unknown = {name: ["Unknown field."] for name in values if name not in known}
            if unknown:
                raise bad_request(str(unknown))

    def has(self, name: str) -> bool:
        """Whether the member is there and not null."""
        return self.values.get(name) is not None

    def text(self, name: str, default: str | None = None, *, required: bool = False) -> str | None:
        """Return a string member."""
        return self._typed(name, str, "string", default, required)  # type: ignore[no-any-return]

    def boolean(self, name: str, default: bool = False, *, required: bool = False) -> bool:
        """Return a boolean member."""
        return bool(self._typed(name, bool, "boolean", default, required))

    def integer(self, name: str, default: int | None = None, *, required: bool = False) -> int | None:
        """Return an integer member."""
        value = self._typed(name, int, "integer", default, required)
        if isinstance(value, bool):
            raise bad_request(f"{_shown(value)} is not of type 'integer' - '{name}'")
        if value is not None and abs(value) >= 2**62:
            raise bad_request(f"{value} is out of range - '{name}'")
        return value  # type: ignore[no-any-return]

    def number(self, name: str) -> float | None:
        """Return a number member."""
        value = self.values.get(name)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise bad_request(f"{_shown(value)} is not of type 'number' - '{name}'")
        return float(value)

    def texts(self, name: str, *, nulls: bool = False) -> list[Any] | None:
        """Return a member that is a list of strings, and of nulls where `nulls` says so."""
        value = self._typed(name, list, "array", None, False)
        if value is None:
            return None
        for item in value:
            if not isinstance(item, str) and not (nulls and item is None):
                raise bad_request(f"{_shown(item)} is not of type 'string' - '{name}'")
        return list(value)

    def mapping(self, name: str) -> dict[str, Any] | None:
        """Return a member that is an object."""
        return self._typed(name, dict, "object", None, False)  # type: ignore[no-any-return]

    def time(self, name: str) -> datetime | None:
        """Return a time member in UTC; one without a zone is refused."""
        value = self.text(name)
        if value is None:
            return None
        try:
            return parse_time(value, zone_required=True)
        except ValueError as error:
            raise bad_request(str({name: [str(error)]})) from None

    def ranges(self, *names: str) -> dict[tuple[str, str], datetime]:
        """Return the bounds ``<name>_gte`` and ``<name>_lte`` that are given."""
        found = {}
        for name in names:
            for side in ("gte", "lte"):
                moment = self.time(f"{name}_{side}")
                if moment is not None:
                    found[name, side] = moment
        return found

    def _typed(self, name: str, kind: type, word: str, default: Any, required: bool) -> Any:
        value = self.values.get(name)
        if value is None:
            if required:
                raise bad_request(str({name: ["Missing data for required field."]}))
            return default
        if not isinstance(value, kind):
            raise bad_request(f"{_shown(value)} is not of type '{word}' - '{name}'")
        return value


_NUL = "A text holds a NUL character, which no database takes"


def _has_nul(value: Any) -> bool:
    if isinstance(value, dict):
        return any(_has_nul(name) or _has_nul(one) for name, one in value.items())
    if isinstance(value, list):
        return any(_has_nul(one) for one in value)
    return isinstance(value, str) and "\x00" in value


async def call_of(request: Request) -> Call:
    """Read a request.

    Raises:
        Problem: its path or a parameter holds a NUL character.
    """
    query: dict[str, list[str]] = {}
    for name, value in request.query_params.multi_items():
        query.setdefault(name, []).append(value)
    if _has_nul(request.path_params) or _has_nul(query):
        raise bad_request(_NUL)
    identity = getattr(request.state, "identity", None)
    return Call(
        path=request.path_params,
        query=query,
        content=await request.body(),
        content_type=request.headers.get("content-type", ""),
        accept=request.headers.get("accept", ""),
        user=getattr(identity, "name", "anonymous"),
        client=request.client.host if request.client else "",
        # a script may send the page's header, but it has no session
        origin="page"
        if request.headers.get("x-requested-with") == "page" and getattr(identity, "how", "session") == "session"
        else "api",
    )


def parse_time(text: str, *, zone_required: bool = False) -> datetime:
    """Return an ISO 8601 time in UTC; without a zone it is taken for UTC, or refused.

    Raises:
        ValueError: it is no time, or has no zone where one is required.
    """
    if not _TIME.match(text):
        raise ValueError(f"Unable to parse string [{text}]" if not zone_required else "Not a valid datetime.")
    try:
        moment = datetime.fromisoformat(text.replace(" ", "T", 1) if text[10:11] == " " else text)
    except ValueError:
        raise ValueError(f"Unable to parse string [{text}]") from None
    if moment.tzinfo is None:
        if zone_required:
            raise ValueError("Naive datetime is disallowed")
        moment = moment.replace(tzinfo=UTC)
    try:
        return moment.astimezone(UTC)
    except OverflowError:
        raise ValueError(f"{text} is out of range") from None


def show_time(moment: datetime | None) -> str | None:
    """Return a time as Airflow writes it: ``2025-10-25T00:00:00+00:00``."""
    return None if moment is None else moment.astimezone(UTC).isoformat()


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 100 else text[:100] + "..."
