"""The application below ``/api/v1``: which operation answers where, what it takes, who may ask it.

Operations are named by the ids of Airflow's own document. Handlers are plain functions that run in worker threads; an
answer is a JSON object, bytes that are one, a text, or nothing (204).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import orjson
from sqlalchemy.exc import OperationalError
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route, Router

from clinical_orchestration.airflow.control import ConflictError, Control, RefusedError, UnknownError
from clinical_orchestration.api.call import Call, call_of
from clinical_orchestration.api.dags import DagRoutes
from clinical_orchestration.api.datasets import DatasetRoutes
from clinical_orchestration.api.event_logs import EventLogRoutes
from clinical_orchestration.api.platform import PlatformRoutes
from clinical_orchestration.api.problems import Problem
from clinical_orchestration.api.recording import ChangeLog, changes
from clinical_orchestration.api.runs import RunRoutes
from clinical_orchestration.api.stored import StoredRoutes
from clinical_orchestration.api.tasks import TaskRoutes
from clinical_orchestration.api.users import UserRoutes
from clinical_orchestration.audit.trail import AuditError
from clinical_orchestration.platform.database import StoreUnavailableError

if TYPE_CHECKING:
    from clinical_orchestration.audit.trail import AuditTrail
    from clinical_orchestration.platform.store import PlatformStore
    from clinical_orchestration.users.identity import Identity
    from clinical_orchestration.users.store import UserStore

_logger = logging.getLogger("clinical_orchestration.api")

READ, CREATE, EDIT, DELETE = "can_read", "can_create", "can_edit", "can_delete"


@dataclass(frozen=True)
class Operation:
    """One operation: `permissions` are the (action, resource) pairs that it needs, by Airflow's names.

    `query` names the query parameters that it takes; any other is refused.
    """

    method: str
    path: str
    name: str
    permissions: tuple[tuple[str, str], ...]
    query: tuple[str, ...] = ()
    status: int = 200


class Gate(Protocol):
    """Lets requests in: returns who asks, or raises a :class:`Problem` (401, 403); it must not wait for anything."""

    def enter(self, request: Request, permissions: tuple[tuple[str, str], ...]) -> str:
        """Return the name of the user who may do this."""


class IdentityGate:
    """Lets in who the door in front of the API has recognised, if the user's roles permit it."""

    def enter(self, request: Request, permissions: tuple[tuple[str, str], ...]) -> str:
        """Return the user's name.

        Raises:
            Problem: 401, nobody is known; 403, the user may not do this.
        """
        identity: Identity | None = request.scope.get("state", {}).get("identity")
        if identity is None:
            if permissions:
                raise Problem(401)
            return "anonymous"
        if not all(identity.may(action, resource) for action, resource in permissions):
            raise Problem(403)
        return identity.name


class OpenGate:
    """Lets everybody in; for an address that only this machine reaches."""

    def enter(self, request: Request, permissions: tuple[tuple[str, str], ...]) -> str:
        """Return the name of a user without a login."""
        return "anonymous"


_PAGE = ("limit", "offset")
_LISTED = (*_PAGE, "order_by")
_RUN_FILTERS = tuple(
    f"{name}_{side}" for name in ("execution_date", "start_date", "end_date", "updated_at") for side in ("gte", "lte")
)
_TASK_FILTERS = (*_RUN_FILTERS, "duration_gte", "duration_lte", "state", "pool", "queue", "executor")
_DAG, _RUN, _TI, _XCOM, _LOG = "DAGs", "DAG Runs", "Task Instances", "XComs", "Task Logs"
_R = "/dags/{dag_id}/dagRuns/{dag_run_id}"
_T = _R + "/taskInstances/{task_id}"


def _needs(*pairs: tuple[str, str]) -> tuple[tuple[str, str], ...]:
    return pairs


_READ_TI = _needs((READ, _DAG), (READ, _RUN), (READ, _TI))
_EDIT_TI = _needs((EDIT, _DAG), (READ, _RUN), (EDIT, _TI))

# more specific paths stand before those with parameters in their place
OPERATIONS: tuple[Operation, ...] = (
    Operation("GET", "/connections", "get_connections", _needs((READ, "Connections")), _LISTED),
    Operation("POST", "/connections", "post_connection", _needs((CREATE, "Connections"))),
    Operation("POST", "/connections/test", "test_connection", _needs((CREATE, "Connections"))),
    Operation("GET", "/connections/{connection_id}", "get_connection", _needs((READ, "Connections"))),
    Operation(
        "PATCH", "/connections/{connection_id}", "patch_connection", _needs((EDIT, "Connections")), ("update_mask",)
    ),
    Operation("DELETE", "/connections/{connection_id}", "delete_connection", _needs((DELETE, "Connections")), (), 204),
    Operation("POST", "/dags/~/dagRuns/list", "get_dag_runs_batch", _needs((READ, _DAG), (READ, _RUN))),
    Operation("POST", "/dags/~/dagRuns/~/taskInstances/list", "get_task_instances_batch", _READ_TI),
    Operation(
        "GET", "/dags", "get_dags", _needs((READ, _DAG)),
        (*_LISTED, "tags", "only_active", "paused", "fields", "dag_id_pattern"),
    ),
    Operation(
        "PATCH", "/dags", "patch_dags", _needs((EDIT, _DAG)),
        (*_PAGE, "tags", "update_mask", "only_active", "dag_id_pattern"),
    ),
    Operation("GET", "/dags/{dag_id}", "get_dag", _needs((READ, _DAG)), ("fields",)),
    Operation("PATCH", "/dags/{dag_id}", "patch_dag", _needs((EDIT, _DAG)), ("update_mask",)),
    Operation("DELETE", "/dags/{dag_id}", "delete_dag", _needs((DELETE, _DAG)), (), 204),
    Operation("GET", "/dags/{dag_id}/details", "get_dag_details", _needs((READ, _DAG)), ("fields",)),
    Operation(
        "GET", "/dags/{dag_id}/tasks", "get_tasks", _needs((READ, _DAG), (READ, _TI)), ("order_by",)
    ),
    Operation("GET", "/dags/{dag_id}/tasks/{task_id}", "get_task", _needs((READ, _DAG), (READ, _TI))),
    Operation("POST", "/dags/{dag_id}/clearTaskInstances", "post_clear_task_instances", _EDIT_TI),
    Operation("POST", "/dags/{dag_id}/updateTaskInstancesState", "post_set_task_instances_state", _EDIT_TI),
    Operation(
        "GET", "/dags/{dag_id}/datasets/queuedEvent/{uri:path}", "get_dag_dataset_queued_event",
        _needs((READ, _DAG), (READ, "Datasets")), ("before",),
    ),
    Operation(
        "DELETE", "/dags/{dag_id}/datasets/queuedEvent/{uri:path}", "delete_dag_dataset_queued_event",
        _needs((READ, _DAG), (DELETE, "Datasets")), ("before",), 204,
    ),
    Operation(
        "GET", "/dags/{dag_id}/datasets/queuedEvent", "get_dag_dataset_queued_events",
        _needs((READ, _DAG), (READ, "Datasets")), ("before",),
    ),
    Operation(
        "DELETE", "/dags/{dag_id}/datasets/queuedEvent", "delete_dag_dataset_queued_events",
        _needs((READ, _DAG), (DELETE, "Datasets")), ("before",), 204,
    ),
    Operation(
        "GET", "/dags/{dag_id}/dagRuns", "get_dag_runs", _needs((READ, _DAG), (READ, _RUN)),
        (*_LISTED, *_RUN_FILTERS, "state", "fields"),
    ),
    Operation("POST", "/dags/{dag_id}/dagRuns", "post_dag_run", _needs((EDIT, _DAG), (CREATE, _RUN))),
    Operation("GET", _R, "get_dag_run", _needs((READ, _DAG), (READ, _RUN)), ("fields",)),
    Operation("PATCH", _R, "update_dag_run_state", _needs((EDIT, _DAG), (EDIT, _RUN))),
    Operation("DELETE", _R, "delete_dag_run", _needs((EDIT, _DAG), (DELETE, _RUN)), (), 204),
    Operation("POST", f"{_R}/clear", "clear_dag_run", _needs((EDIT, _DAG), (EDIT, _RUN))),
    Operation("PATCH", f"{_R}/setNote", "set_dag_run_note", _needs((EDIT, _DAG), (EDIT, _RUN))),
    Operation(
        "GET", f"{_R}/upstreamDatasetEvents", "get_upstream_dataset_events",
        _needs((READ, _DAG), (READ, _RUN), (READ, "Datasets")),
    ),
    Operation("GET", f"{_R}/taskInstances", "get_task_instances", _READ_TI, (*_PAGE, *_TASK_FILTERS)),
    Operation("GET", f"{_T}/dependencies", "get_task_instance_dependencies", _READ_TI),
    Operation("GET", f"{_T}/listMapped", "get_mapped_task_instances", _READ_TI, (*_LISTED, *_TASK_FILTERS)),
    Operation("GET", f"{_T}/tries", "get_task_instance_tries", _READ_TI, _LISTED),
    Operation("GET", f"{_T}/tries/{{task_try_number}}", "get_task_instance_try_details", _READ_TI),
    Operation(
        "GET", f"{_T}/xcomEntries", "get_xcom_entries", _needs(*_READ_TI, (READ, _XCOM)),
        (*_PAGE, "map_index", "xcom_key"),
    ),
    Operation(
        "GET", f"{_T}/xcomEntries/{{xcom_key:path}}", "get_xcom_entry", _needs(*_READ_TI, (READ, _XCOM)),
        ("map_index", "deserialize", "stringify"),
    ),
    Operation("GET", f"{_T}/links", "get_extra_links", _READ_TI, ("map_index",)),
    Operation(
        "GET", f"{_T}/logs/{{task_try_number}}", "get_log", _needs((READ, _DAG), (READ, _RUN), (READ, _LOG)),
        ("full_content", "map_index", "token"),
    ),
    Operation("PATCH", f"{_T}/setNote", "set_task_instance_note", _EDIT_TI),
    Operation("GET", _T, "get_task_instance", _READ_TI),
    Operation("PATCH", _T, "patch_task_instance", _EDIT_TI),
    Operation("GET", f"{_T}/{{map_index}}/dependencies", "get_mapped_task_instance_dependencies", _READ_TI),
    Operation("GET", f"{_T}/{{map_index}}/tries", "get_mapped_task_instance_tries", _READ_TI, _LISTED),
    Operation(
        "GET", f"{_T}/{{map_index}}/tries/{{task_try_number}}", "get_mapped_task_instance_try_details", _READ_TI
    ),
    Operation("PATCH", f"{_T}/{{map_index}}/setNote", "set_mapped_task_instance_note", _EDIT_TI),
    Operation("GET", f"{_T}/{{map_index}}", "get_mapped_task_instance", _READ_TI),
    Operation("PATCH", f"{_T}/{{map_index}}", "patch_mapped_task_instance", _EDIT_TI),
    Operation("PUT", "/parseDagFile/{file_token}", "reparse_dag_file", _needs((EDIT, _DAG)), (), 201),
    Operation(
        "GET", "/datasets/queuedEvent/{uri:path}", "get_dataset_queued_events", _needs((READ, "Datasets")), ("before",)
    ),
    Operation(
        "DELETE", "/datasets/queuedEvent/{uri:path}", "delete_dataset_queued_events", _needs((DELETE, "Datasets")),
        ("before",), 204,
    ),
    Operation(
        "GET", "/datasets/events", "get_dataset_events", _needs((READ, "Datasets")),
        (*_LISTED, "dataset_id", "source_dag_id", "source_task_id", "source_run_id", "source_map_index"),
    ),
    Operation("POST", "/datasets/events", "create_dataset_event", _needs((CREATE, "Datasets"))),
    Operation(
        "GET", "/datasets", "get_datasets", _needs((READ, "Datasets")), (*_LISTED, "uri_pattern", "dag_ids")
    ),
    Operation("GET", "/datasets/{uri:path}", "get_dataset", _needs((READ, "Datasets"))),
    Operation(
        "GET", "/eventLogs", "get_event_logs", _needs((READ, _DAG), (READ, "Audit Logs")),
        (*_LISTED, "dag_id", "task_id", "run_id", "map_index", "try_number", "event", "owner", "before", "after",
         "included_events", "excluded_events"),
    ),
    Operation("GET", "/eventLogs/{event_log_id}", "get_event_log", _needs((READ, _DAG), (READ, "Audit Logs"))),
    Operation(
        "GET", "/importErrors", "get_import_errors", _needs((READ, "ImportError")), _LISTED
    ),
    Operation("GET", "/importErrors/{import_error_id}", "get_import_error", _needs((READ, "ImportError"))),
    Operation("GET", "/pools", "get_pools", _needs((READ, "Pools")), _LISTED),
    Operation("POST", "/pools", "post_pool", _needs((CREATE, "Pools"))),
    Operation("GET", "/pools/{pool_name:path}", "get_pool", _needs((READ, "Pools"))),
    Operation("PATCH", "/pools/{pool_name:path}", "patch_pool", _needs((EDIT, "Pools")), ("update_mask",)),
    Operation("DELETE", "/pools/{pool_name:path}", "delete_pool", _needs((DELETE, "Pools")), (), 204),
    Operation("GET", "/providers", "get_providers", _needs((READ, "Providers"))),
    Operation("GET", "/permissions", "get_permissions", _needs((READ, "Permissions")), _PAGE),
    Operation("GET", "/roles", "get_roles", _needs((READ, "Roles")), _LISTED),
    Operation("POST", "/roles", "post_role", _needs((CREATE, "Roles"))),
    Operation("GET", "/roles/{role_name}", "get_role", _needs((READ, "Roles"))),
    Operation("PATCH", "/roles/{role_name}", "patch_role", _needs((EDIT, "Roles")), ("update_mask",)),
    Operation("DELETE", "/roles/{role_name}", "delete_role", _needs((DELETE, "Roles")), (), 204),
    Operation("GET", "/users", "get_users", _needs((READ, "Users")), _LISTED),
    Operation("POST", "/users", "post_user", _needs((CREATE, "Users"))),
    Operation("GET", "/users/{username}", "get_user", _needs((READ, "Users"))),
    Operation("PATCH", "/users/{username}", "patch_user", _needs((EDIT, "Users")), ("update_mask",)),
    Operation("DELETE", "/users/{username}", "delete_user", _needs((DELETE, "Users")), (), 204),
    Operation("GET", "/variables", "get_variables", _needs((READ, "Variables")), _LISTED),
    Operation("POST", "/variables", "post_variables", _needs((CREATE, "Variables"))),
    Operation("GET", "/variables/{variable_key:path}", "get_variable", _needs((READ, "Variables"))),
    Operation(
        "PATCH", "/variables/{variable_key:path}", "patch_variable", _needs((EDIT, "Variables")), ("update_mask",)
    ),
    Operation("DELETE", "/variables/{variable_key:path}", "delete_variable", _needs((DELETE, "Variables")), (), 204),
    Operation("GET", "/dagStats", "get_dag_stats", _needs((READ, _DAG), (READ, _RUN)), ("dag_ids",)),
    Operation("GET", "/dagSources/{file_token}", "get_dag_source", _needs((READ, "DAG Code"))),
    Operation(
        "GET", "/dagWarnings", "get_dag_warnings", _needs((READ, "DAG Warnings")), (*_LISTED, "dag_id", "warning_type")
    ),
    Operation("GET", "/config", "get_config", _needs((READ, "Configurations")), ("section",)),
    Operation("GET", "/config/section/{section}/option/{option}", "get_value", _needs((READ, "Configurations"))),
    Operation("GET", "/plugins", "get_plugins", _needs((READ, "Plugins")), _PAGE),
    Operation("GET", "/version", "get_version", ()),
)  # fmt: skip


def create_api(
    control: Control,
    store: Callable[[], PlatformStore],
    *,
    settings: Callable[[], Mapping[str, Mapping[str, str]]] = dict,
    gate: Gate | None = None,
    trail: AuditTrail | None = None,
    users: UserStore | None = None,
) -> Router:
    """Return the application to be mounted at ``/api/v1``.

    Args:
        control: DAGs and runs.
        store: returns the store of connections, variables and pools.
        settings: sections for ``/config``.
        gate: who may do what; default: everybody everything.
        trail: where changes are recorded; default: nowhere.
        users: the users and roles; None: there are none to show.
    """
    rooms: list[Any] = [
        DagRoutes(control),
        RunRoutes(control),
        TaskRoutes(control),
        DatasetRoutes(control),
        StoredRoutes(control, store),
        PlatformRoutes(control, settings),
        EventLogRoutes(trail),
        UserRoutes(users),
    ]

    def handler(name: str) -> Callable[[Call], Any]:
        found: Callable[[Call], Any] = next(getattr(room, name) for room in rooms if hasattr(room, name))
        return found

    keeper = gate or OpenGate()
    log = ChangeLog(trail, handler) if trail is not None else None
    by_path: dict[str, dict[str, Callable[[Request], Any]]] = {}
    for operation in OPERATIONS:
        recorded = log if changes(operation) else None
        answer = _endpoint(operation, handler(operation.name), keeper, recorded)
        by_path.setdefault(operation.path, {})[operation.method] = answer
    routes = [
        Route(path, _dispatch(methods), methods=["GET", "POST", "PATCH", "PUT", "DELETE", "HEAD", "OPTIONS", "TRACE"])
        for path, methods in by_path.items()
    ]
    return Router(routes, default=_unknown, redirect_slashes=False)


def _dispatch(methods: dict[str, Callable[[Request], Any]]) -> Callable[[Request], Any]:
    async def dispatch(request: Request) -> Response:
        handler = methods.get(request.method)
        if handler is None:
            allowed = ", ".join(sorted(methods))
            problem = Problem(405, "The method is not allowed for the requested URL.", "Method Not Allowed")
            return problem.response({"Allow": allowed})
        answer: Response = await handler(request)
        return answer

    return dispatch


async def _unknown(scope: Any, receive: Any, send: Any) -> None:
    problem = Problem(404, "The requested URL was not found on the server.")
    await problem.response()(scope, receive, send)


def _endpoint(
    operation: Operation, handler: Callable[[Call], Any], gate: Gate, log: ChangeLog | None
) -> Callable[[Request], Any]:
    """Return what answers an operation; `log` records it where it is one that changes something."""
    known = frozenset(operation.query)

    async def endpoint(request: Request) -> Response:
        try:
            try:
                user = gate.enter(request, operation.permissions)
            except Problem as problem:
                if log is not None and problem.status in (401, 403):
                    await run_in_threadpool(log.refused, operation, await call_of(request), problem.status)
                raise
            call = await call_of(request)
            call.user = user
            extra = sorted(set(call.query) - known)
            if extra:
                raise Problem(400, f"Extra query parameter(s) {', '.join(extra)} not in spec")
            answer = await run_in_threadpool(handler if log is None else partial(log.run, operation), call)
        except Problem as problem:
            return problem.response()
        except UnknownError as error:
            return Problem(404, str(error)).response()
        except ConflictError as error:
            return Problem(409, str(error)).response()
        except AuditError as error:
            _logger.error("%s was not carried out: %s", operation.name, error)
            return Problem(503, "The audit trail cannot be written, so nothing was changed.").response(
                {"Retry-After": "3"}
            )
        except RefusedError as error:
            return Problem(503, str(error)).response({"Retry-After": "3"})
        except (StoreUnavailableError, OperationalError) as error:
            _logger.warning("%s failed: %s", operation.name, type(error).__name__)
            return Problem(503, "The platform's database does not answer.").response({"Retry-After": "3"})
        except Exception:
            # the text may hold what somebody stored; it goes to the log only
            _logger.exception("%s failed", operation.name)
            return Problem(500, "Something went wrong here; the log of the page says what.").response()
        return _answer(operation, answer)

    return endpoint


def _answer(operation: Operation, answer: Any) -> Response:
    if answer is None:
        return Response(status_code=operation.status)
    if isinstance(answer, str):
        return PlainTextResponse(answer)
    content = answer if isinstance(answer, bytes) else orjson.dumps(answer)
    return Response(content, operation.status, media_type="application/json")
