"""What is a secret by its name, and how it is shown."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

MASK = "***"

SENSITIVE = frozenset(
    {
        # Airflow's words
        "access_token", "api_key", "apikey", "authorization", "keyfile_dict", "passphrase", "passwd", "password",
        "private_key", "secret", "service_account", "token",
        # the address of a Slack webhook is all that one needs to post to the channel
        "webhook",
    }
)  # fmt: skip
"""Parts of a name (of a variable, or of a key in a connection's extra) that make its value a secret."""

_URL_PASSWORD = re.compile(r"(://[^/?#\s:@]*):[^/?#\s@]+@")


def is_sensitive(name: str) -> bool:
    """Return whether a value of this name is a secret; dots and dashes count as underscores."""
    plain = re.sub(r"[.\-\s]", "_", name.strip().lower())
    return any(word in plain for word in SENSITIVE)


def mask_url(text: str) -> str:
    """Return the text with the passwords of all URLs in it replaced."""
    return _URL_PASSWORD.sub(rf"\1:{MASK}@", text)


def redact(value: Any, name: str = "") -> Any:
    """Return a value as it may be shown: secrets by name, and passwords in URLs, replaced, at any depth."""
    if name and is_sensitive(name):
        return value if value in (None, "") else MASK
    if isinstance(value, Mapping):
        return {key: redact(inner, str(key)) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [redact(inner) for inner in value]
    return mask_url(value) if isinstance(value, str) else value
