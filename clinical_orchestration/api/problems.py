"""Errors as Airflow's API answers them: ``application/problem+json`` with its titles and types."""

from __future__ import annotations

from typing import Any

import orjson
from starlette.responses import Response

AIRFLOW_VERSION = "2.11.0"
_DOCS = f"https://airflow.apache.org/docs/apache-airflow/{AIRFLOW_VERSION}/stable-rest-api-ref.html#section/Errors/"
_TYPES = {
    400: "BadRequest", 401: "Unauthenticated", 403: "PermissionDenied", 404: "NotFound", 405: "MethodNotAllowed",
    409: "AlreadyExists", 500: "Unknown",
}  # fmt: skip
_TITLES = {
    400: "Bad Request", 401: "Unauthorized", 403: "Forbidden", 404: "Not Found", 405: "Method Not Allowed",
    406: "Not Acceptable", 409: "Conflict", 415: "Unsupported Media Type", 500: "Internal Server Error",
    503: "Service Unavailable",
}  # fmt: skip


class Problem(Exception):  # noqa: N818 - RFC 9457 calls it a problem
    """An error answer."""

    def __init__(self, status: int, detail: str | None = None, title: str | None = None) -> None:
        super().__init__(detail or title or _TITLES[status])
        self.status = status
        self.detail = detail
        self.title = title or _TITLES[status]

    def response(self, headers: dict[str, str] | None = None) -> Response:
        """Return the HTTP answer."""
        kind = _TYPES.get(self.status)
        body: dict[str, Any] = {
            "detail": self.detail,
            "status": self.status,
            "title": self.title,
            "type": _DOCS + kind if kind else "about:blank",
        }
        return Response(
            orjson.dumps(body, option=orjson.OPT_APPEND_NEWLINE),
            self.status,
            headers=headers,
            media_type="application/problem+json",
        )


def bad_request(detail: str, title: str | None = None) -> Problem:
    """Return the error of a request that makes no sense."""
    return Problem(400, detail, title)


def not_found(title: str | None = None, detail: str | None = None) -> Problem:
    """Return the error of something that is not there."""
    return Problem(404, detail, title)


def conflict(detail: str) -> Problem:
    """Return the error of something that is there already."""
    return Problem(409, detail)
