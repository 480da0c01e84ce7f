"""A connection as Airflow knows it: id, type, host, port, login, password, schema, extra; also as URI and as JSON."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any
from urllib.parse import parse_qsl, quote, unquote, urlencode, urlsplit

from clinical_orchestration.platform.masking import MASK, redact

EXTRA_KEY = "__extra__"
ID_LENGTH = 200
_KEY = re.compile(r"^[\w.-]+$")
_ALIASES = {"id": "conn_id", "type": "conn_type"}


class ConnectionFormatError(ValueError):
    """A connection is not written as it should be; the message never holds a secret."""


def validate_key(key: str, max_length: int = 250) -> None:
    """Check the name of a variable, connection or pool, with Airflow's rule and words.

    Raises:
        ConnectionFormatError: it is too long, or has other characters than letters, digits, ``_``, ``-`` and ``.``.
    """
    if len(key) > max_length:
        raise ConnectionFormatError(f"The key has to be less than {max_length} characters")
    if not _KEY.match(key):
        raise ConnectionFormatError(
            f"The key {key!r} has to be made of alphanumeric characters, dashes, dots and underscores exclusively"
        )


@dataclass(frozen=True)
class Connection:
    """Where an external system answers, and how one logs in. Secrets stay out of its ``repr``."""

    conn_id: str
    conn_type: str = ""
    description: str | None = None
    host: str | None = None
    schema: str | None = None
    login: str | None = None
    password: str | None = field(default=None, repr=False)
    port: int | None = None
    extra: str | None = field(default=None, repr=False)
    """JSON text, usually of an object."""

    @property
    def extra_dejson(self) -> dict[str, Any]:
        """The extra as a dict; empty where it is no JSON object."""
        try:
            found = json.loads(self.extra or "{}")
        except ValueError:
            return {}
        return found if isinstance(found, dict) else {}

    def masked(self) -> Connection:
        """Return the connection as it may be shown: password and the secrets in its extra replaced."""
        extra = self.extra
        if extra:
            found = self.extra_dejson
            extra = json.dumps(redact(found)) if found else MASK
        return replace(self, password=MASK if self.password else self.password, extra=extra)

    def uri(self) -> str:
        """Return the connection as Airflow's URI, secrets included."""
        uri = f"{self.conn_type.lower().replace('_', '-')}://" if self.conn_type else "//"
        protocol, host = None, self.host
        if host and "://" in host:
            protocol, host = host.split("://", 1)
            uri += f"{protocol}://"
        authority = "" if self.login is None else quote(self.login, safe="")
        if self.password is not None:
            authority += ":" + quote(self.password, safe="")
        if authority:
            authority += "@"
        uri += authority
        block = quote(host, safe="") if host else ""
        if self.port:
            block += f":{self.port}" if block or authority else f"@:{self.port}"
        if self.schema:
            block += "/" + quote(self.schema, safe="")
        uri += block
        if self.extra:
            found = self.extra_dejson
            simple = found and all(isinstance(value, str) for value in found.values())
            query = urlencode(found) if simple else urlencode({EXTRA_KEY: self.extra})
            uri += ("?" if self.schema else "/?") + query
        return uri

    def masked_uri(self) -> str:
        """Return :meth:`uri` as it may be shown."""
        hidden = self.masked()
        return hidden.uri().replace(quote(MASK, safe=""), MASK)

    def as_mapping(self) -> dict[str, Any]:
        """Return the fields but the id, in the order and with the names of Airflow's export."""
        names = ("conn_type", "description", "login", "password", "host", "port", "schema", "extra")
        found = asdict(self)
        return {name: found[name] for name in names}

    @classmethod
    def from_uri(cls, conn_id: str, uri: str, description: str | None = None) -> Connection:
        """Read Airflow's URI form, ``type://login:password@host:port/schema?extra``.

        Raises:
            ConnectionFormatError: there is no type, or the port is no number.
        """
        schemes = uri.count("://")
        conn_type = urlsplit(uri).scheme
        if not conn_type or schemes not in (1, 2):
            raise ConnectionFormatError(f"The URI of {conn_id} is not type://login:password@host:port/schema")
        rest = uri.split("://", 1)[1]
        protocol = None
        if schemes == 2:
            protocol, rest = rest.split("://", 1)
            if "@" in protocol or ":" in protocol:
                raise ConnectionFormatError(f"The URI of {conn_id} has login and host in the wrong place")
        parts = urlsplit("//" + rest)
        try:
            port = parts.port
        except ValueError:
            raise ConnectionFormatError(f"The URI of {conn_id} has a port that is no number") from None
        host = _host(parts.netloc)
        query = dict(parse_qsl(parts.query, keep_blank_values=True))
        extra = query.get(EXTRA_KEY, json.dumps(query)) if query else None
        return cls(
            conn_id=conn_id,
            conn_type=normalize_type(conn_type),
            description=description,
            host=f"{protocol}://{host}" if protocol and host else host,
            schema=unquote(parts.path[1:]) or None,
            login=None if parts.username is None else unquote(parts.username),
            password=None if parts.password is None else unquote(parts.password),
            port=port,
            extra=extra,
        )

    @classmethod
    def from_json(cls, conn_id: str, text: str) -> Connection:
        """Read Airflow's JSON form.

        Raises:
            ConnectionFormatError: it is no JSON object, or has unknown fields.
        """
        try:
            found = json.loads(text)
        except ValueError:
            raise ConnectionFormatError(f"The JSON of {conn_id} cannot be read") from None
        if not isinstance(found, dict):
            raise ConnectionFormatError(f"The JSON of {conn_id} is not an object")
        return cls.from_mapping(found, conn_id)

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any], conn_id: str | None = None) -> Connection:
        """Read a connection from its fields.

        Args:
            values: with Airflow's names, or ``id`` and ``type`` for ``conn_id`` and ``conn_type``; ``extra`` is JSON
                text or an object, also as ``extra_dejson``; ``uri`` alone takes the place of all.
            conn_id: where the fields do not say it.

        Raises:
            ConnectionFormatError: an unknown field, no id, or a port that is no number.
        """
        found = {_ALIASES.get(name, name): value for name, value in values.items()}
        given = found.pop("conn_id", None)
        conn_id = str(given if given is not None else conn_id or "")
        if not conn_id:
            raise ConnectionFormatError("A connection has no id")
        if "uri" in found:
            if set(found) - {"uri", "description"}:
                raise ConnectionFormatError(f"The connection {conn_id} has a uri and other fields; give one of them")
            return cls.from_uri(conn_id, str(found["uri"]), found.get("description"))
        known = {"conn_type", "description", "host", "schema", "login", "password", "port", "extra", "extra_dejson"}
        if unknown := sorted(set(found) - known):
            raise ConnectionFormatError(
                f"The connection {conn_id} has unknown fields: {', '.join(unknown)}; known: {', '.join(sorted(known))}"
            )
        if found.get("extra") and found.get("extra_dejson"):
            raise ConnectionFormatError(f"The connection {conn_id} has extra and extra_dejson; give one of them")
        return cls(
            conn_id=conn_id,
            conn_type=normalize_type(str(found.get("conn_type") or "")),
            port=_port(conn_id, found.get("port")),
            extra=_extra(found.get("extra") or found.get("extra_dejson")),
            **{
                name: None if found.get(name) in (None, "") else str(found[name])
                for name in ("description", "host", "schema", "login", "password")
            },
        )


def normalize_type(conn_type: str) -> str:
    """Return the type as Airflow writes it: ``postgres``, and underscores for dashes."""
    return "postgres" if conn_type == "postgresql" else conn_type.replace("-", "_")


def _host(netloc: str) -> str | None:
    """Return the host with its upper and lower case, which ``urlsplit(...).hostname`` would lose."""
    host = netloc.rpartition("@")[2]
    bracketed = host.startswith("[")
    host = host.partition("]")[0] + "]" if bracketed else host.partition(":")[0]
    return unquote(host) or None


def _port(conn_id: str, value: Any) -> int | None:
    if value in (None, ""):
        return None
    try:
        port = int(value)
    except (TypeError, ValueError):
        raise ConnectionFormatError(f"Expected integer value for `port` of {conn_id}, but got {value!r}") from None
    if not 0 < port < 65536:
        raise ConnectionFormatError(f"The port {port} of {conn_id} is not between 1 and 65535")
    return port


def _extra(value: Any) -> str | None:
    if value in (None, "", {}):
        return None
    return value.strip() if isinstance(value, str) else json.dumps(value)
