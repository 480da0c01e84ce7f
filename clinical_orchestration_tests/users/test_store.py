"""Users, sessions and tokens in a real PostgreSQL."""

from __future__ import annotations

import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import argon2
import psycopg2
import pytest

from clinical_orchestration.platform.database import StoreUnavailableError
from clinical_orchestration.users import passwords
from clinical_orchestration.users.cli_identity import current_identity
from clinical_orchestration.users.first_user import UnsafeLoginError, prepare_first_user
from clinical_orchestration.users.roles import BUILT_IN, EVERYTHING
from clinical_orchestration.users.store import (
    SESSION_LIFETIME,
    BuiltInRoleError,
    LockedOutError,
    LoginError,
    TakenError,
    UnknownRoleError,
    UnknownUserError,
    UserStore,
)
from clinical_orchestration_tests.users.conftest import Clock

pytestmark = pytest.mark.integration

HERE = "127.0.0.1"
QUICK = pytest.mark.usefixtures("quick_hashes")
RIGHT = "right"


def add(users: UserStore, name: str = "ann", password: str = RIGHT, *roles: str) -> None:
    users.create_user(name, password, roles or ("Viewer",), email=f"{name}@example.org")


def fail(users: UserStore, times: int, name: str = "ann", address: str = HERE) -> LoginError:
    for _ in range(times):
        with pytest.raises(LoginError) as raised:
            users.authenticate(name, "wrong", address)
    return raised.value


@QUICK
def test_a_user_is_let_in_by_the_right_password_and_counted(users: UserStore, clock: Clock) -> None:
    assert users.users() == []
    add(users)
    fail(users, 2)
    assert users.user("ann").failed_login_count == 2
    admission = users.authenticate("Ann", "right", HERE)
    assert admission.identity.name == "ann"
    assert admission.identity.roles == ("Viewer",)
    assert admission.identity.permissions == BUILT_IN["Viewer"]
    found = users.user("ann")
    assert (found.login_count, found.failed_login_count, found.last_login) == (1, 0, clock.now)


@QUICK
def test_names_and_emails_are_unique_whatever_their_case(users: UserStore) -> None:
    add(users)
    with pytest.raises(TakenError) as raised:
        users.create_user("ANN", "x", (), email="other@example.org")
    assert raised.value.field == "username"
    with pytest.raises(TakenError) as raised:
        users.create_user("bob", "x", (), email="Ann@Example.org")
    assert raised.value.field == "email"
    add(users, "bob")
    with pytest.raises(TakenError):
        users.change_user("bob", new_username="Ann")
    users.change_user("bob", new_username="BOB")
    with pytest.raises(UnknownRoleError, match="'Boss'"):
        users.change_user("bob", roles=["Viewer", "Boss"])
    assert users.user("bob").roles == ("Viewer",)
    with pytest.raises(UnknownUserError):
        users.user("carl")


@QUICK
def test_two_creations_at_once_make_one_user(users: UserStore) -> None:
    users.create_tables()

    def create(_: int) -> bool:
        try:
            add(users)
        except TakenError:
            return False
        return True

    with ThreadPoolExecutor(4) as pool:
        assert sorted(pool.map(create, range(4))) == [False, False, False, True]


@QUICK
def test_nothing_that_is_stored_lets_anybody_in(users: UserStore, database: str) -> None:
    add(users, "ann", "a-secret-password")
    session = users.open_session("ann")
    token, _ = users.create_token("ann", "script")
    with pytest.raises(LoginError):
        users.authenticate("typed-password-as-name", "x", HERE)
    stored = ""
    connection = psycopg2.connect(database)
    with connection, connection.cursor() as cursor:
        cursor.execute("select tablename from pg_tables where schemaname = 'public'")
        for (table,) in cursor.fetchall():
            cursor.execute(f'select * from "{table}"')  # noqa: S608
            stored += str(cursor.fetchall())
    connection.close()
    assert "ann@example.org" in stored
    for secret in ("a-secret-password", session, token, "typed-password-as-name"):
        assert secret not in stored


def test_an_unknown_name_and_a_wrong_password_get_the_same_answer_in_the_same_time(users: UserStore) -> None:
    add(users)
    users.authenticate("ann", "right", HERE)
    took: dict[str, list[float]] = {"ann": [], "nobody": []}
    said = {}
    for attempt in range(3):
        for name in took:
            began = time.process_time()  # what others do on this machine does not count
            with pytest.raises(LoginError) as raised:
                users.authenticate(name if name == "nobody" else "ann", "wrong", f"10.0.{attempt}.1")
            if not isinstance(raised.value, LockedOutError):
                took[name].append(time.process_time() - began)
                said[name] = str(raised.value)
    assert said["ann"] == said["nobody"]
    fastest = {name: statistics.median(times) for name, times in took.items()}
    assert 0.5 < fastest["ann"] / fastest["nobody"] < 2, fastest


@QUICK
def test_five_failures_lock_a_name_out_and_longer_each_time(users: UserStore, clock: Clock) -> None:
    add(users)
    error = fail(users, 5)
    assert isinstance(error, LockedOutError)
    assert error.seconds == 30
    with pytest.raises(LockedOutError):
        users.authenticate("ANN", "right", "10.9.9.9")
    clock.pass_by(seconds=31)
    error = fail(users, 1)
    assert isinstance(error, LockedOutError)
    assert error.seconds == 60
    clock.pass_by(seconds=59)
    with pytest.raises(LockedOutError):
        users.authenticate("ann", "right", HERE)
    clock.pass_by(seconds=2)
    assert users.authenticate("ann", "right", HERE).identity.name == "ann"
    assert not isinstance(fail(users, 4), LockedOutError), "a success begins the count anew"


@QUICK
def test_a_name_that_is_nobodys_is_locked_too_and_others_are_not(users: UserStore) -> None:
    add(users)
    assert isinstance(fail(users, 5, "nobody"), LockedOutError)
    assert users.authenticate("ann", "right", HERE).identity.name == "ann"


@QUICK
def test_many_failures_from_one_address_lock_it_out_for_every_name(users: UserStore, clock: Clock) -> None:
    add(users)
    for number in range(20):
        fail(users, 1, f"name{number}", "2001:db8::1")
    with pytest.raises(LockedOutError):
        users.authenticate("ann", "right", "2001:db8::2")
    assert users.authenticate("ann", "right", HERE).identity.name == "ann"
    clock.pass_by(hours=1, seconds=1)
    assert users.authenticate("ann", "right", "2001:db8::2").identity.name == "ann"


@QUICK
def test_a_new_password_ends_sessions_and_unlocks(users: UserStore) -> None:
    add(users)
    session = users.open_session("ann")
    token, _ = users.create_token("ann", "script")
    fail(users, 5)
    before = users.revision()
    users.change_user("ann", password="new")
    assert users.revision() > before
    assert users.session(session) is None
    assert users.token(token) is not None
    assert users.authenticate("ann", "new", HERE).identity.name == "ann"
    with pytest.raises(LoginError):
        users.authenticate("ann", "right", HERE)


def test_a_hash_of_weaker_parameters_is_replaced_at_login(users: UserStore, database: str) -> None:
    add(users)
    weak = argon2.PasswordHasher(time_cost=1, memory_cost=64, parallelism=1).hash("right")
    connection = psycopg2.connect(database)
    with connection, connection.cursor() as cursor:
        cursor.execute("update clinical_user set password_hash = %s", (weak,))
    users.authenticate("ann", "right", HERE)
    with connection, connection.cursor() as cursor:
        cursor.execute("select password_hash from clinical_user")
        stored = cursor.fetchone()[0]
    connection.close()
    assert stored != weak
    assert not passwords.is_outdated(stored)
    assert users.authenticate("ann", "right", HERE)


@QUICK
def test_sessions_end_by_time_by_logout_and_with_the_user(users: UserStore, clock: Clock) -> None:
    add(users)
    first, second, third = (users.open_session("ann") for _ in range(3))
    found = users.session(first)
    assert found is not None
    assert found.identity.how == "session"
    users.close_session(first)
    assert users.session(first) is None
    assert users.session("no such secret") is None
    clock.pass_by(seconds=SESSION_LIFETIME.total_seconds())
    assert users.session(second) is None
    fourth = users.open_session("ann")
    users.change_user("ann", active=False)
    assert users.session(fourth) is None
    with pytest.raises(LoginError):
        users.authenticate("ann", "right", HERE)
    users.change_user("ann", active=True)
    assert users.session(fourth) is not None
    users.delete_user("ann")
    assert users.session(fourth) is None
    assert users.session(third) is None


@QUICK
def test_tokens_end_by_time_and_by_being_revoked(users: UserStore, clock: Clock) -> None:
    add(users, "ann", "right", "Op")
    secret, made = users.create_token("ann", "nightly", timedelta(days=1))
    lasting, other = users.create_token("ann", "for ever")
    admission = users.token(secret)
    assert admission is not None
    assert admission.identity.may("can_edit", "Pools")
    assert [token.name for token in users.tokens("ANN")] == ["nightly", "for ever"]
    clock.pass_by(days=1)
    assert users.token(secret) is None
    assert users.token(lasting) is not None
    assert users.revoke_token(other.id)
    assert users.token(lasting) is None
    assert not users.revoke_token(other.id)
    assert made.expires_at == made.created_at + timedelta(days=1)
    with pytest.raises(UnknownUserError):
        users.create_token("nobody", "x")


@QUICK
def test_a_custom_role_gives_what_it_permits_and_built_in_ones_stay(users: UserStore) -> None:
    assert [role.name for role in users.roles()] == list(BUILT_IN)
    users.create_role("Reader", [("can_read", "Users")])
    add(users, "ann", "right", "Reader", "Viewer")
    identity = users.authenticate("ann", "right", HERE).identity
    assert identity.may("can_read", "Users")
    assert identity.may("can_read", "DAGs")
    users.change_role("Reader", new_name="Auditor", permissions=[("can_read", "Audit Logs")])
    identity = users.authenticate("ann", "right", HERE).identity
    assert not identity.may("can_read", "Users")
    assert identity.may("can_read", "Audit Logs")
    assert users.user("ann").roles == ("Auditor", "Viewer")
    with pytest.raises(TakenError):
        users.create_role("Auditor")
    with pytest.raises(BuiltInRoleError):
        users.change_role("Viewer", permissions=EVERYTHING)
    with pytest.raises(BuiltInRoleError):
        users.delete_role("Admin")
    users.delete_role("Auditor")
    assert users.user("ann").roles == ("Viewer",)
    with pytest.raises(UnknownRoleError):
        users.delete_role("Auditor")


@QUICK
def test_what_takes_a_right_away_moves_the_revision_and_a_login_does_not(users: UserStore) -> None:
    assert users.revision() == 0
    add(users)
    for change in (
        lambda: users.change_user("ann", roles=["Op"]),
        lambda: users.change_user("ann", password="new"),
        lambda: users.create_role("R"),
        lambda: users.change_role("R", permissions=[]),
        lambda: users.delete_role("R"),
    ):
        before = users.revision()
        change()
        assert users.revision() > before
    before = users.revision()
    users.authenticate("ann", "new", HERE)
    session = users.open_session("ann")
    assert users.revision() == before
    users.close_session(session)
    assert users.revision() > before
    before = users.revision()
    users.delete_user("ann")
    assert users.revision() > before


@QUICK
def test_the_first_user_is_admin_with_the_well_known_password_on_this_machine_only(users: UserStore) -> None:
    with pytest.raises(UnsafeLoginError, match="no user"):
        prepare_first_user(users, remote=True)
    with pytest.raises(UnsafeLoginError, match="no user"):
        prepare_first_user(users, remote=True, password="admin")
    assert users.users() == []
    prepare_first_user(users, remote=False)
    assert users.authenticate("admin", "admin", HERE).identity.permissions == EVERYTHING
    prepare_first_user(users, remote=False)
    assert len(users.users()) == 1
    with pytest.raises(UnsafeLoginError, match="CLINICAL_ADMIN_PASSWORD") as raised:
        prepare_first_user(users, remote=True)
    assert "clinical users password admin" in str(raised.value)
    prepare_first_user(users, remote=True, password="my own")
    assert users.has_password("admin", "my own")
    prepare_first_user(users, remote=True)
    prepare_first_user(users, remote=True, password="another")
    assert users.has_password("admin", "my own"), "a password of one's own is not replaced"


@QUICK
def test_remote_with_a_password_from_the_start(users: UserStore) -> None:
    prepare_first_user(users, remote=True, password="my own")
    assert users.authenticate("admin", "my own", HERE)
    assert not users.has_password("admin", "admin")


@QUICK
def test_the_admin_is_not_made_again_where_others_are(users: UserStore) -> None:
    add(users)
    prepare_first_user(users, remote=False)
    prepare_first_user(users, remote=True)
    assert [user.username for user in users.users()] == ["ann"]


@QUICK
def test_a_command_is_given_by_the_named_user_else_by_the_operating_systems(
    users: UserStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CLINICAL_USER", raising=False)
    found = current_identity(users)
    assert found.name.startswith("os:")
    assert found.permissions == EVERYTHING
    add(users)
    monkeypatch.setenv("CLINICAL_USER", "ann")
    monkeypatch.setenv("CLINICAL_PASSWORD", "right")
    assert current_identity(users).permissions == BUILT_IN["Viewer"]
    monkeypatch.setenv("CLINICAL_PASSWORD", "wrong")
    with pytest.raises(LoginError):
        current_identity(users)


@QUICK
def test_without_a_database_the_error_says_where_it_was_expected() -> None:
    store = UserStore("postgresql://me:hidden@127.0.0.1:9/x")
    with pytest.raises(StoreUnavailableError) as raised:
        store.authenticate("ann", "right", HERE)
    assert "127.0.0.1:9" in str(raised.value)
    assert "hidden" not in str(raised.value)
