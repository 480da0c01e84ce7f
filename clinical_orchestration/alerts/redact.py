"""What may be told of an error: its first words, without secrets."""

from __future__ import annotations

import re
from collections.abc import Iterable

HIDDEN = "***"

_PATTERNS = (
    (re.compile(r"(?P<keep>\b[a-z][a-z0-9+.-]*://)[^\s/@'\"]*@", re.IGNORECASE), rf"\g<keep>{HIDDEN}@"),
    (re.compile(r"(?P<keep>hooks\.slack\.com/)\S+", re.IGNORECASE), rf"\g<keep>{HIDDEN}"),
    (re.compile(r"(?P<keep>\b(?:bearer|basic)\s+)[A-Za-z0-9._~+/=-]{8,}", re.IGNORECASE), rf"\g<keep>{HIDDEN}"),
    (
        re.compile(
            r"(?P<keep>[\w-]*(?:password|passwd|pwd|secret|token|api[_-]?key|access[_-]?key|credential|signature)[\w-]*"
            r"['\"]?\s*[=:]\s*['\"]?)[^\s'\",;&]+",
            re.IGNORECASE,
        ),
        rf"\g<keep>{HIDDEN}",
    ),
    (re.compile(r"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b"), HIDDEN),
)


def without_secrets(text: str, secrets: Iterable[str] = ()) -> str:
    """Return `text` with `secrets` and whatever looks like one replaced by ``***``.

    Args:
        text: such as an error message.
        secrets: values that must not appear; those shorter than four characters would hide ordinary words and are
            left to the patterns (passwords in URLs, webhook addresses, ``password=...``, authorization headers, AWS
            key ids).
    """
    for secret in sorted({secret for secret in secrets if len(secret) >= 4}, key=len, reverse=True):
        text = text.replace(secret, HIDDEN)
    for pattern, replacement in _PATTERNS:
        text = pattern.sub(replacement, text)
    return text


def short_error(text: str, secrets: Iterable[str] = (), limit: int = 300) -> str:
    """Return the first line of `text` that says something, without secrets, in at most `limit` characters."""
    clean = without_secrets(text, secrets)
    line = next((line.strip() for line in clean.splitlines() if line.strip()), "")
    return line if len(line) <= limit else line[: limit - 1] + "…"
