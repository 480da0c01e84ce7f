"""Encryption of secrets at rest: Fernet (AES-128-CBC with HMAC-SHA256), with several keys for rotation."""

from __future__ import annotations

import base64
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cryptography.fernet import MultiFernet

FERNET_KEY = "CLINICAL_FERNET_KEY"
"""Environment variable with the key, or several separated by commas: the first encrypts, all decrypt."""

_CURE_MISSING = (
    f'set {FERNET_KEY}: the embedded stack prints its key with `eval "$(./pipeline-manager.sh --env)"`; elsewhere make '
    "one with `python -c 'from cryptography.fernet import Fernet; print(Fernet.generate_key().decode())'`"
)


class SecretKeyError(RuntimeError):
    """The key of secrets is missing, broken, or not the one a value was encrypted with. Never holds a secret."""


def new_key() -> str:
    """Return a new random key."""
    return base64.urlsafe_b64encode(os.urandom(32)).decode()


def raw_keys(keys: str, what: str) -> list[bytes]:
    """Return the keys of a comma-separated list, 32 bytes each; an empty text has none. `what` names what needs them.

    Raises:
        SecretKeyError: one of them is no Fernet key.
    """
    found = []
    for number, part in enumerate(keys.split(",") if keys.strip() else (), 1):
        try:
            key = base64.urlsafe_b64decode(part.strip())
        except ValueError:
            key = b""
        if len(key) != 32:
            raise SecretKeyError(
                f"key {number} in {FERNET_KEY} is not a Fernet key (32 bytes in URL-safe base64, 44 "
                f"characters), so {what} cannot be read or stored; correct it"
            )
        found.append(key)
    return found


class Cipher:
    """Encrypts and decrypts with the keys of a comma-separated list.

    The keys are looked at when the first secret is: without secrets nobody needs a key.
    """

    def __init__(self, keys: str) -> None:
        self._keys = keys
        self._fernet: MultiFernet | None = None

    @classmethod
    def from_environment(cls) -> Cipher:
        """Return the cipher of ``CLINICAL_FERNET_KEY``."""
        return cls(os.environ.get(FERNET_KEY, ""))

    @property
    def available(self) -> bool:
        """Whether there is a key at all."""
        return bool(self._keys.strip())

    def encrypt(self, text: str, what: str) -> str:
        """Return the text encrypted with the first key; `what` names it in errors.

        Raises:
            SecretKeyError: no key, or one that is none.
        """
        return self._open(what).encrypt(text.encode()).decode()

    def decrypt(self, token: str, what: str) -> str:
        """Return what was encrypted.

        Raises:
            SecretKeyError: no key, one that is none, or another one than the text was encrypted with.
        """
        from cryptography.fernet import InvalidToken

        try:
            return self._open(what).decrypt(token.encode()).decode()
        except InvalidToken:
            raise _wrong_key(what) from None

    def rotate(self, token: str, what: str) -> str:
        """Return the text encrypted anew, with the first key.

        Raises:
            SecretKeyError: as :meth:`decrypt`.
        """
        from cryptography.fernet import InvalidToken

        try:
            return self._open(what).rotate(token.encode()).decode()
        except InvalidToken:
            raise _wrong_key(what) from None

    def _open(self, what: str) -> MultiFernet:
        if self._fernet is None:
            if not self.available:
                raise SecretKeyError(f"{what} is a secret, and there is no key for secrets; {_CURE_MISSING}")
            from cryptography.fernet import Fernet, MultiFernet

            self._fernet = MultiFernet([Fernet(base64.urlsafe_b64encode(key)) for key in raw_keys(self._keys, what)])
        return self._fernet


def _wrong_key(what: str) -> SecretKeyError:
    return SecretKeyError(
        f"{what} was encrypted with another key than those in {FERNET_KEY}; add the old key behind the new one, "
        "separated by a comma, or store the value again"
    )
