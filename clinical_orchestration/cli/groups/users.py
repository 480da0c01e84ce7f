"""``airflow users`` and ``roles``, and ``clinical users``: the same work under both."""

from __future__ import annotations

import argparse
import getpass
import itertools
import json
import os
import secrets
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clinical_orchestration.cli import deployment
from clinical_orchestration.cli.command import OUTPUT, VERBOSE, Arg, Command, CommandError, Group
from clinical_orchestration.cli.output import say, show, warn

if TYPE_CHECKING:
    from clinical_orchestration.users.store import User, UserStore

Rows = list[dict[str, Any]]

NEW_PASSWORD_VARIABLE = "CLINICAL_NEW_PASSWORD"  # noqa: S105 - a name
_RANDOM_CHARACTERS = 20


def store() -> UserStore:
    """Return the users of the deployment.

    Raises:
        CommandError: the environment names no database.
    """
    from clinical_orchestration.users.store import UserStore

    return UserStore(deployment.url())


def list_users(args: argparse.Namespace) -> Rows:
    """Return all users."""
    return [
        {
            "id": user.id,
            "username": user.username,
            "email": user.email,
            "first_name": user.first_name,
            "last_name": user.last_name,
            "roles": list(user.roles),
        }
        for user in store().users()
    ]


def create(args: argparse.Namespace) -> str:
    """Add a user; one that exists stays as it is, which is no failure, as in Airflow."""
    from clinical_orchestration.users.store import TakenError

    users = store()
    _known_role(users, args.role)
    if any(user.username.lower() == args.username.lower() for user in users.users()):
        return f"{args.username} already exist in the db"
    email = args.email or f"{args.username}@localhost"
    names = {"first_name": args.firstname or "", "last_name": args.lastname or ""}
    try:
        users.create_user(args.username, _password(args), [args.role], email=email, **names)
    except TakenError as error:
        raise CommandError(f"Failed to create user: {error}") from None
    except ValueError as error:
        raise CommandError(str(error)) from None
    return f'User "{args.username}" created with role "{args.role}"'


def delete(args: argparse.Namespace) -> str:
    """Remove a user."""
    users = store()
    user = _find(users, args)
    users.delete_user(user.username)
    return f'User "{user.username}" deleted'


def reset_password(args: argparse.Namespace) -> str:
    """Give a user another password; its sessions end."""
    users = store()
    user = _find(users, args)
    try:
        users.change_user(user.username, password=_password(args))
    except ValueError as error:
        raise CommandError(str(error)) from None
    return f'User "{user.username}" password reset successfully'


def add_role(args: argparse.Namespace) -> str:
    """Give a user one more role."""
    users = store()
    user = _find(users, args)
    _known_role(users, args.role)
    if args.role in user.roles:
        raise CommandError(f'User "{user.username}" is already a member of role "{args.role}"')
    users.change_user(user.username, roles=[*user.roles, args.role])
    return f'User "{user.username}" added to role "{args.role}"'


def remove_role(args: argparse.Namespace) -> str:
    """Take a role from a user."""
    users = store()
    user = _find(users, args)
    _known_role(users, args.role)
    if args.role not in user.roles:
        raise CommandError(f'User "{user.username}" is not a member of role "{args.role}"')
    users.change_user(user.username, roles=[role for role in user.roles if role != args.role])
    return f'User "{user.username}" removed from role "{args.role}"'


def set_roles(args: argparse.Namespace) -> str:
    """Give a user exactly these roles."""
    users = store()
    for role in args.roles:
        _known_role(users, role)
    user = users.change_user(_find(users, args).username, roles=args.roles)
    return f'User "{user.username}" has the roles {", ".join(user.roles) or "none"}'


def export_users(args: argparse.Namespace) -> str:
    """Write all users to a JSON file, without their passwords."""
    rows = [{name.replace("_", ""): value for name, value in row.items()} for row in list_users(args)]
    _write_json(args.file, rows, sort_keys=True, indent=4)
    return f"{len(rows)} users successfully exported to {args.file}"


def import_users(args: argparse.Namespace) -> str:
    """Add or change users as a JSON file has them, all or none; who is new has no password that anybody knows."""
    from clinical_orchestration.users.store import TakenError

    rows = [_user_row(place, row) for place, row in enumerate(_read_json(args.file))]
    users = store()
    there = {user.email.lower(): user for user in users.users()}
    for row in rows:
        for role in row["roles"]:
            _known_role(users, role)
        known = there.get(row["email"].lower())
        if known is not None and known.username.lower() != row["username"].lower():
            raise CommandError(
                "Error: Changing the username is not allowed - please delete and recreate the user with email "
                f"{row['email']!r}"
            )
    created, updated = [], []
    for row in rows:
        names = {"first_name": row["firstname"], "last_name": row["lastname"]}
        try:
            if row["email"].lower() in there:
                users.change_user(row["username"], roles=row["roles"], **names)
                updated.append(row["email"])
            else:
                password = secrets.token_urlsafe(_RANDOM_CHARACTERS)
                users.create_user(row["username"], password, row["roles"], email=row["email"], **names)
                created.append(row["email"])
        except (TakenError, ValueError) as error:
            raise CommandError(f"Error: {row['email']}: {error}") from None
    said = []
    if created:
        said.append("\n\t".join(["Created the following users:", *created]))
        warn("Who is new logs in after: airflow users reset-password -u NAME")
    if updated:
        said.append("\n\t".join(["Updated the following users:", *updated]))
    return "\n".join(said) or "There are no users in the file"


def _user_row(place: int, row: Any) -> dict[str, Any]:
    names = ("username", "email", "firstname", "lastname")
    wrong = {}
    if not isinstance(row, dict):
        wrong["_schema"] = ["Invalid input type."]
    else:
        wrong = {name: ["Not a valid string."] for name in names if not isinstance(row.get(name), str)}
        roles = row.get("roles")
        if not (isinstance(roles, list) and all(isinstance(role, str) for role in roles)):
            wrong["roles"] = ["Not a valid list of names."]
    if wrong:
        lines = [f"[Item {place}]", *(f"\t{name}: {said}" for name, said in wrong.items())]
        raise CommandError("\n".join(["Error: Input file didn't pass validation. See below:", *lines]))
    return dict(row)


def _read_json(file: str) -> list[Any]:
    try:
        found = json.loads(Path(file).expanduser().read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CommandError(f"File '{file}' does not exist") from None
    except ValueError as error:
        raise CommandError(f"File '{file}' is not valid JSON. Error: {error}") from None
    except OSError as error:
        raise CommandError(f"File '{file}' cannot be read: {error.strerror}") from None
    if not isinstance(found, list):
        raise CommandError(f"File '{file}' is not a JSON list")
    return found


def _write_json(file: str, rows: Rows, **style: Any) -> None:
    try:
        Path(file).expanduser().write_text(json.dumps(rows, **style), encoding="utf-8")
    except OSError as error:
        raise CommandError(f"{file} cannot be written: {error.strerror}") from None


def list_roles(args: argparse.Namespace) -> Rows:
    """Return all roles; with ``--permission`` a row for each resource, with its actions."""
    if not args.permission:
        return [{"name": role.name} for role in sorted(store().roles(), key=lambda role: role.name)]
    return _permission_rows()


def _permission_rows() -> Rows:
    rows = []
    for role in sorted(store().roles(), key=lambda role: role.name):
        for resource in sorted({resource for _, resource in role.permissions}):
            actions = sorted(action for action, of in role.permissions if of == resource)
            rows.append({"name": role.name, "resource": resource, "action": ",".join(actions)})
    return rows


def create_roles(args: argparse.Namespace) -> str:
    """Add roles that permit nothing yet; those that exist stay as they are, as in Airflow."""
    users = store()
    there = {role.name for role in users.roles()}
    for name in args.role:
        if name not in there:
            users.create_role(name)
    return f"Added {len(args.role)} role(s)"


def delete_roles(args: argparse.Namespace) -> str:
    """Remove roles."""
    from clinical_orchestration.users.store import BuiltInRoleError

    users = store()
    there = {role.name for role in users.roles()}
    for name in args.role:
        if name not in there:
            raise CommandError(f"Role named '{name}' does not exist")
    try:
        for name in args.role:
            users.delete_role(name)
    except BuiltInRoleError as error:
        raise CommandError(str(error)) from None
    return f"Deleted {len(args.role)} role(s)"


def add_permissions(args: argparse.Namespace) -> str:
    """Let roles do what each pair of a resource and an action says."""
    return _change_permissions(args, add=True)


def remove_permissions(args: argparse.Namespace) -> str:
    """Take from roles what each pair of a resource and an action says; without actions all that a resource has."""
    return _change_permissions(args, add=False)


def _change_permissions(args: argparse.Namespace, *, add: bool) -> str:
    from clinical_orchestration.users.roles import ACTIONS, RESOURCES
    from clinical_orchestration.users.store import BuiltInRoleError

    users = store()
    roles = {role.name: set(role.permissions) for role in users.roles()}
    for kind, given, known in (
        ("Role", args.role, roles), ("Resource", args.resource, RESOURCES), ("Action", args.action or (), ACTIONS),
    ):  # fmt: skip
        unknown = [name for name in given if name not in known]
        if unknown:
            raise CommandError(f"{kind} named '{unknown[0]}' does not exist")
    count, lines = 0, []
    for name in dict.fromkeys(args.role):
        wanted = set(itertools.product(args.action if add or args.action else ACTIONS, args.resource))
        changed = wanted - roles[name] if add else wanted & roles[name]
        if not changed:
            continue
        try:
            users.change_role(name, permissions=roles[name] | changed if add else roles[name] - changed)
        except BuiltInRoleError as error:
            raise CommandError(str(error)) from None
        count += len(changed)
        word, link = ("Added", "to") if add else ("Deleted", "from")
        lines += [
            f"{word} {action.replace('_', ' ')} on {resource} {link} role {name}"
            for action, resource in sorted(changed, key=lambda pair: (pair[1], pair[0]))
        ]
    return "\n".join([*lines, f"{'Added' if add else 'Deleted'} {count} permission(s)"])


def export_roles(args: argparse.Namespace) -> str:
    """Write all roles with what they permit to a JSON file."""
    rows = _permission_rows()
    _write_json(args.file, rows, indent=4 if args.pretty else None)
    roles = len({row["name"] for row in rows})
    return f"{roles} roles with {len(rows)} linked permissions successfully exported to {args.file}"


def import_roles(args: argparse.Namespace) -> str:
    """Add the roles of a JSON file with what they permit; those that exist stay as they are, as in Airflow."""
    from clinical_orchestration.users.roles import ACTIONS, RESOURCES

    found: dict[str, set[tuple[str, str]]] = {}
    for place, row in enumerate(_read_json(args.file)):
        if not isinstance(row, dict) or not all(
            isinstance(row.get(name, ""), str) for name in ("name", "resource", "action")
        ):  # fmt: skip
            raise CommandError(f"Item {place} of '{args.file}' is no object with name, resource and action as texts")
        if not row.get("name"):
            raise CommandError(f"Item {place} of '{args.file}' names no role")
        resource, actions = row.get("resource", ""), [one for one in row.get("action", "").split(",") if one]
        permissions = found.setdefault(row["name"], set())
        if not resource or not actions:
            continue
        if resource not in RESOURCES:
            raise CommandError(f"Resource named '{resource}' does not exist")
        unknown = [action for action in actions if action not in ACTIONS]
        if unknown:
            raise CommandError(f"Action named '{unknown[0]}' does not exist")
        permissions |= {(action, resource) for action in actions}
    users = store()
    there = {role.name for role in users.roles()}
    for name, permissions in found.items():
        if name not in there:
            users.create_role(name, permissions)
    return "roles and permissions successfully imported"


def tokens(args: argparse.Namespace) -> str | Rows:
    """Add, list or end bearer tokens."""
    users = store()
    if args.action == "list":
        return [
            {
                "id": token.id, "username": token.username, "name": token.name,
                "created_at": token.created_at.isoformat(timespec="seconds"),
                "expires_at": token.expires_at.isoformat(timespec="seconds") if token.expires_at else None,
            }
            for token in users.tokens(args.subject)
        ]  # fmt: skip
    if args.action == "revoke":
        if not (args.subject or "").isdigit() or not users.revoke_token(int(args.subject)):
            raise CommandError(f"There is no token {args.subject}; `clinical users token list` has their numbers")
        return f"Token {args.subject} revoked"
    if not args.subject:
        raise CommandError("Whose token? clinical users token create NAME")
    args.username, args.email = args.subject, None
    lifetime = timedelta(days=args.days) if args.days else None
    secret, token = users.create_token(_find(users, args).username, args.name, lifetime)
    warn(f"Token {token.id} of {token.username}; it is shown this once:")
    return secret


def _find(users: UserStore, args: argparse.Namespace) -> User:
    email = getattr(args, "email", None)
    if not args.username and not email:
        raise CommandError("Missing args: must supply one of --username or --email")
    if args.username and email:
        raise CommandError("Conflicting args: must supply either --username or --email, but not both")
    wanted = str(args.username or email).lower()
    for user in users.users():
        if (user.username if args.username else user.email).lower() == wanted:
            return user
    raise CommandError(f'User "{args.username or email}" does not exist')


def _known_role(users: UserStore, role: str) -> None:
    known = [one.name for one in users.roles()]
    if role not in known:
        raise CommandError(f"{role} is not a valid role. Valid roles are: {known}")


def _password(args: argparse.Namespace) -> str:
    if args.use_random_password:
        password = secrets.token_urlsafe(_RANDOM_CHARACTERS)
        warn(f"The password, shown this once: {password}")
        return password
    given = args.password or os.environ.get(NEW_PASSWORD_VARIABLE, "")
    if given:
        return str(given)
    if not sys.stdin.isatty():
        raise CommandError(
            f"There is no password: use --password, --use-random-password, {NEW_PASSWORD_VARIABLE}, or a terminal"
        )
    password = getpass.getpass("Password:")
    if password != getpass.getpass("Repeat for confirmation:"):
        raise CommandError("Passwords did not match")
    return password


def _saying(work: Callable[[argparse.Namespace], str]) -> Callable[[argparse.Namespace], None]:
    return lambda args: say(work(args))


def _showing(read: Callable[[argparse.Namespace], Rows]) -> Callable[[argparse.Namespace], None]:
    return lambda args: show(read(args), args.output)


_ROLES = "Role of the user. Existing roles include Admin, User, Op, Viewer, and Public"
USERNAME = Arg("-u", "--username", help="Username of the user", required=True)
USERNAME_OPTIONAL = Arg("-u", "--username", help="Username of the user")
EMAIL = Arg("-e", "--email", help="Email of the user", required=True)
EMAIL_OPTIONAL = Arg("-e", "--email", help="Email of the user")
FIRSTNAME = Arg("-f", "--firstname", help="First name of the user", required=True)
LASTNAME = Arg("-l", "--lastname", help="Last name of the user", required=True)
ROLE = Arg("-r", "--role", help=_ROLES, required=True)
PASSWORD = Arg("-p", "--password", help="Password of the user; other users of this machine may see it")
RANDOM = Arg(
    "--use-random-password", help="Do not prompt for password. Use random string instead.", action="store_true"
)
ROLE_NAMES = Arg("role", help="The name of a role", nargs="*")
RESOURCE_NAMES = Arg("-r", "--resource", help="The name of permissions, such as `DAG Runs`", nargs="*", required=True)
_ACTIONS = "The action of permissions: can_create, can_read, can_edit, can_delete, menu_access"
PERMISSION = Arg("-p", "--permission", help="Show role permissions", action="store_true")
NAME = Arg("username", metavar="NAME", help="User name")

USERS = Group(
    "users",
    "Manage users",
    (
        Command("list", "List users", _showing(list_users), (OUTPUT, VERBOSE)),
        Command(
            "create", "Create a user", _saying(create),
            (ROLE, USERNAME, EMAIL, FIRSTNAME, LASTNAME, PASSWORD, RANDOM, VERBOSE),
        ),
        Command(
            "reset-password", "Reset a user's password", _saying(reset_password),
            (USERNAME_OPTIONAL, EMAIL_OPTIONAL, PASSWORD, RANDOM, VERBOSE),
        ),
        Command("delete", "Delete a user", _saying(delete), (USERNAME_OPTIONAL, EMAIL_OPTIONAL, VERBOSE)),
        Command(
            "add-role", "Add role to a user", _saying(add_role), (USERNAME_OPTIONAL, EMAIL_OPTIONAL, ROLE, VERBOSE)
        ),
        Command(
            "remove-role", "Remove role from a user", _saying(remove_role),
            (USERNAME_OPTIONAL, EMAIL_OPTIONAL, ROLE, VERBOSE),
        ),
        Command("import", "Import users", _saying(import_users), (
            Arg("file", metavar="FILEPATH", help="Import users from JSON file: a list of objects with username, email, "
                "firstname, lastname and roles"), VERBOSE,
        )),
        Command("export", "Export all users", _saying(export_users),
                (Arg("file", metavar="FILEPATH", help="Export all users to JSON file"), VERBOSE)),
    ),
)  # fmt: skip
ROLES = Group(
    "roles",
    "Manage roles",
    (
        Command("list", "List roles", _showing(list_roles), (PERMISSION, OUTPUT, VERBOSE)),
        Command("create", "Create role", _saying(create_roles), (ROLE_NAMES, VERBOSE)),
        Command("delete", "Delete role", _saying(delete_roles), (ROLE_NAMES, VERBOSE)),
        Command(
            "add-perms", "Add roles permissions", _saying(add_permissions),
            (ROLE_NAMES, RESOURCE_NAMES, Arg("-a", "--action", help=_ACTIONS, nargs="*", required=True), VERBOSE),
        ),
        Command(
            "del-perms", "Delete roles permissions", _saying(remove_permissions),
            (ROLE_NAMES, RESOURCE_NAMES, Arg("-a", "--action", help=_ACTIONS, nargs="*"), VERBOSE),
        ),
        Command(
            "export", "Export roles and their permissions to JSON file", _saying(export_roles),
            (Arg("file", help="Export all roles to JSON file"),
             Arg("-p", "--pretty", help="Format output JSON file by indenting", action="store_true"), VERBOSE),
        ),
        Command("import", "Import roles and their permissions from JSON file", _saying(import_roles),
                (Arg("file", help="Import roles from JSON file"), VERBOSE)),
    ),
)  # fmt: skip

CLINICAL: tuple[tuple[str, str, Callable[[argparse.Namespace], str | Rows], tuple[Arg, ...]], ...] = (
    ("list", "users and their roles", list_users, ()),
    (
        "create", "add a user", create,
        (NAME, Arg("-r", "--role", help=_ROLES, default="Viewer"), EMAIL_OPTIONAL,
         Arg("-f", "--firstname", help="first name"), Arg("-l", "--lastname", help="last name"), PASSWORD, RANDOM),
    ),
    ("delete", "remove a user", delete, (NAME,)),
    ("password", "give a user another password; its sessions end", reset_password, (NAME, PASSWORD, RANDOM)),
    (
        "roles", "give a user exactly these roles", set_roles,
        (NAME, Arg("roles", nargs="+", metavar="ROLE", help=_ROLES)),
    ),
    (
        "token", "bearer tokens: create NAME, list [NAME], revoke NUMBER", tokens,
        (Arg("action", choices=("create", "list", "revoke")), Arg("subject", nargs="?", metavar="NAME|NUMBER"),
         Arg("--name", default="", help="with create: what it is for"),
         Arg("--days", type=float, help="with create: days until it ends (default: it does not)")),
    ),
)  # fmt: skip
"""Name, help, work and arguments of the commands of ``clinical users``."""
