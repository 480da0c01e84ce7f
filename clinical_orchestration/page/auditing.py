"""Changes that are made in the Dagster UI, into the audit trail.

Each field of a GraphQL mutation is recorded under its own name, such as ``launchRun``, before the Dagster UI sees the
request, and again with what came of it. Mutations are taken by POST only: a link must not change anything, and the
websocket is for subscriptions.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs

import anyio
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers
from starlette.responses import JSONResponse

from clinical_orchestration.audit.recording import Ending, Recorder, change, refused
from clinical_orchestration.audit.trail import AuditEntry, AuditError

if TYPE_CHECKING:
    from graphql import DocumentNode, SelectionSetNode
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

ORIGIN = "graphql"
LARGEST_REQUEST = 10_000_000  # bytes; what the UI sends is a thousand times smaller
NO_CHANGES = frozenset({"logTelemetry", "setNuxSeen", "sensorDryRun", "scheduleDryRun"})
"""Mutations that leave the deployment as it is."""

_SAFE = ("GET", "HEAD", "OPTIONS")
_FAILURE = re.compile(r"Error|Invalid|NotFound|Conflict|Failure")  # in the names of Dagster's answers
_JOB_NAMES = ("jobName", "pipelineName")
_RUN_NAMES = ("runId", "parentRunId")
_DOCUMENTS = ("runConfigData", "runConfig")  # texts of YAML or JSON


@dataclass(frozen=True)
class Mutation:
    """One field of a mutation: its name, and the name of its answer."""

    field: str
    answer: str


def mutations(query: str, operation_name: str | None = None) -> list[Mutation]:
    """Return what a document changes when it is executed; nothing for one with a mistake, since nobody executes it.

    Args:
        query: text of the document.
        operation_name: which of its operations is executed; all of them count where it names none of these.
    """
    if "mutation" not in query:
        return []
    from graphql import GraphQLSyntaxError, OperationDefinitionNode, OperationType, parse

    try:
        document = parse(query, no_location=True)
    except GraphQLSyntaxError:
        return []
    except RecursionError:
        return [Mutation("unreadable", "")]  # another stack might be deep enough
    operations = [one for one in document.definitions if isinstance(one, OperationDefinitionNode)]
    named = [one for one in operations if one.name is not None and one.name.value == operation_name]
    chosen = [one for one in named or operations if one.operation == OperationType.MUTATION]
    found = [field for one in chosen for field in _fields(document, one.selection_set, frozenset())]
    return [one for one in dict.fromkeys(found) if one.field not in NO_CHANGES]


def _fields(document: DocumentNode, selections: SelectionSetNode, within: frozenset[str]) -> Iterator[Mutation]:
    from graphql import FieldNode, FragmentDefinitionNode, FragmentSpreadNode, InlineFragmentNode

    for one in selections.selections:
        if isinstance(one, FieldNode):
            yield Mutation(one.name.value, one.alias.value if one.alias else one.name.value)
        elif isinstance(one, InlineFragmentNode):
            yield from _fields(document, one.selection_set, within)
        elif isinstance(one, FragmentSpreadNode) and one.name.value not in within:
            for fragment in document.definitions:
                if isinstance(fragment, FragmentDefinitionNode) and fragment.name.value == one.name.value:
                    yield from _fields(document, fragment.selection_set, within | {one.name.value})


class AuditedUi:
    """ASGI application: the Dagster UI, with its changes recorded.

    Args:
        app: the Dagster UI.
        trail: what they go to.
    """

    def __init__(self, app: ASGIApp, trail: Recorder) -> None:
        self._app = app
        self._trail = trail

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request or websocket."""
        if scope["type"] == "websocket":
            await self._app(scope, self._watched(scope, receive, send), send)
            return
        graphql = scope["type"] == "http" and scope["path"].rstrip("/").endswith("/graphql")
        if scope["type"] != "http" or (scope["method"] in _SAFE and not graphql):
            await self._app(scope, receive, send)
            return
        try:
            body = await _body(receive)
        except ValueError as error:
            await JSONResponse({"error": str(error)}, 413)(scope, receive, send)
            return
        asked = _asked(scope, body) if graphql else {}
        changed = mutations(*_document(asked)) if graphql else []
        if graphql and not changed:
            await self._app(scope, _again(body, receive), send)
        elif scope["method"] in _SAFE:
            await _refusal("mutations are taken by POST only", 405)(scope, receive, send)
        else:
            entries = _entries(scope, changed, asked) if graphql else [_report(scope, body)]
            await self._recorded(entries, changed, scope, _again(body, receive), send)

    async def _recorded(
        self, entries: Sequence[AuditEntry], changed: Sequence[Mutation], scope: Scope, receive: Receive, send: Send
    ) -> None:
        messages: list[Message] = []

        async def keep(message: Message) -> None:
            messages.append(message)

        try:
            async with self._changes(entries) as endings:
                await self._app(scope, receive, keep)
                status = next((one["status"] for one in messages if one["type"] == "http.response.start"), 500)
                _conclude(endings, changed, status, b"".join(one.get("body", b"") for one in messages))
        except AuditError:
            await _refusal("The audit trail cannot be written, so nothing was changed.", 503)(scope, receive, send)
            return
        for message in messages:
            await send(message)

    @asynccontextmanager
    async def _changes(self, entries: Sequence[AuditEntry]) -> AsyncIterator[list[Ending]]:
        """Record changes around a block; the records are made in a thread, and whatever happens to the request."""
        stack = ExitStack()

        def begin() -> list[Ending]:
            with ExitStack() as begun:
                endings = [begun.enter_context(change(self._trail, entry)) for entry in entries]
                stack.push(begun.pop_all())
            return endings

        endings = await run_in_threadpool(begin)
        error: tuple[Any, Any, Any] = (None, None, None)
        try:
            yield endings
        except BaseException:
            error = sys.exc_info()
            raise
        finally:
            with anyio.CancelScope(shield=True):
                await run_in_threadpool(stack.__exit__, *error)

    def _watched(self, scope: Scope, receive: Receive, send: Send) -> Receive:
        async def watched() -> Message:
            while True:
                message = await receive()
                if message["type"] != "websocket.receive":
                    return message
                asked, number = _started(message)
                changed = mutations(_document(asked)[0])
                if not changed:
                    return message
                for entry in _entries(scope, changed, asked):
                    await run_in_threadpool(refused, self._trail, entry)
                payload = {"message": "mutations are taken by POST only"}
                await send(
                    {"type": "websocket.send", "text": json.dumps({"type": "error", "id": number, "payload": payload})}
                )

        return watched


def _entries(scope: Scope, changed: Sequence[Mutation], asked: Mapping[str, Any]) -> list[AuditEntry]:
    given = asked.get("variables")
    if isinstance(given, str):
        given = _parsed(given)
    variables = _readable(given) if isinstance(given, Mapping) else {}
    extra = {"query": asked["query"]} if not variables else None  # values may stand in the text itself
    return [
        AuditEntry(
            one.field,
            _who(scope),
            ORIGIN,
            dag_id=_first(variables, _JOB_NAMES),
            run_id=_first(variables, _RUN_NAMES),
            new=variables or None,
            extra=extra,
            address=_address(scope),
        )
        for one in changed
    ]


def _report(scope: Scope, body: bytes) -> AuditEntry:
    """Return the entry of what is reported to the UI's own routes, such as ``report_asset_materialization``."""
    path = scope["path"].removeprefix(scope.get("root_path", "")).strip("/")
    event, _, rest = path.partition("/")
    try:
        new = json.loads(body) if body else None
    except ValueError:
        new = None
    return AuditEntry(
        event or "report", _who(scope), ORIGIN, new=_readable(new), extra={"path": rest}, address=_address(scope)
    )


def _conclude(endings: Sequence[Ending], changed: Sequence[Mutation], status: int, body: bytes) -> None:
    answer = _parsed(body)
    data = answer.get("data") or {}
    for number, ending in enumerate(endings):
        result = data.get(changed[number].answer) if changed else None
        kinds = sorted(set(_kinds(result)))
        ending.new = {"status": status, **({"result": kinds} if kinds else {})}
        ending.run_id = _run_id(result)
        failed = [kind for kind in kinds if _FAILURE.search(kind)]
        if failed or status >= 400 or answer.get("errors") or (changed and result is None):
            ending.failed = ", ".join(failed) or f"status {status}"


def _kinds(result: Any) -> Iterator[str]:
    """Return the names of the types of a result, and of those in its lists."""
    if isinstance(result, Mapping):
        if isinstance(result.get("__typename"), str):
            yield result["__typename"]
        for inner in result.values():
            if isinstance(inner, list):
                for one in inner:
                    yield from _kinds(one)


def _run_id(result: Any) -> str | None:
    run = result.get("run") if isinstance(result, Mapping) else None
    found = (run.get("runId") or run.get("id")) if isinstance(run, Mapping) else None
    return found if isinstance(found, str) else None


def _first(values: Any, names: Sequence[str]) -> str | None:
    """Return the first text of one of these names, at any depth."""
    if isinstance(values, Mapping):
        for name in names:
            if isinstance(values.get(name), str):
                return str(values[name])
        return next((found for one in values.values() if (found := _first(one, names)) is not None), None)
    if isinstance(values, list):
        return next((found for one in values if (found := _first(one, names)) is not None), None)
    return None


def _readable(value: Any) -> Any:
    """Return variables with run configurations parsed, so that the secrets in them can be told by their names."""
    if isinstance(value, Mapping):
        return {name: _config(one) if name in _DOCUMENTS else _readable(one) for name, one in value.items()}
    return [_readable(one) for one in value] if isinstance(value, list) else value


def _config(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    import yaml

    try:
        return yaml.safe_load(value)
    except yaml.YAMLError:
        return "a text that is no YAML"


def _asked(scope: Scope, body: bytes) -> Mapping[str, Any]:
    """Return query, variables and name of the operation as the Dagster UI reads them."""
    kind = Headers(scope=scope).get("content-type", "")
    if scope["method"] == "POST" and "application/json" in kind:
        return _parsed(body)
    if scope["method"] == "POST" and "application/graphql" in kind:
        return {"query": body.decode(errors="replace")}
    return {name: values[-1] for name, values in parse_qs(scope["query_string"].decode(errors="replace")).items()}


def _started(message: Message) -> tuple[Mapping[str, Any], Any]:
    """Return what a message of the websocket starts, and the number that it gives it."""
    text = message.get("text") or message.get("bytes") or b""
    found = _parsed(text)
    payload = found.get("payload")
    return (payload if isinstance(payload, Mapping) else {}), found.get("id")


def _document(asked: Mapping[str, Any]) -> tuple[str, str | None]:
    query = asked.get("query")
    return (query if isinstance(query, str) else ""), asked.get("operationName")


def _parsed(text: str | bytes) -> Mapping[str, Any]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, Mapping) else {}


def _who(scope: Scope) -> str:
    return getattr(scope.get("state", {}).get("identity"), "name", "anonymous")


def _address(scope: Scope) -> str:
    client = scope.get("client")
    return client[0] if client else ""


def _refusal(text: str, status: int) -> JSONResponse:
    return JSONResponse({"data": None, "errors": [{"message": text}]}, status)


async def _body(receive: Receive) -> bytes:
    body = b""
    while True:
        message = await receive()
        body += bytes(message.get("body", b""))
        if len(body) > LARGEST_REQUEST:
            raise ValueError(f"a request to the Dagster UI has at most {LARGEST_REQUEST} bytes")
        if not message.get("more_body"):
            return body


def _again(body: bytes, receive: Receive) -> Receive:
    """Return what gives a body that was read once more, and then what follows it."""
    given = False

    async def again() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again
