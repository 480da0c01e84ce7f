"""Short-lived proofs in memory: a credential that was checked once is not checked again for some minutes.

A proof is kept under an HMAC of the credential, with a key that only this process knows and that ends with it: what is
in memory lets nobody log in. All proofs fall as soon as the users' revision in the database has moved, which each
change of a password, role, session or token does.
"""

from __future__ import annotations

import hmac
import secrets
import threading
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256

from clinical_orchestration.users.identity import Identity

KEEP_SECONDS = 300.0
LOOK_SECONDS = 1.0
"""So often the revision is read while requests come; a change acts in this time, in every process."""

MOST_PROOFS = 4096


@dataclass(frozen=True)
class _Proof:
    identity: Identity
    until: float


class Proofs:
    """Credentials that were checked.

    Args:
        clock: seconds that never go back.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._key = secrets.token_bytes(32)
        self._proofs: dict[bytes, _Proof] = {}
        self._revision: int | None = None
        self._looked = float("-inf")
        self._lock = threading.Lock()

    def name(self, kind: str, credential: str) -> bytes:
        """Return the name of a credential's proof."""
        text = f"{kind}\0{credential}".encode("utf-8", "surrogateescape")
        return hmac.digest(self._key, text, sha256)

    @property
    def stale(self) -> bool:
        """Whether the revision must be read before the next answer."""
        return self._clock() - self._looked >= LOOK_SECONDS

    def revised(self, revision: int) -> None:
        """Take the revision that the database has now; every proof of another one falls."""
        with self._lock:
            if revision != self._revision:
                self._proofs.clear()
                self._revision = revision
            self._looked = self._clock()

    def unreadable(self) -> None:
        """The revision cannot be read; proofs go on until they end: nobody can change a password meanwhile."""
        self._looked = self._clock()

    def find(self, name: bytes) -> Identity | None:
        """Return who showed this credential not long ago."""
        found = self._proofs.get(name)
        return found.identity if found is not None and found.until > self._clock() else None

    def keep(self, name: bytes, identity: Identity, revision: int, seconds: float = KEEP_SECONDS) -> None:
        """Remember who showed a credential, unless the users have changed since `revision` was read."""
        now = self._clock()
        with self._lock:
            if revision != self._revision:
                return
            if len(self._proofs) >= MOST_PROOFS:
                self._proofs = {key: one for key, one in self._proofs.items() if one.until > now}
            if len(self._proofs) >= MOST_PROOFS:
                self._proofs.pop(next(iter(self._proofs)))
            self._proofs[name] = _Proof(identity, now + min(seconds, KEEP_SECONDS))
