"""``airflow connections``."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clinical_orchestration.cli import deployment
from clinical_orchestration.cli.command import COLOR, OUTPUT, VERBOSE, Arg, Command, CommandError, Group
from clinical_orchestration.cli.output import export, is_stream, say, show, warn

if TYPE_CHECKING:
    from clinical_orchestration.platform.connection import Connection

CONN_ID = Arg("conn_id", help="Connection id, required to get/add/delete/test a connection")
CONN_ID_FILTER = Arg("--conn-id", help="If passed, only items with the specified connection ID will be displayed")
CONN_URI = Arg("--conn-uri", help="Connection URI, required to add a connection without conn_type")
CONN_JSON = Arg("--conn-json", help="Connection JSON, required to add a connection using JSON representation")
CONN_EXTRA = Arg("--conn-extra", help="Connection `Extra` field, optional when adding a connection")
SPECS = (
    Arg("--conn-type", help="Connection type, required to add a connection without conn_uri"),
    Arg("--conn-description", help="Connection description, optional when adding a connection"),
    Arg("--conn-host", help="Connection host, optional when adding a connection"),
    Arg("--conn-login", help="Connection login, optional when adding a connection"),
    Arg("--conn-password", help="Connection password, optional when adding a connection"),
    Arg("--conn-schema", help="Connection schema, optional when adding a connection"),
    Arg("--conn-port", help="Connection port, optional when adding a connection"),
)
ALTERNATIVES = ("conn_type", "conn_host", "conn_login", "conn_password", "conn_schema", "conn_port")
IMPORT = Arg("file", help="Import connections from a file (.json, .yaml, .env)")
OVERWRITE = Arg("--overwrite", help="Overwrite existing entries if a conflict occurs", action="store_true")
EXPORT = Arg("file", help="Output file path for exporting the connections")
FORMAT = Arg(
    "--format",
    help="Deprecated -- use `--file-format` instead. File format to use for the export.",
    choices=("json", "yaml", "env"),
)
FILE_FORMAT = Arg("--file-format", help="File format for the export", choices=("json", "yaml", "env"))
SERIALIZATION = Arg(
    "--serialization-format",
    help="When exporting as `.env` format, defines how connections should be serialized. Default is `uri`.",
    type=str.lower,
    choices=("json", "uri"),
)


def _row(number: int | None, connection: Connection) -> dict[str, Any]:
    shown = connection.masked()
    return {
        "id": number,
        "conn_id": shown.conn_id,
        "conn_type": shown.conn_type,
        "description": shown.description,
        "host": shown.host,
        "schema": shown.schema,
        "login": shown.login,
        "password": shown.password,
        "port": shown.port,
        "is_encrypted": bool(connection.password),
        "is_extra_encrypted": bool(connection.extra),
        "extra_dejson": shown.extra_dejson,
        "get_uri": connection.masked_uri(),
    }


def _list(args: argparse.Namespace) -> None:
    from clinical_orchestration.platform.crypto import SecretKeyError
    from clinical_orchestration.platform.masking import MASK

    rows = []
    for conn_id, stored in deployment.store().connections().items():
        if args.conn_id and conn_id != args.conn_id:
            continue
        try:
            connection = stored.connection()
        except SecretKeyError as error:
            warn(str(error))
            connection = replace(
                stored.public,
                password=MASK if stored.raw_password else None,
                extra=MASK if stored.raw_extra else None,
            )
        rows.append(_row(stored.id, connection))
    show(rows, args.output)


def _get(args: argparse.Namespace) -> None:
    from clinical_orchestration.platform.connection import ConnectionFormatError
    from clinical_orchestration.platform.reading import environment_connection

    try:
        given = environment_connection(args.conn_id)
    except ConnectionFormatError as error:
        raise CommandError(str(error)) from None
    if given is not None:
        show([_row(None, given)], args.output)
        return
    stored = deployment.store().connections().get(args.conn_id)
    if stored is None:
        raise CommandError("Connection not found.")
    show([_row(stored.id, stored.connection())], args.output)


def _add(args: argparse.Namespace) -> None:
    from clinical_orchestration.platform.connection import (
        ID_LENGTH,
        Connection,
        ConnectionFormatError,
        validate_key,
    )

    try:
        validate_key(args.conn_id, ID_LENGTH)
    except ConnectionFormatError as error:
        raise CommandError(f"Could not create connection. {error}") from None
    if not args.conn_type and not (args.conn_json or args.conn_uri):
        raise CommandError("Must supply either conn-uri or conn-json if not supplying conn-type")
    if args.conn_json and args.conn_uri:
        raise CommandError("Cannot supply both conn-uri and conn-json")
    if args.conn_uri or args.conn_json:
        invalid = [name for name in ALTERNATIVES if getattr(args, name) is not None]
        if args.conn_json and args.conn_extra:
            invalid.append("--conn-extra")
        if invalid:
            flag = "uri" if args.conn_uri else "json"
            raise CommandError(f"The following args are not compatible with the --conn-{flag} flag: {invalid!r}")
    try:
        if args.conn_uri:
            new = Connection.from_uri(args.conn_id, args.conn_uri, args.conn_description)
        elif args.conn_json:
            new = Connection.from_json(args.conn_id, args.conn_json)
            if not new.conn_type:
                raise CommandError("conn-json is invalid; must supply conn-type")
        else:
            fields = ("description", "host", "login", "password", "schema", "port")
            given = {name: getattr(args, f"conn_{name}") for name in fields}
            new = Connection.from_mapping({"conn_type": args.conn_type, **given}, args.conn_id)
    except ConnectionFormatError as error:
        raise CommandError(f"Could not create connection. {error}") from None
    if args.conn_extra is not None:
        new = replace(new, extra=args.conn_extra or None)
    if deployment.store().put_connection(new, overwrite=False) == "exists":
        raise CommandError(f"A connection with `conn_id`={new.conn_id} already exists.")
    say(f"Successfully added `conn_id`={new.conn_id} : {_summary(new)}")


def _summary(connection: Connection) -> str:
    """Return the URI that Airflow shows after adding: without the password, and without what the extra has."""
    hidden = "******" if connection.password else ""
    address = f"{connection.login or ''}:{hidden}@{connection.host or ''}:{connection.port or ''}"
    schema = f"/{connection.schema}" if connection.schema else ""
    return f"{connection.conn_type}://{address}{schema}"


def _delete(args: argparse.Namespace) -> None:
    if not deployment.store().delete_connection(args.conn_id):
        raise CommandError(f"Did not find a connection with `conn_id`={args.conn_id}")
    say(f"Successfully deleted connection with `conn_id`={args.conn_id}")


def _import(args: argparse.Namespace) -> None:
    from clinical_orchestration.platform.connection import ID_LENGTH, ConnectionFormatError, validate_key
    from clinical_orchestration.platform.files import ImportFileError, is_masked, read_connections

    path = Path(args.file)
    if not path.exists():
        raise CommandError("Missing connections file.")
    try:
        connections = read_connections(path)
    except ImportFileError as error:
        raise CommandError(str(error)) from None
    store = deployment.store()
    for conn_id, connection in connections.items():
        try:
            validate_key(conn_id, ID_LENGTH)
        except ConnectionFormatError as error:
            say(f"Could not import connection. {error}")
            continue
        if is_masked(connection):
            say(f"Could not import connection {conn_id}: its secrets are masked in the file.")
        elif store.put_connection(connection, overwrite=args.overwrite) == "exists":
            say(f"Could not import connection {conn_id}: connection already exists.")
        else:
            say(f"Imported connection {conn_id}")


def _export(args: argparse.Namespace) -> None:
    if args.format:
        warn("Option `--format` is deprecated. Use `--file-format` instead.")
    if args.format and args.file_format:
        raise CommandError("Option `--format` is deprecated.  Use `--file-format` instead.")
    wanted = args.format or args.file_format
    masked = is_stream(args.file)
    kind = f".{wanted}" if wanted else ".json" if masked else Path(args.file).suffix.lower()
    if kind not in (".yaml", ".json", ".env"):
        raise CommandError("Unsupported file format. The file must have the extension .yaml, .json, .env.")
    if args.serialization_format and kind != ".env":
        raise CommandError("Option `--serialization-format` may only be used with file type `env`.")
    found = [stored.connection() for stored in deployment.store().connections().values()]
    if masked:
        found = [connection.masked() for connection in found]
    export(_formatted(found, kind, args.serialization_format or "uri"), args.file, len(found), "Connections")


def _formatted(connections: list[Connection], kind: str, serialization: str) -> str:
    if kind == ".env":
        lines = (
            f"{one.conn_id}={json.dumps(one.as_mapping()) if serialization == 'json' else one.uri()}\n"
            for one in connections
        )
        return "".join(lines)
    content = {one.conn_id: one.as_mapping() for one in connections}
    if kind == ".json":
        return json.dumps(content, indent=2)
    import yaml

    return yaml.safe_dump(content)


def _test(args: argparse.Namespace) -> None:
    raise CommandError(
        "\nTesting connections is disabled in Airflow configuration. Contact your deployment admin to enable it.\n"
    )


def _defaults(args: argparse.Namespace) -> None:
    from clinical_orchestration.configuration import load_defaults

    for name in load_defaults(deployment.store()):
        say(f"Stored the default {name}")


def _explain(args: argparse.Namespace) -> None:
    from clinical_orchestration.configuration import explain

    rows = [one.as_dict() for one in explain() if one.kind == "connection"]
    show(
        [
            {"conn_id": row["name"], **{name: row[name] for name in ("setting", "value", "source", "note")}}
            for row in rows
        ],
        args.output,
    )


GROUP = Group(
    "connections",
    "Manage connections",
    (
        Command("list", "List connections", _list, (OUTPUT, VERBOSE, CONN_ID_FILTER)),
        Command("get", "Get a connection", _get, (CONN_ID, COLOR, OUTPUT, VERBOSE)),
        Command("add", "Add a connection", _add, (CONN_ID, CONN_URI, CONN_JSON, CONN_EXTRA, *SPECS)),
        Command("delete", "Delete a connection", _delete, (CONN_ID, COLOR, VERBOSE)),
        Command(
            "import",
            "Import connections from a file",
            _import,
            (IMPORT, OVERWRITE, VERBOSE),
            description="Connections can be imported from the output of the export command, and from a list under\n"
            "`connections:` with id, type, host, port, login, password, schema and extra.\n"
            "The filetype must be json, yaml or env and will be automatically inferred.",
        ),
        Command(
            "export",
            "Export all connections",
            _export,
            (EXPORT, FORMAT, FILE_FORMAT, SERIALIZATION, VERBOSE),
            description="All connections can be exported in STDOUT using the following command:\n"
            "airflow connections export -\nSecrets are masked there; a file has them and only its owner may read it.\n"
            "The file format can be determined by the provided file extension.",
        ),
        Command("test", "Test a connection", _test, (CONN_ID, VERBOSE)),
        Command(
            "create-default-connections",
            "Creates the platform's default connections, variables and pools where they are absent",
            _defaults,
            (VERBOSE,),
        ),
        Command(
            "explain",
            "Show for each connection the values that act and where they come from",
            _explain,
            (OUTPUT, VERBOSE),
        ),
    ),
)
