"""Files of connections, variables and pools: Airflow's shapes, and lists under a key, as JSON, YAML or ``.env``."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clinical_orchestration.platform.connection import Connection, ConnectionFormatError, validate_key
from clinical_orchestration.platform.masking import MASK, is_sensitive
from clinical_orchestration.platform.store import PoolInfo, VariableWrite

EXTENSIONS = (".env", ".json", ".yaml", ".yml")


class ImportFileError(ValueError):
    """A file cannot be read as what it should hold. The message says where, and never holds a secret."""


@dataclass(frozen=True)
class PoolWrite:
    """A pool of a file, with its slots; -1 is without limit, as in Airflow."""

    name: str
    slots: int
    info: PoolInfo


def read_connections(path: Path) -> dict[str, Connection]:
    """Return the connections of a file by id.

    Raises:
        ImportFileError: unreadable, or a connection that is not written as it should be.
    """
    found: dict[str, Connection] = {}
    for name, value in _entries(path, "connections", ("conn_id", "id")):
        try:
            if isinstance(value, str):
                connection = (
                    Connection.from_json(name, value)
                    if value.strip().startswith("{")
                    else Connection.from_uri(name, value)
                )
            elif isinstance(value, Mapping):
                connection = Connection.from_mapping(value, name)
            else:
                raise ConnectionFormatError(f"The connection {name} is neither a URI nor an object")
        except ConnectionFormatError as error:
            raise ImportFileError(f"{path}: {error}") from None
        if connection.conn_id in found:
            raise ImportFileError(f"{path}: Found multiple values for {connection.conn_id}.")
        found[connection.conn_id] = connection
    return found


def read_variables(path: Path) -> dict[str, VariableWrite]:
    """Return the variables of a file by key; a value that is no text becomes JSON, as Airflow stores it.

    Raises:
        ImportFileError: unreadable.
    """
    found: dict[str, VariableWrite] = {}
    for key, value in _entries(path, "variables", ("key",)):
        description = None
        if isinstance(value, _Item):
            if "value" not in value:
                raise ImportFileError(f"{path}: the variable {key} has no value")
            description = None if value.get("description") is None else str(value["description"])
            value = value["value"]
        elif isinstance(value, Mapping) and "value" in value and set(value) <= {"value", "description"}:
            # what Airflow's secrets files and newer exports have
            description, value = value.get("description"), value["value"]
        if key in found:
            raise ImportFileError(f"{path}: Found multiple values for {key}.")
        found[key] = VariableWrite(key, as_text(value), description)
    return found


def as_text(value: Any) -> str:
    """Return a variable's value as it is stored: text as it is, nothing as empty, everything else as JSON."""
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value, indent=2)


def read_pools(path: Path) -> tuple[list[PoolWrite], list[str]]:
    """Return the pools of a file, and the names of those that are not written as they should be.

    Raises:
        ImportFileError: unreadable.
    """
    pools, failed = [], []
    for name, value in _entries(path, "pools", ("name", "pool")):
        if not isinstance(value, Mapping) or "slots" not in value:
            failed.append(name)
            continue
        try:
            slots = int(value["slots"])
            validate_key(name, 256)
        except (TypeError, ValueError):
            failed.append(name)
            continue
        if slots < -1:
            failed.append(name)
            continue
        info = PoolInfo(str(value.get("description") or ""), bool(value.get("include_deferred", False)))
        pools.append(PoolWrite(name, slots, info))
    return pools, failed


def is_masked(connection: Connection) -> bool:
    """Whether secrets of a connection were replaced when it was shown: it says nothing about them."""
    return connection.password == MASK or MASK in json.dumps(connection.extra_dejson) or connection.extra == MASK


def is_masked_variable(write: VariableWrite) -> bool:
    """Whether the value of a variable was replaced when it was shown."""
    return write.value == MASK and is_sensitive(write.key)


class _Item(dict[str, Any]):
    """An entry of a list under a key, with its name taken out."""


def _entries(path: Path, under: str, names: Sequence[str]) -> list[tuple[str, Any]]:
    """Return ``(name, value)`` of a mapping, or of a list of objects under the key `under`."""
    content = _parse(path)
    if isinstance(content, list):
        return content
    listed = content.get(under)
    if len(content) == 1 and isinstance(listed, list):
        entries = []
        for number, item in enumerate(listed, 1):
            name = next((item[key] for key in names if item.get(key)), None) if isinstance(item, Mapping) else None
            if name is None:
                raise ImportFileError(f"{path}: entry {number} under {under}: is no object with {names[-1]}")
            entries.append((str(name), _Item({str(key): value for key, value in item.items() if key not in names})))
        return entries
    if len(content) == 1 and isinstance(listed, Mapping):
        content = dict(listed)
    return [(str(name), value) for name, value in content.items()]


def _parse(path: Path) -> dict[Any, Any] | list[tuple[str, Any]]:
    suffix = path.suffix.lower() or (path.name.lower() if path.name.lower() in EXTENSIONS else "")
    if suffix not in EXTENSIONS:
        raise ImportFileError(
            "Unsupported file format. The file must have one of the following extensions: .env .json .yaml .yml"
        )
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ImportFileError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ImportFileError(f"{path} is not UTF-8 text") from None
    if suffix == ".env":
        return _parse_env(path, text)
    if not text.strip():
        raise ImportFileError(f"{path}: The file is empty.")
    content = _load_json(path, text) if suffix == ".json" else _load_yaml(path, text)
    if not isinstance(content, dict):
        raise ImportFileError(f"{path}: The file should contain the object.")
    return content


def _load_json(path: Path, text: str) -> Any:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in pairs]
        double = sorted({name for name in names if names.count(name) > 1})
        if double:
            raise ImportFileError(f"{path}: Found multiple values for {', '.join(double)}.")
        return dict(pairs)

    try:
        return json.loads(text, object_pairs_hook=unique)
    except json.JSONDecodeError as error:
        raise ImportFileError(f"Invalid json file: {path}: line {error.lineno}: {error.msg}") from None


def _load_yaml(path: Path, text: str) -> Any:
    import yaml

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        # the text of the error quotes the line, which may hold a password
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}" if mark is not None else "somewhere"
        raise ImportFileError(f"Invalid yaml file: {path}: {where}: {getattr(error, 'problem', 'not YAML')}") from None


def _parse_env(path: Path, text: str) -> list[tuple[str, Any]]:
    entries = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        key, separator, value = line.partition("=")
        if not separator:
            raise ImportFileError(f'{path}: line {number}: The line should contain at least one equal sign ("=").')
        if not key.strip() or not value:
            raise ImportFileError(f"{path}: line {number}: Key or value is empty.")
        entries.append((key.strip(), value))
    return entries
