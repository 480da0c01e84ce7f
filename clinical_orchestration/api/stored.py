"""Connections, variables and pools."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from clinical_orchestration.airflow.catalog import DEFAULT_POOL, DEFAULT_SLOTS
from clinical_orchestration.airflow.control import Control
from clinical_orchestration.airflow.figures import tasks_by_pool
from clinical_orchestration.airflow.states import RUNNING, SCHEDULED
from clinical_orchestration.api.call import Body, Call
from clinical_orchestration.api.problems import Problem, bad_request, conflict, not_found
from clinical_orchestration.instance import delete_pool, pool_slots, set_pool
from clinical_orchestration.platform.connection import Connection, validate_key
from clinical_orchestration.platform.masking import MASK, is_sensitive
from clinical_orchestration.platform.store import PlatformStore, PoolInfo, StoredConnection, StoredVariable

_CONNECTION_FIELDS = (
    "connection_id", "conn_type", "description", "host", "login", "schema", "port", "password", "extra",
)  # fmt: skip
_POOL_FIELDS = ("name", "slots", "description", "include_deferred")
_POOL_READ_ONLY = (
    "occupied_slots", "running_slots", "queued_slots", "open_slots", "scheduled_slots", "deferred_slots",
)  # fmt: skip


class StoredRoutes:
    """Handlers of what users store, named by Airflow's operation ids."""

    def __init__(self, control: Control, store: Callable[[], PlatformStore]) -> None:
        self.control = control
        self._store = store

    # --- connections ------------------------------------------------------------------------------------------------

    def get_connections(self, call: Call) -> dict[str, Any]:
        """``GET /connections``."""
        limit, offset = call.page()
        order = call.order(("connection_id", "conn_type", "description", "host", "port", "id"), "id")
        found = list(self._store().connections().values())
        name = order.lstrip("-")

        def key(one: StoredConnection) -> Any:
            value = one.id if name == "id" else getattr(one.public, {"connection_id": "conn_id"}.get(name, name))
            return (value is not None, value)

        found.sort(key=key, reverse=order.startswith("-"))
        page = [_show_connection(one.public, with_extra=False) for one in found[offset : offset + limit]]
        return {"connections": page, "total_entries": len(found)}

    def get_connection(self, call: Call) -> dict[str, Any]:
        """``GET /connections/{connection_id}``; the password is never shown, secrets in the extra are masked."""
        return _show_connection(self._connection(call).connection(self._store().cipher).masked())

    def post_connection(self, call: Call) -> dict[str, Any]:
        """``POST /connections``."""
        body = Body(call.body(), _CONNECTION_FIELDS)
        missing = {
            name: ["Missing data for required field."]
            for name in ("connection_id", "conn_type")
            if body.values.get(name) is None
        }
        if missing:
            raise bad_request(str(missing))
        made = self._checked(_read_connection(body, Connection(str(body.values["connection_id"]))))
        try:
            validate_key(made.conn_id, max_length=200)
        except (ValueError, TypeError) as error:
            raise bad_request(str(error)) from None
        if self._store().put_connection(made, overwrite=False) == "exists":
            raise conflict(f"Connection already exist. ID: {made.conn_id}")
        return _show_connection(made.masked())

    def patch_connection(self, call: Call) -> dict[str, Any]:
        """``PATCH /connections/{connection_id}``."""
        body = Body(call.body(), _CONNECTION_FIELDS)
        stored = self._connection(call)
        given = body.text("connection_id")
        if given and given != stored.conn_id:
            raise bad_request("The connection_id cannot be updated.")
        values = {name: value for name, value in body.values.items() if name != "connection_id"}
        mask = call.texts("update_mask")
        if mask:
            values = _masked_update(mask, values, ("connection_id", "conn_id"))
        current = stored.connection(self._store().cipher)
        changed = self._checked(_read_connection(Body(values), current))
        self._store().put_connection(changed)
        return _show_connection(changed.masked())

    def delete_connection(self, call: Call) -> None:
        """``DELETE /connections/{connection_id}``."""
        self._connection(call)
        self._store().delete_connection(call.path["connection_id"])

    def test_connection(self, call: Call) -> dict[str, Any]:
        """``POST /connections/test``: switched off, as the Airflow deployment had it."""
        Body(call.body(), _CONNECTION_FIELDS)
        raise Problem(
            403,
            "Testing connections is disabled in Airflow configuration. Contact your deployment admin to enable it.",
            "Connection Test Disabled",
        )

    def _connection(self, call: Call) -> StoredConnection:
        conn_id = call.path["connection_id"]
        found = self._store().connections().get(conn_id)
        if found is None:
            raise not_found(
                "Connection not found", f"The Connection with connection_id: `{conn_id}` was not found"
            )  # fmt: skip
        return found

    def _checked(self, connection: Connection) -> Connection:
        texts = (connection.conn_type, connection.host, connection.login, connection.schema, connection.password,
                 connection.extra, connection.description, connection.conn_id)  # fmt: skip
        if any("\x00" in text for text in texts if text):
            raise bad_request("A text holds a NUL character, which no database takes")
        if connection.port is not None and not -(2**31) <= connection.port < 2**31:
            raise bad_request(str({"port": ["Not a valid integer."]}))
        return connection

    # --- variables --------------------------------------------------------------------------------------------------

    def get_variables(self, call: Call) -> dict[str, Any]:
        """``GET /variables``; a value that is a secret by its name is masked."""
        limit, offset = call.page()
        order = call.order(("value", "key", "id"), "id")
        found = list(self._store().variables().values())
        name = {"value": "raw"}.get(order.lstrip("-"), order.lstrip("-"))
        found.sort(key=lambda one: getattr(one, name), reverse=order.startswith("-"))
        page = [self._show_variable(one) for one in found[offset : offset + limit]]
        return {"variables": page, "total_entries": len(found)}

    def get_variable(self, call: Call) -> dict[str, Any]:
        """``GET /variables/{variable_key}``."""
        return self._show_variable(self._variable(call.path["variable_key"]))

    def post_variables(self, call: Call) -> dict[str, Any]:
        """``POST /variables``: one that is there is overwritten, as in Airflow."""
        key, value, description = _read_variable(Body(call.body(), ("key", "value", "description")))
        self._store().set_variable(key, value, description)
        return {"key": key, "value": value, "description": description}

    def patch_variable(self, call: Call) -> dict[str, Any]:
        """``PATCH /variables/{variable_key}``."""
        key, value, description = _read_variable(Body(call.body(), ("key", "value", "description")))
        if key != call.path["variable_key"]:
            raise bad_request("key from request body doesn't match uri parameter", "Invalid post body")
        current = self._variable(key)
        mask = call.texts("update_mask")
        if mask:
            kept = _masked_update(mask, {"value": value, "description": description}, ("key",))
            value = kept.get("value", current.value(self._store().cipher))
            description = kept.get("description", current.description)
        self._store().set_variable(key, value, description)
        return self._show_variable(self._variable(key))

    def delete_variable(self, call: Call) -> None:
        """``DELETE /variables/{variable_key}``."""
        if not self._store().delete_variable(call.path["variable_key"]):
            raise not_found("Variable not found")

    def _variable(self, key: str) -> StoredVariable:
        found = self._store().variables().get(key)
        if found is None:
            raise not_found("Variable not found", "Variable does not exist")
        return found

    def _show_variable(self, one: StoredVariable) -> dict[str, Any]:
        value = MASK if is_sensitive(one.key) else one.value(self._store().cipher)
        return {"key": one.key, "value": value, "description": one.description}

    # --- pools ------------------------------------------------------------------------------------------------------

    def get_pools(self, call: Call) -> dict[str, Any]:
        """``GET /pools``."""
        limit, offset = call.page()
        order = call.order(("name", "slots", "id"), "id")
        shown = self._pools()
        if order.lstrip("-") != "id":
            shown.sort(key=lambda pool: pool[order.lstrip("-")])
        if order.startswith("-"):
            shown.reverse()
        return {"pools": shown[offset : offset + limit], "total_entries": len(shown)}

    def get_pool(self, call: Call) -> dict[str, Any]:
        """``GET /pools/{pool_name}``."""
        return self._pool(call.path["pool_name"])

    def post_pool(self, call: Call) -> dict[str, Any]:
        """``POST /pools``."""
        values = call.body()
        _required(values)
        name, slots, info = _read_pool(Body(values, (*_POOL_FIELDS, *_POOL_READ_ONLY)))
        if name == DEFAULT_POOL or name in pool_slots(self.control.instance()):
            raise conflict(f"Pool: {name} already exists")
        self._write_pool(name, slots, info)
        return self._pool(name)

    def patch_pool(self, call: Call) -> dict[str, Any]:
        """``PATCH /pools/{pool_name}``."""
        name = call.path["pool_name"]
        values = call.body()
        mask = [part.strip() for part in call.texts("update_mask")]
        only_slots = bool(mask) and set(mask) <= {"slots", "include_deferred"}
        if name == DEFAULT_POOL and values.get("name") != DEFAULT_POOL and not only_slots:
            raise bad_request("Default Pool's name can't be modified")
        current = self._pool(name)
        body = Body(values, (*_POOL_FIELDS, *_POOL_READ_ONLY))
        unknown = [part for part in mask if part not in _POOL_FIELDS]
        if unknown:
            raise bad_request(f"Invalid field: {unknown[0]} in update mask")
        if mask:
            absent = [part for part in mask if part not in values]
            if absent:
                raise bad_request(f"Invalid field: {absent[0]} in update mask")
            values = {**{field: current[field] for field in _POOL_FIELDS}, **{part: values[part] for part in mask}}
            body = Body(values)
        else:
            _required(values)
        new_name, slots, info = _read_pool(body)
        if name == DEFAULT_POOL:
            raise bad_request("Steps without a pool are not limited here: default_pool has no slots to change")
        if new_name != name:
            if new_name == DEFAULT_POOL or new_name in pool_slots(self.control.instance()):
                raise conflict(f"Pool: {new_name} already exists")
            self._remove_pool(name)
        self._write_pool(new_name, slots, info)
        return self._pool(new_name)

    def delete_pool(self, call: Call) -> None:
        """``DELETE /pools/{pool_name}``."""
        name = call.path["pool_name"]
        if name == DEFAULT_POOL:
            raise bad_request("Default Pool can't be deleted")
        if name not in pool_slots(self.control.instance()):
            raise not_found(None, f"Pool with name:'{name}' not found")
        self._remove_pool(name)

    def _pool(self, name: str) -> dict[str, Any]:
        for shown in self._pools():
            if shown["name"] == name:
                return shown
        raise not_found(None, f"Pool with name:'{name}' not found")

    def _pools(self) -> list[dict[str, Any]]:
        running = tasks_by_pool(self.control, RUNNING)
        scheduled = tasks_by_pool(self.control, SCHEDULED)
        known = self._store().pools()
        slots = {DEFAULT_POOL: DEFAULT_SLOTS, **pool_slots(self.control.instance())}
        return [
            _show_pool(name, limit, known.get(name), running.get(name, 0), scheduled.get(name, 0))
            for name, limit in slots.items()
        ]

    def _write_pool(self, name: str, slots: int, info: PoolInfo) -> None:
        try:
            set_pool(self.control.instance(), name, slots)
        except ValueError as error:
            raise bad_request(str(error)) from None
        self._store().put_pool(name, info)

    def _remove_pool(self, name: str) -> None:
        delete_pool(self.control.instance(), name)
        self._store().delete_pool(name)


def _show_connection(connection: Connection, *, with_extra: bool = True) -> dict[str, Any]:
    shown: dict[str, Any] = {
        "connection_id": connection.conn_id,
        "conn_type": connection.conn_type,
        "description": connection.description,
        "host": connection.host,
        "login": connection.login,
        "schema": connection.schema,
        "port": connection.port,
    }
    if with_extra:
        shown["extra"] = connection.extra
    return shown


def _read_connection(body: Body, current: Connection) -> Connection:
    values: dict[str, Any] = {}
    for name in ("conn_type", "description", "host", "login", "schema", "password", "extra"):
        if name in body.values:
            values[name] = body.text(name)
    if "port" in body.values:
        values["port"] = body.integer("port")
    if values.get("conn_type") is None:
        values.pop("conn_type", None)
    return replace(current, **values)


def _read_variable(body: Body) -> tuple[str, str, str | None]:
    title = "Invalid Variable schema"
    missing = {
        name: ["Missing data for required field."] for name in ("key", "value") if body.values.get(name) is None
    }  # fmt: skip
    if missing:
        raise bad_request(str(missing), title)
    key, value, description = body.text("key") or "", body.text("value") or "", body.text("description")
    if not key or len(key) > 250:
        raise bad_request(str({"key": ["Length must be between 1 and 250."]}), title)
    if any("\x00" in text for text in (key, value, description or "")):
        raise bad_request("A text holds a NUL character, which no database takes", title)
    return key, value, description


def _required(values: Mapping[str, Any]) -> None:
    missing = sorted({"name", "slots"} - set(values))
    if missing:
        raise bad_request(f"Missing required property(ies): {missing}")


def _read_pool(body: Body) -> tuple[str, int, PoolInfo]:
    read_only = {name: ["Unknown field."] for name in _POOL_READ_ONLY if name in body.values}
    if read_only:
        raise bad_request(str(read_only))
    name, slots = body.text("name") or "", body.integer("slots")
    if not name or len(name) > 250 or "\x00" in name:
        raise bad_request(str({"name": ["Length must be between 1 and 250."]}))
    if slots is None:
        raise bad_request(str({"slots": ["Field may not be null."]}))
    description = body.text("description") or ""
    if "\x00" in description:
        raise bad_request("A text holds a NUL character, which no database takes")
    return name, slots, PoolInfo(description, body.boolean("include_deferred"))


def _show_pool(name: str, slots: int, info: PoolInfo | None, running: int, scheduled: int) -> dict[str, Any]:
    return {
        "name": name,
        "slots": slots,
        "occupied_slots": running,
        "running_slots": running,
        "queued_slots": 0,
        "scheduled_slots": scheduled,
        "open_slots": max(0, slots - running),
        "deferred_slots": 0,
        "description": (info.description if info else "Steps without a pool" if name == DEFAULT_POOL else None),
        "include_deferred": info.include_deferred if info else False,
    }


def _masked_update(mask: Sequence[str], values: Mapping[str, Any], fixed: Sequence[str]) -> dict[str, Any]:
    found = {}
    for name in (part.strip() for part in mask):
        if name not in values or name in fixed:
            raise bad_request(f"'{name}' is unknown or cannot be updated.")
        found[name] = values[name]
    return found
