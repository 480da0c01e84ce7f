"""Knows who makes a request by what it shows: a session's cookie, name and password, or a token."""

from __future__ import annotations

import base64
import binascii
import contextlib
import hmac
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Protocol

from anyio import CapacityLimiter, to_thread

from clinical_orchestration.page.airflow_api import API_PREFIX
from clinical_orchestration.page.dagster_ui import PREFIX as DAGSTER_PREFIX
from clinical_orchestration.page.turned_away import TurnedAway
from clinical_orchestration.platform.database import StoreUnavailableError
from clinical_orchestration.users.first_user import UnsafeLoginError, prepare_first_user
from clinical_orchestration.users.identity import SERVICE_NAME, How, Identity
from clinical_orchestration.users.passwords import fingerprint
from clinical_orchestration.users.proof import KEEP_SECONDS, Proofs
from clinical_orchestration.users.roles import ADMIN, EVERYTHING
from clinical_orchestration.users.store import Admission, LockedOutError, LoginError, UserStore

if TYPE_CHECKING:
    from starlette.requests import HTTPConnection

    from clinical_orchestration.audit.trail import AuditTrail
    from clinical_orchestration.page.settings import PageSettings

COOKIE = "clinical_session"
SHORTEST_SERVICE_TOKEN = 16
HASHES_AT_ONCE = 2
"""Each check of a password takes 64 MB and tens of milliseconds of a core; more of them wait their turn."""
QUESTIONS_AT_ONCE = 4
"""Connections to the database for secrets that nobody knows here yet."""

_logger = logging.getLogger("clinical_orchestration.page")


@dataclass(frozen=True)
class Known:
    """Who makes a request; `session` is the secret of the session, empty where it was another way in."""

    identity: Identity
    session: str = ""


class Doorkeeper(Protocol):
    """Knows people by what they show."""

    async def known(self, connection: HTTPConnection) -> Known | None:
        """Return who this is; None: nobody that is known.

        Raises:
            LockedOutError: too many logins failed.
            StoreUnavailableError: it cannot be told now.
        """

    async def open_session(self, username: str, password: str, connection: HTTPConnection) -> str:
        """Let a user in by name and password and return the secret of a session.

        Raises:
            LoginError: no.
            StoreUnavailableError: it cannot be told now.
        """

    async def close_session(self, known: Known, connection: HTTPConnection) -> None:
        """End the session that this request showed."""

    def open(self) -> None:
        """Do what can be done before the first request; it waits for nothing."""

    def turned_away(self, connection: HTTPConnection) -> None:
        """Hear that a request was answered with 401; it waits for nothing."""

    def close(self) -> None:
        """Do what is left to do before the process ends."""


class Keeper:
    """The doorkeeper over the users of the database.

    Args:
        store: of the users.
        trail: where logins are recorded; a login that cannot be recorded fails.
        service_token: the secret of the stack itself; empty: there is none.
        remote: whether others than this machine reach the page.
        admin_password: of the first user; empty: the well-known one, on this machine only.
        clock: seconds that never go back.
        refusals: hears of requests without a login; None: nobody does.
    """

    def __init__(
        self,
        store: UserStore,
        trail: AuditTrail | None = None,
        *,
        service_token: str = "",
        remote: bool = False,
        admin_password: str = "",
        clock: Callable[[], float] = time.monotonic,
        refusals: TurnedAway | None = None,
    ) -> None:
        self._store = store
        self._refusals = refusals
        self._trail = trail
        usable = len(service_token) >= SHORTEST_SERVICE_TOKEN
        self._service = fingerprint(service_token) if usable else None
        self._remote = remote
        self._admin_password = admin_password
        self._proofs = Proofs(clock)
        self._looking = threading.Lock()
        self._prepared = False
        self._failing = False
        self._limiters: dict[str, CapacityLimiter] = {}

    @classmethod
    def from_settings(cls, settings: PageSettings, trail: AuditTrail | None) -> Keeper:
        """Return the doorkeeper of a deployment; see the class for `trail`."""
        return cls(
            UserStore(settings.postgres_url.get_secret_value()),
            trail,
            service_token=settings.service_token.get_secret_value(),
            remote=settings.allow_remote,
            admin_password=settings.admin_password.get_secret_value(),
            refusals=None if trail is None else TurnedAway(trail),
        )

    async def known(self, connection: HTTPConnection) -> Known | None:
        """See :meth:`Doorkeeper.known`."""
        kind, credential = _shown(connection)
        if not credential:
            return None
        if kind == "token" and self._service and hmac.compare_digest(fingerprint(credential), self._service):
            return Known(Identity(SERVICE_NAME, (ADMIN,), EVERYTHING, "token"))
        name = self._proofs.name(kind, credential)
        if self._proofs.stale:
            await to_thread.run_sync(self._look)
        identity = self._proofs.find(name)
        if identity is None and kind == "basic":
            identity = await self._by_password(credential, name, _address(connection))
        elif identity is None:
            asking = self._limiter("asking", QUESTIONS_AT_ONCE)
            identity = await to_thread.run_sync(self._by_secret, kind, credential, name, limiter=asking)
        return None if identity is None else Known(identity, credential if kind == "session" else "")

    async def open_session(self, username: str, password: str, connection: HTTPConnection) -> str:
        """See :meth:`Doorkeeper.open_session`."""
        address = _address(connection)

        def enter() -> str:
            self._prepare()
            admission = self._authenticate(username, password, address, "page")
            return self._store.open_session(admission.identity.name)

        return await to_thread.run_sync(enter, limiter=self._limiter("hashing", HASHES_AT_ONCE))

    async def close_session(self, known: Known, connection: HTTPConnection) -> None:
        """See :meth:`Doorkeeper.close_session`."""

        def leave() -> None:
            self._record("logout", known.identity.name, "page", _address(connection))
            self._store.close_session(known.session)
            self._proofs.revised(self._store.revision())  # at once here, within a second elsewhere

        await to_thread.run_sync(leave)

    def open(self) -> None:
        """Make the first user: somebody else may be added by a command before anybody asks the page for anything."""

        def prepare() -> None:
            with contextlib.suppress(StoreUnavailableError):  # the first request tries again, and says it
                self._prepare()

        threading.Thread(target=prepare, name="first-user", daemon=True).start()

    def turned_away(self, connection: HTTPConnection) -> None:
        """See :meth:`Doorkeeper.turned_away`."""
        if self._refusals is not None:
            scope = connection.scope
            path = str(scope["path"])
            below = {API_PREFIX: "api", DAGSTER_PREFIX: "graphql"}
            origin = next((name for prefix, name in below.items() if path.startswith(f"{prefix}/")), "page")
            self._refusals.note(_address(connection), origin, f"{scope.get('method', 'WEBSOCKET')} {path[:200]}")

    def close(self) -> None:
        """See :meth:`Doorkeeper.close`."""
        if self._refusals is not None:
            self._refusals.close()

    def _limiter(self, what: str, most: int) -> CapacityLimiter:
        if what not in self._limiters:  # made here, since it belongs to the event loop that runs now
            self._limiters[what] = CapacityLimiter(most)
        return self._limiters[what]

    def _look(self) -> None:
        """Read whether users have changed; while one thread does, the others go by what is known."""
        if not self._looking.acquire(blocking=False):
            return
        try:
            self._prepare()
            self._proofs.revised(self._store.revision())
            self._failing = False
        except StoreUnavailableError as error:
            self._proofs.unreadable()
            if not self._failing:
                _logger.warning("the users cannot be read: %s", error)
            self._failing = True
        finally:
            self._looking.release()

    def _prepare(self) -> None:
        if self._prepared:
            return
        try:
            prepare_first_user(self._store, remote=self._remote, password=self._admin_password)
        except UnsafeLoginError as error:
            raise StoreUnavailableError(str(error)) from None
        self._prepared = True

    async def _by_password(self, credential: str, name: bytes, address: str) -> Identity | None:
        username, separator, password = credential.partition(":")
        if not separator:
            return None

        def check() -> Identity | None:
            self._prepare()
            found = self._proofs.find(name)  # somebody with the same password may have been checked meanwhile
            if found is not None:
                return found
            revision = self._store.revision()
            try:
                admission = self._authenticate(username, password, address, "api")
            except LockedOutError:
                raise
            except LoginError:
                return None
            self._proofs.keep(name, admission.identity, revision)
            return admission.identity

        return await to_thread.run_sync(check, limiter=self._limiter("hashing", HASHES_AT_ONCE))

    def _by_secret(self, kind: str, credential: str, name: bytes) -> Identity | None:
        revision = self._store.revision()
        admission = self._store.session(credential) if kind == "session" else self._store.token(credential)
        if admission is None:
            return None
        left = KEEP_SECONDS if admission.until is None else (admission.until - datetime.now(UTC)).total_seconds()
        self._proofs.keep(name, admission.identity, revision, left)
        return admission.identity

    def _authenticate(self, username: str, password: str, address: str, origin: str) -> Admission:
        how: How = "session" if origin == "page" else "basic"
        try:
            admission = self._store.authenticate(username, password, address, how)
        except LockedOutError as error:
            if error.begins:  # what comes while it lasts would only fill the trail
                self._record("login_locked", self._recorded_name(username), origin, address)
            raise
        except LoginError:
            self._record("login_failed", self._recorded_name(username), origin, address)
            raise
        self._record("login", admission.identity.name, origin, address)
        return admission

    def _recorded_name(self, username: str) -> str:
        """Return the name where it is a user's: what else was typed there may be a password."""
        return next((user.username for user in self._store.users() if user.username.lower() == username.lower()), "?")

    def _record(self, event: str, who: str, origin: str, address: str) -> None:
        if self._trail is not None:
            from clinical_orchestration.audit.trail import AuditEntry

            self._trail.record(AuditEntry(event, who, origin, address=address))


def cookie_name(connection: HTTPConnection) -> str:
    """Return the cookie's name; browsers tell ports of one host not apart, and two stacks may run on one machine."""
    server = connection.scope.get("server") or ("", "")
    return f"{COOKIE}_{server[1]}"


def _shown(connection: HTTPConnection) -> tuple[str, str]:
    """Return what a request shows, ``basic``, ``token`` or ``session``, and the credential; empty where nothing."""
    header = connection.headers.get("authorization")
    if header is None:
        return "session", connection.cookies.get(cookie_name(connection), "")
    scheme, _, value = header.partition(" ")
    if scheme.lower() == "bearer":
        return "token", value.strip()
    if scheme.lower() == "basic":
        try:
            return "basic", base64.b64decode(value.strip(), validate=True).decode("utf-8", "replace")
        except (binascii.Error, ValueError):
            return "basic", ""
    return "", ""


def _address(connection: HTTPConnection) -> str:
    return connection.client.host if connection.client else ""
