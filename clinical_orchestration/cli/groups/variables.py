"""``airflow variables``."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from clinical_orchestration.cli import deployment
from clinical_orchestration.cli.command import OUTPUT, VERBOSE, Arg, Command, CommandError, Group
from clinical_orchestration.cli.output import export, is_stream, say, show, warn

KEY = Arg("key", help="Variable key")
VALUE = Arg("value", metavar="VALUE", help="Variable value")
DESCRIPTION = Arg("--description", help="Variable description, optional when setting a variable")
DEFAULT = Arg("-d", "--default", metavar="VAL", help="Default value returned if variable does not exist")
DESERIALIZE = Arg("-j", "--json", help="Deserialize JSON variable", action="store_true")
SERIALIZE = Arg("-j", "--json", help="Serialize JSON variable", action="store_true")
IMPORT = Arg("file", help="Import variables from a JSON, YAML or .env file")
EXPORT = Arg("file", help="Export all variables to JSON file")
ON_EXISTING = Arg(
    "-a",
    "--action-on-existing-key",
    help="Action to take if we encounter a variable key that already exists.",
    default="overwrite",
    choices=("overwrite", "fail", "skip"),
)


def _list(args: argparse.Namespace) -> None:
    show([{"key": key} for key in deployment.store().variables()], args.output)


def _get(args: argparse.Namespace) -> None:
    from clinical_orchestration.platform.masking import MASK, is_sensitive, mask_url, redact

    value = _acting(args.key)
    if value is None:
        if args.default is None:
            raise CommandError(f"Variable {args.key} does not exist")
        say(args.default)
        return
    if is_sensitive(args.key) and value:
        say(MASK)
        warn(f"The value of {args.key} is a secret; `airflow variables export FILE` writes it to a file of yours.")
        return
    if not args.json:
        say(mask_url(value))
        return
    try:
        say(str(redact(json.loads(value))))
    except ValueError as error:
        raise CommandError(str(error)) from None


def _acting(key: str) -> str | None:
    """Return the value that acts: of the environment, of PostgreSQL, or the platform's default."""
    from clinical_orchestration.platform.masking import MASK
    from clinical_orchestration.settings import Variables

    if key in Variables.model_fields:
        acting: Any = getattr(Variables(), key)
        if hasattr(acting, "get_secret_value"):
            acting = acting.get_secret_value()
        return f"{acting:g}" if isinstance(acting, float) else str(acting)
    stored = deployment.store().variables().get(key)
    if stored is None:
        return None
    return MASK if stored.is_encrypted else stored.value()


def _set(args: argparse.Namespace) -> None:
    value = json.dumps(args.value, indent=2) if args.json else args.value
    _check(args.key, value)
    deployment.store().set_variable(args.key, value, args.description)
    say(f"Variable {args.key} created")


def _check(key: str, value: str) -> None:
    from clinical_orchestration.platform.connection import ConnectionFormatError, validate_key
    from clinical_orchestration.settings import Variables

    try:
        validate_key(key)
    except ConnectionFormatError as error:
        raise CommandError(f"Variable was not set. {error}") from None
    reason = Variables.check(key, value)
    if reason:
        raise CommandError(f"Variable {key} was not set. {reason}")


def _delete(args: argparse.Namespace) -> None:
    deployment.store().delete_variable(args.key)
    say(f"Variable {args.key} deleted")


def _import(args: argparse.Namespace) -> None:
    from clinical_orchestration.platform.crypto import SecretKeyError
    from clinical_orchestration.platform.files import ImportFileError, is_masked_variable, read_variables

    path = Path(args.file)
    if not path.exists():
        raise CommandError("Missing variables file.")
    try:
        writes = read_variables(path)
    except ImportFileError as error:
        raise CommandError(f"Invalid variables file. {error}") from None
    store = deployment.store()
    action = args.action_on_existing_key
    existing: set[str] = set()
    if action != "overwrite":
        # what the platform wrote itself gives way to a user's value
        existing = {key for key, row in store.variables().items() if key in writes and not row.is_default}
    if action == "fail" and existing:
        raise CommandError(f"Failed. These keys: {sorted(existing)} already exists.")
    done = failed = 0
    skipped = []
    for key, write in writes.items():
        if key in existing or is_masked_variable(write):
            skipped.append(key)
            continue
        try:
            _check(key, write.value)
            store.set_variable(key, write.value, write.description)
        except (CommandError, SecretKeyError) as error:
            say(f"Variable import failed: {error}")
            failed += 1
        else:
            done += 1
    say(f"{done} of {len(writes)} variables successfully updated.")
    if failed:
        say(f"{failed} variable(s) failed to be updated.")
    if kept := sorted(key for key in skipped if key in existing):
        say(f"The variables with these keys: {kept} were skipped because they already exists")
    if masked := sorted(key for key in skipped if key not in existing):
        say(f"The variables with these keys: {masked} were skipped because their values are masked in the file")


def _export(args: argparse.Namespace) -> None:
    from clinical_orchestration.platform.masking import MASK, is_sensitive, redact

    masked = is_stream(args.file)
    found: dict[str, Any] = {}
    for key, row in deployment.store().variables().items():
        if masked and is_sensitive(key) and row.raw:
            found[key] = MASK
        else:
            value = _decoded(row.value())
            found[key] = redact(value) if masked else value
    export(json.dumps(found, sort_keys=True, indent=4), args.file, len(found), "Variables")


def _decoded(text: str) -> Any:
    """Return what a text says as JSON, where an import would give the same text again."""
    try:
        value = json.loads(text)
    except ValueError:
        return text
    return value if not isinstance(value, str) and json.dumps(value, indent=2) == text else text


def _explain(args: argparse.Namespace) -> None:
    from clinical_orchestration.configuration import explain

    rows = [one.as_dict() for one in explain() if one.kind == "variable"]
    show([{name: row[name] for name in ("name", "value", "source", "setting", "note")} for row in rows], args.output)


GROUP = Group(
    "variables",
    "Manage variables",
    (
        Command("list", "List variables", _list, (OUTPUT, VERBOSE)),
        Command("get", "Get variable", _get, (KEY, DESERIALIZE, DEFAULT, VERBOSE)),
        Command("set", "Set variable", _set, (KEY, VALUE, DESCRIPTION, SERIALIZE, VERBOSE)),
        Command("delete", "Delete variable", _delete, (KEY, VERBOSE)),
        Command("import", "Import variables", _import, (IMPORT, ON_EXISTING, VERBOSE)),
        Command(
            "export",
            "Export all variables",
            _export,
            (EXPORT, VERBOSE),
            description="All variables can be exported in STDOUT using the following command:\n"
            "airflow variables export -\nSecrets are masked there; a file has them and only its owner may read it.",
        ),
        Command(
            "explain", "Show for each variable the value that acts and where it comes from", _explain, (OUTPUT, VERBOSE)
        ),
    ),
)
