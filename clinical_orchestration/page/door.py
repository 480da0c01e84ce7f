"""The one door of port 8085: nobody gets to the API, the page or the Dagster UI without being known.

Three ways in: a session cookie (from the form at ``/login``), ``Authorization: Basic`` with name and password, and
``Authorization: Bearer`` with a token. Behind the door ``request.state.identity`` says who it is and
``request.state.csrf_token`` what changes of a session must carry.
"""

from __future__ import annotations

import hmac
from typing import TYPE_CHECKING
from urllib.parse import parse_qs, quote, urlsplit

from starlette.requests import HTTPConnection, Request
from starlette.responses import RedirectResponse, Response

from clinical_orchestration.api.problems import Problem
from clinical_orchestration.page.airflow_api import API_PREFIX
from clinical_orchestration.page.dagster_ui import PREFIX as DAGSTER_PREFIX
from clinical_orchestration.page.keeper import cookie_name
from clinical_orchestration.page.rendering import render, render_error
from clinical_orchestration.platform.database import StoreUnavailableError
from clinical_orchestration.users.passwords import csrf_token
from clinical_orchestration.users.roles import READ
from clinical_orchestration.users.store import SESSION_LIFETIME, LockedOutError, LoginError

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from clinical_orchestration.page.keeper import Doorkeeper, Known
    from clinical_orchestration.users.identity import Identity

OPEN_PATHS = frozenset({"/health", f"{API_PREFIX}/health", f"{API_PREFIX}/version", "/metrics"})
OPEN_FOLDER = "/static/"
LOGIN_PATH, LOGOUT_PATH = "/login", "/logout"
CSRF_HEADER, CSRF_FIELD = "x-csrftoken", "csrf_token"
LARGEST_FORM = 65_536  # bytes

_SAFE_METHODS = ("GET", "HEAD", "OPTIONS", "TRACE")


class Door:
    """ASGI middleware around everything of the port.

    Args:
        app: what is behind the door.
        keeper: knows people.
    """

    def __init__(self, app: ASGIApp, keeper: Doorkeeper) -> None:
        self._app = app
        self._keeper = keeper

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request in, or answer it here."""
        path: str = scope.get("path", "")
        if scope["type"] not in ("http", "websocket") or path in OPEN_PATHS or path.startswith(OPEN_FOLDER):
            await self._app(scope, receive, send)
            return
        connection = HTTPConnection(scope)
        known, answer = None, None
        try:
            known = await self._keeper.known(connection)
        except LockedOutError as error:
            answer = _locked(connection, error)
        except StoreUnavailableError:
            answer = _unavailable(connection)
        at_login = path.rstrip("/") in (LOGIN_PATH, LOGOUT_PATH) and scope["type"] == "http"
        if at_login:
            answer = await self._log_in_or_out(Request(scope, receive), known)
        elif known is not None:
            state = scope.setdefault("state", {})
            state["identity"] = known.identity
            state["csrf_token"] = csrf_token(known.session) if known.session else ""
            answer = None if _may_enter(known.identity, path) else _forbidden(connection, known.identity)
            if answer is None and known.session:
                answer, receive = await _check_origin(connection, known.session, receive)
        elif answer is None:
            answer = _nobody(connection)
        if known is None and answer is not None and answer.status_code == 401 and not at_login:
            self._keeper.turned_away(connection)  # a login that failed has a row of its own
        if answer is None and scope["type"] == "websocket":
            receive, send = self._while_known(connection, receive, send)
        if answer is None:
            await self._app(scope, receive, send)
        elif scope["type"] == "websocket":
            await receive()
            await send({"type": "websocket.close", "code": 1008})
        else:
            await answer(scope, receive, send)

    async def _log_in_or_out(self, request: Request, known: Known | None) -> Response:
        target = local_target(request.query_params.get("next", ""))
        login = request.url.path.rstrip("/") == LOGIN_PATH
        if request.method == "POST":
            body = await _read_form(request.receive)
            form = _fields(body or b"")
            if login:
                return await self._log_in(request, known, form)
            if known is not None and known.session:
                if not _csrf_holds(request, known.session, form):
                    return _no_csrf(request)
                return await self._log_out(request, known)
        elif request.method not in ("GET", "HEAD"):
            return Problem(405).response({"Allow": "GET, HEAD, POST"})
        if known is not None and login and _may_enter(known.identity, target):
            return RedirectResponse(target, 303)
        return _login_page(request, target, known)

    async def _log_in(self, request: Request, known: Known | None, form: dict[str, str]) -> Response:
        target = local_target(form.get("next", ""))
        name = form.get("username", "")
        try:
            secret = await self._keeper.open_session(name, form.get("password", ""), request)
            if known is not None and known.session:
                await self._keeper.close_session(known, request)
        except LockedOutError as error:
            return _login_page(request, target, None, 429, f"Too many failed logins. Try again in {error.seconds} s.")
        except LoginError:
            return _login_page(request, target, None, 401, "Invalid login. Please try again.")
        except StoreUnavailableError:
            return _login_page(
                request, target, None, 503, "Logins are not possible now: the database does not answer. Try again."
            )
        answer = RedirectResponse(target, 303)
        answer.set_cookie(
            cookie_name(request),
            secret,
            max_age=int(SESSION_LIFETIME.total_seconds()),
            secure=request.url.scheme == "https",
            httponly=True,
            samesite="lax",
        )
        return answer

    async def _log_out(self, request: Request, known: Known) -> Response:
        try:
            await self._keeper.close_session(known, request)
        except StoreUnavailableError:
            return _unavailable(request)
        answer = RedirectResponse(LOGIN_PATH, 303)
        answer.delete_cookie(cookie_name(request), secure=request.url.scheme == "https", httponly=True, samesite="lax")
        return answer

    def _while_known(self, connection: HTTPConnection, receive: Receive, send: Send) -> tuple[Receive, Send]:
        """End a websocket with the next message after its login has ended."""

        async def still() -> bool:
            try:
                return await self._keeper.known(connection) is not None
            except StoreUnavailableError:
                return True
            except LockedOutError:
                return False

        async def guarded_receive() -> Message:
            message = await receive()
            if message["type"] == "websocket.receive" and not await still():
                await send({"type": "websocket.close", "code": 1008})
                return {"type": "websocket.disconnect", "code": 1008}
            return message

        async def guarded_send(message: Message) -> None:
            if message["type"] == "websocket.send" and not await still():
                await send({"type": "websocket.close", "code": 1008})
                raise OSError("the login of this websocket has ended")
            await send(message)

        return guarded_receive, guarded_send


def local_target(target: str) -> str:
    """Return where to go after a login: a path of this address; anything else becomes ``/``."""
    if not target.startswith("/") or target.startswith("//") or "\\" in target:
        return "/"
    if any(ord(letter) < 33 or ord(letter) == 127 for letter in target):
        return "/"
    try:
        parts = urlsplit(target)
    except ValueError:
        return "/"
    return "/" if parts.scheme or parts.netloc or parts.path in (LOGIN_PATH, LOGOUT_PATH) else target


def _wants_page(connection: HTTPConnection) -> bool:
    scope = connection.scope
    return (
        scope["type"] == "http"
        and scope["method"] in ("GET", "HEAD")
        and "text/html" in connection.headers.get("accept", "")
        and not _below(scope["path"], API_PREFIX)
    )


def _below(path: str, prefix: str) -> bool:
    return path == prefix or path.startswith(f"{prefix}/")


def _nobody(connection: HTTPConnection) -> Response:
    if not _wants_page(connection):
        return Problem(401).response()
    url = connection.url
    target = quote(f"{url.path}?{url.query}" if url.query else url.path, safe="")
    return RedirectResponse(f"{LOGIN_PATH}?next={target}", 303)


def _may_enter(identity: Identity, path: str) -> bool:
    """Return whether somebody may look at all; the API and the Dagster UI decide on each operation themselves."""
    if _below(path, API_PREFIX):
        return True
    return identity.may(READ, "DAGs" if _below(path, DAGSTER_PREFIX) else "Website")


def _refusal(connection: HTTPConnection, status: int, text: str, headers: dict[str, str] | None = None) -> Response:
    """Return a page for people, a problem for programs."""
    problem = Problem(status, text)
    if not _wants_page(connection):
        return problem.response(headers)
    page = render_error(Request(connection.scope), status, problem.title, text)
    page.headers.update(headers or {})
    return page


def _forbidden(connection: HTTPConnection, identity: Identity) -> Response:
    return _refusal(connection, 403, f"The roles of {identity.name} do not permit this. An administrator gives roles.")


async def _check_origin(connection: HTTPConnection, session: str, receive: Receive) -> tuple[Response | None, Receive]:
    """Refuse what another site may have made a browser send with the session's cookie."""
    scope = connection.scope
    unsafe = scope["type"] == "websocket" or scope["method"] not in _SAFE_METHODS
    if _below(scope["path"], DAGSTER_PREFIX):
        # Dagster's own scripts know no token, but browsers say where they come from; its GraphQL changes by GET too
        unsafe = unsafe or (scope["path"].endswith("/graphql") and "query" in connection.query_params)
        return (_no_csrf(connection) if unsafe and not _same_origin(connection) else None), receive
    if not unsafe:
        return None, receive
    if scope["type"] == "websocket":
        return (None if _same_origin(connection) else _no_csrf(connection)), receive
    if _csrf_holds(connection, session, {}):
        return None, receive
    if not connection.headers.get("content-type", "").startswith("application/x-www-form-urlencoded"):
        return _no_csrf(connection), receive
    body = await _read_form(receive)
    if body is None or not _csrf_holds(connection, session, _fields(body)):
        return _no_csrf(connection), receive
    return None, _replay(body, receive)


def _same_origin(connection: HTTPConnection) -> bool:
    headers = connection.headers
    origin = headers.get("origin", "").partition("://")[2].lower()
    return headers.get("sec-fetch-site") == "same-origin" or (
        origin != "" and origin == headers.get("host", "").lower()
    )


def _csrf_holds(connection: HTTPConnection, session: str, form: dict[str, str]) -> bool:
    shown = connection.headers.get(CSRF_HEADER) or form.get(CSRF_FIELD, "")
    return hmac.compare_digest(shown.encode(), csrf_token(session).encode())


async def _read_form(receive: Receive) -> bytes | None:
    """Return the whole body; None where it is larger than a form or breaks off."""
    body = bytearray()
    while True:
        message = await receive()
        if message["type"] != "http.request":
            return None
        body += message.get("body", b"")
        if len(body) > LARGEST_FORM:
            return None
        if not message.get("more_body", False):
            return bytes(body)


def _fields(body: bytes) -> dict[str, str]:
    try:
        values = parse_qs(body.decode("utf-8", "replace"), keep_blank_values=True, max_num_fields=100)
    except ValueError:
        return {}
    return {name: given[-1] for name, given in values.items()}


def _replay(body: bytes, receive: Receive) -> Receive:
    waiting: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replayed() -> Message:
        return waiting.pop() if waiting else await receive()

    return replayed


def _no_csrf(connection: HTTPConnection) -> Response:
    return _refusal(connection, 403, "The CSRF token is missing or not that of this session; load the page again.")


def _locked(connection: HTTPConnection, error: LockedOutError) -> Response:
    text = str(error)
    return _refusal(connection, 401, text[0].upper() + text[1:], {"Retry-After": str(error.seconds)})


def _unavailable(connection: HTTPConnection) -> Response:
    text = "Nobody can be let in now: the platform's database does not answer."
    return _refusal(connection, 503, text, {"Retry-After": "3"})


def _login_page(request: Request, target: str, known: Known | None, status: int = 200, error: str = "") -> Response:
    values = {
        "target": target,
        "error": error,
        "known": known.identity.name if known else "",
        "csrf": csrf_token(known.session) if known and known.session else "",
    }
    return render(request, "login.html", values, status)
