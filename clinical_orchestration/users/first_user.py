"""The first user: admin/admin where only this machine can reach the page, a password of one's own elsewhere."""

from __future__ import annotations

from clinical_orchestration.users.store import UserStore

DEFAULT_NAME = "admin"
DEFAULT_PASSWORD = "admin"  # noqa: S105 - everybody knows it; it is refused where others reach the page
PASSWORD_VARIABLE = "CLINICAL_ADMIN_PASSWORD"  # noqa: S105 - a name

_CURE = (
    f"set {PASSWORD_VARIABLE} for the start, or: clinical users create NAME --role Admin, or where there is "
    f"{DEFAULT_NAME}: clinical users password {DEFAULT_NAME}"
)


class UnsafeLoginError(RuntimeError):
    """The page would be open to everybody who reaches it.

    Attributes:
        why: what is missing.
        cure: what to do.
    """

    def __init__(self, why: str) -> None:
        super().__init__(f"{why}; {_CURE}")
        self.why = why
        self.cure = _CURE


def prepare_first_user(store: UserStore, *, remote: bool, password: str = "") -> None:
    """Make the user ``admin`` where there is no user, and refuse its well-known password where others reach the page.

    Args:
        store: of the users.
        remote: whether others than this machine reach the page.
        password: of ``admin``, where it is made now or still has the well-known one.

    Raises:
        UnsafeLoginError: `remote`, and there is no user or ``admin`` has the well-known password.
        clinical_orchestration.platform.database.StoreUnavailableError: the database does not answer.
    """
    own = password if password != DEFAULT_PASSWORD else ""
    if not remote or own:
        store.create_first_user(DEFAULT_NAME, password or DEFAULT_PASSWORD)
    if not remote:
        return
    if not store.users():
        raise UnsafeLoginError("there is no user, and others than this machine reach the page")
    if store.has_password(DEFAULT_NAME, DEFAULT_PASSWORD):
        if not own:
            raise UnsafeLoginError(
                f"{DEFAULT_NAME} has the well-known password, and others than this machine reach the page"
            )
        store.change_user(DEFAULT_NAME, password=own)
