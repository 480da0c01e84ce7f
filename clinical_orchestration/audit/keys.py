"""Keys of the signatures: made from the keys of secrets, which are not in the database."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Mapping

_INFO = b"clinical-orchestration audit trail 1"
_FINGERPRINT = 16


class UnknownKeyError(LookupError):
    """Something was signed with a key that is not given."""


class Signer:
    """Signs with one key and checks with all.

    Args:
        keys: key by fingerprint.
        current: fingerprint of the key that signs.
    """

    def __init__(self, keys: Mapping[str, bytes], current: str) -> None:
        self.keys = dict(keys)
        self.current = current

    @classmethod
    def from_fernet(cls, keys: str) -> Signer | None:
        """Return the signer of a comma-separated list as in ``CLINICAL_FERNET_KEY``: the first signs.

        None where the list is empty.

        Raises:
            clinical_orchestration.platform.crypto.SecretKeyError: one of them is no Fernet key.
        """
        from clinical_orchestration.platform.crypto import raw_keys

        derived = [_derive(key) for key in raw_keys(keys, "the audit trail's signature")]
        return cls({fingerprint(key): key for key in derived}, fingerprint(derived[0])) if derived else None

    def sign(self, text: str) -> str:
        """Return the signature of a text, hexadecimal."""
        return _mac(self.keys[self.current], text)

    def check(self, key_id: str, text: str, mac: str) -> bool:
        """Return whether `mac` is the signature of a text by the key of this fingerprint.

        Raises:
            UnknownKeyError: that key is not given.
        """
        key = self.keys.get(key_id)
        if key is None:
            raise UnknownKeyError(key_id)
        return hmac.compare_digest(_mac(key, text).encode(), mac.encode())


def fingerprint(key: bytes) -> str:
    """Return the name of a key, from which the key cannot be told."""
    return hashlib.sha256(b"fingerprint " + key).hexdigest()[:_FINGERPRINT]


def _mac(key: bytes, text: str) -> str:
    return hmac.new(key, text.encode(), hashlib.sha256).hexdigest()


def _derive(secret: bytes) -> bytes:
    from cryptography.hazmat.primitives.hashes import SHA256
    from cryptography.hazmat.primitives.kdf.hkdf import HKDF

    return HKDF(SHA256(), 32, salt=None, info=_INFO).derive(secret)
