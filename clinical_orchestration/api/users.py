"""Users, roles and permissions, as Airflow's FAB provider answers them."""

from __future__ import annotations

from typing import Any

from clinical_orchestration.api.call import Body, Call, show_time
from clinical_orchestration.api.problems import Problem, bad_request, conflict, not_found
from clinical_orchestration.users.passwords import LONGEST_PASSWORD
from clinical_orchestration.users.roles import ACTIONS, PUBLIC, RESOURCES, Permission
from clinical_orchestration.users.store import (
    BuiltInRoleError,
    Role,
    TakenError,
    UnknownRoleError,
    UnknownUserError,
    UnusableNameError,
    User,
    UserStore,
)

_USER_FIELDS = ("first_name", "last_name", "username", "email", "roles", "password")
_LENGTHS = {"first_name": 256, "last_name": 256, "username": 512, "email": 512, "password": LONGEST_PASSWORD}
_NOT_EMPTY = ("username", "email", "password")
_USER_ORDERS = {
    "id": "id", "user_id": "id", "first_name": "first_name", "last_name": "last_name", "user_name": "username",
    "username": "username", "email": "email", "is_active": "active", "role": "roles",
}  # fmt: skip


class UserRoutes:
    """Handlers named by Airflow's operation ids.

    Args:
        store: of the users; None without a database.
    """

    def __init__(self, store: UserStore | None) -> None:
        self._users = store

    # --- users ------------------------------------------------------------------------------------------------------

    def get_users(self, call: Call) -> dict[str, Any]:
        """``GET /users``."""
        limit, offset = call.page()
        order = call.order(tuple(_USER_ORDERS), "id")
        attribute = _USER_ORDERS[order.lstrip("-")]
        found = sorted(
            self._store.users(), key=lambda user: (getattr(user, attribute), user.id), reverse=order.startswith("-")
        )
        return {"users": [_show_user(user) for user in found[offset : offset + limit]], "total_entries": len(found)}

    def get_user(self, call: Call) -> dict[str, Any]:
        """``GET /users/{username}``."""
        return _show_user(self._user(call))

    def post_user(self, call: Call) -> dict[str, Any]:
        """``POST /users``."""
        values = _read_user(call.body(), required=("first_name", "last_name", "username", "email", "password"))
        roles = values.pop("roles", None) or [PUBLIC]
        try:
            return _show_user(self._store.create_user(roles=roles, **values))
        except TakenError as error:
            raise conflict(
                f"Username `{values['username']}` already exists. Use PATCH to update."
                if error.field == "username"
                else f"The email `{values['email']}` is already taken."
            ) from None
        except (UnknownRoleError, UnusableNameError) as error:
            raise bad_request(str(error)) from None

    def patch_user(self, call: Call) -> dict[str, Any]:
        """``PATCH /users/{username}``; a new password ends the user's sessions."""
        values = _read_user(call.body(), required=("first_name", "last_name", "username", "email"))
        user = self._user(call)
        mask = [part.strip() for part in call.texts("update_mask")]
        unknown = [part for part in mask if part not in values]
        if unknown:
            raise bad_request(f"Unknown update masks: {', '.join(repr(part) for part in unknown)}")
        if mask:
            values = {part: values[part] for part in mask}
        if "username" in values:
            values["new_username"] = values.pop("username")
        try:
            return _show_user(self._store.change_user(user.username, **values))
        except TakenError as error:
            given = values["new_username" if error.field == "username" else "email"]
            raise conflict(f"The {error.field} `{given}` already exists") from None
        except (UnknownRoleError, UnusableNameError) as error:
            raise bad_request(str(error)) from None

    def delete_user(self, call: Call) -> None:
        """``DELETE /users/{username}``."""
        self._store.delete_user(self._user(call).username)

    # --- roles and permissions --------------------------------------------------------------------------------------

    def get_roles(self, call: Call) -> dict[str, Any]:
        """``GET /roles``."""
        limit, offset = call.page()
        order = call.order(("name", "role_id"), "name")
        attribute = {"role_id": "id"}.get(order.lstrip("-"), "name")
        found = sorted(
            self._store.roles(), key=lambda role: (getattr(role, attribute), role.id), reverse=order.startswith("-")
        )
        return {"roles": [_show_role(role) for role in found[offset : offset + limit]], "total_entries": len(found)}

    def get_role(self, call: Call) -> dict[str, Any]:
        """``GET /roles/{role_name}``."""
        return _show_role(self._role(call))

    def post_role(self, call: Call) -> dict[str, Any]:
        """``POST /roles``."""
        name, permissions = _read_role(Body(call.body(), ("name", "actions")))
        if name is None:
            raise bad_request(str({"name": ["Missing data for required field."]}))
        try:
            return _show_role(self._store.create_role(name, permissions or ()))
        except TakenError:
            # Airflow's document has no 409 for this operation, and clients are made from it
            raise bad_request(
                f"Role with name {name!r} already exists; please update with the PATCH endpoint"
            ) from None

    def patch_role(self, call: Call) -> dict[str, Any]:
        """``PATCH /roles/{role_name}``; Airflow's own roles stay as they are."""
        body = Body(call.body(), ("name", "actions"))
        new_name, permissions = _read_role(body)
        if new_name is None:
            raise bad_request(str({"name": ["Missing data for required field."]}))
        role = self._role(call)
        mask = [part.strip() for part in call.texts("update_mask")]
        unknown = [part for part in mask if part not in body.values]
        if unknown:
            raise bad_request(f"'{unknown[0]}' in update_mask is unknown")
        if mask:
            new_name = new_name if "name" in mask else None
            permissions = permissions if "actions" in mask else None
        try:
            return _show_role(self._store.change_role(role.name, new_name=new_name, permissions=permissions))
        except BuiltInRoleError as error:
            raise bad_request(str(error)) from None
        except TakenError:
            raise bad_request(f"Role with name {new_name!r} already exists") from None

    def delete_role(self, call: Call) -> None:
        """``DELETE /roles/{role_name}``; Airflow's own roles stay as they are."""
        try:
            self._store.delete_role(self._role(call).name)
        except BuiltInRoleError as error:
            raise bad_request(str(error)) from None

    def get_permissions(self, call: Call) -> dict[str, Any]:
        """``GET /permissions``: the actions that there are."""
        limit, offset = call.page()
        actions = [{"name": action} for action in ACTIONS]
        return {"actions": actions[offset : offset + limit], "total_entries": len(actions)}

    @property
    def _store(self) -> UserStore:
        if self._users is None:
            raise Problem(503, "Users need the platform's database: POSTGRES_URL is not set.")
        return self._users

    def _user(self, call: Call) -> User:
        name = call.path["username"]
        try:
            return self._store.user(name)
        except UnknownUserError:
            raise not_found("User not found", f"The User with username `{name}` was not found") from None

    def _role(self, call: Call) -> Role:
        name = call.path["role_name"]
        try:
            return self._store.role(name)
        except UnknownRoleError:
            raise not_found("Role not found", f"Role with name {name!r} was not found") from None


def _show_user(user: User) -> dict[str, Any]:
    return {
        "first_name": user.first_name,
        "last_name": user.last_name,
        "username": user.username,
        "email": user.email,
        "active": user.active,
        "last_login": show_time(user.last_login),
        "login_count": user.login_count,
        "failed_login_count": user.failed_login_count,
        "fail_login_count": user.failed_login_count,  # what Airflow's server calls it, other than its document
        "roles": [{"name": role} for role in user.roles],
        "created_on": show_time(user.created_on),
        "changed_on": show_time(user.changed_on),
    }


def _read_user(values: dict[str, Any], required: tuple[str, ...]) -> dict[str, Any]:
    """Return what the body gives, with the names of roles."""
    body = Body(values, _USER_FIELDS)
    missing = {name: ["Missing data for required field."] for name in required if name not in values}
    missing |= {
        name: ["Field may not be null."] for name in _USER_FIELDS if name in values and values[name] is None
    }  # fmt: skip
    if missing:
        raise bad_request(str(missing))
    found: dict[str, Any] = {}
    for name, longest in _LENGTHS.items():
        text = body.text(name)
        if text is None:
            continue
        shortest = int(name in _NOT_EMPTY)
        if not shortest <= len(text) <= longest:
            raise bad_request(str({name: [f"Length must be between {shortest} and {longest}."]}))
        found[name] = text
    if "roles" in values:
        found["roles"] = [_name_of(role, "roles") for role in _list(values["roles"], "roles")]
    return found


def _show_role(role: Role) -> dict[str, Any]:
    return {
        "name": role.name,
        "actions": [
            {"action": {"name": action}, "resource": {"name": resource}}
            for action, resource in sorted(role.permissions, key=lambda pair: (pair[1], pair[0]))
        ],
    }


def _read_role(body: Body) -> tuple[str | None, list[Permission] | None]:
    name = body.text("name")
    if name is not None and not 1 <= len(name) <= 64:
        raise bad_request(str({"name": ["Length must be between 1 and 64."]}))
    if body.values.get("actions") is None:
        return name, None
    permissions: list[Permission] = []
    for item in _list(body.values["actions"], "actions"):
        if not isinstance(item, dict):
            raise bad_request(str({"actions": ["Invalid type."]}))
        action, resource = _name_of(item.get("action"), "action"), _name_of(item.get("resource"), "resource")
        if action not in ACTIONS:
            raise bad_request(f"The specified action: {action!r} was not found")
        if resource not in RESOURCES:
            raise bad_request(f"The specified resource: {resource!r} was not found")
        permissions.append((action, resource))
    return name, permissions


def _list(value: Any, name: str) -> list[Any]:
    if not isinstance(value, list):
        raise bad_request(str({name: ["Not a valid list."]}))
    return value


def _name_of(value: Any, field: str) -> str:
    """Return the name of ``{"name": ...}``."""
    if not isinstance(value, dict) or not isinstance(value.get("name"), str) or set(value) != {"name"}:
        raise bad_request(str({field: ["Must be an object with a name."]}))
    return str(value["name"])
