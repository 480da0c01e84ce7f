"""Roles, lock-out, proofs, passwords: what needs no database."""

from __future__ import annotations

import itertools
from datetime import timedelta

import argon2
import pytest

from clinical_orchestration.api.app import OPERATIONS
from clinical_orchestration.page.dagster_roles import permissions_for
from clinical_orchestration.page.door import local_target
from clinical_orchestration.users.identity import Identity
from clinical_orchestration.users.lockout import LONGEST_LOCK, address_group, lock_time
from clinical_orchestration.users.passwords import (
    LONGEST_PASSWORD,
    csrf_token,
    hash_password,
    is_outdated,
    verify_password,
)
from clinical_orchestration.users.proof import KEEP_SECONDS, LOOK_SECONDS, MOST_PROOFS, Proofs
from clinical_orchestration.users.roles import BUILT_IN, EVERYTHING, permissions_of


def identity(*roles: str) -> Identity:
    return Identity("somebody", roles, permissions_of(roles), "token")


def test_each_role_permits_what_the_one_below_does_and_more() -> None:
    order = [BUILT_IN[name] for name in ("Public", "Viewer", "User", "Op", "Admin")]
    for lower, higher in itertools.pairwise(order):
        assert lower < higher
    assert not order[0]
    assert order[-1] == EVERYTHING


def test_an_admin_may_call_every_operation_of_the_api() -> None:
    needed = {pair for operation in OPERATIONS for pair in operation.permissions}
    assert needed <= EVERYTHING


@pytest.mark.parametrize(
    ("role", "action", "resource", "allowed"),
    [
        ("Viewer", "can_read", "DAGs", True),
        ("Viewer", "can_edit", "DAGs", False),
        ("Viewer", "can_read", "Variables", False),
        ("Viewer", "can_read", "Audit Logs", False),
        ("Viewer", "can_read", "Plugins", False),
        ("User", "can_create", "DAG Runs", True),
        ("User", "can_create", "Datasets", True),
        ("User", "can_edit", "Pools", False),
        ("User", "can_read", "Connections", False),
        ("Op", "can_delete", "Connections", True),
        ("Op", "can_read", "Configurations", True),
        ("Op", "can_read", "Users", False),
        ("Op", "can_read", "Audit Logs", False),
        ("Admin", "can_create", "Users", True),
        ("Admin", "can_read", "Audit Logs", True),
    ],
)
def test_roles_permit_what_airflow_2_11_permits(role: str, action: str, resource: str, allowed: bool) -> None:
    assert identity(role).may(action, resource) is allowed


def test_no_operation_of_the_api_that_changes_something_is_open_to_a_viewer() -> None:
    viewer = identity("Viewer")
    for operation in OPERATIONS:
        if operation.method != "GET" and not operation.path.endswith("/list"):
            assert not all(viewer.may(*pair) for pair in operation.permissions), operation.name


def test_custom_roles_add_up_and_cannot_stand_for_a_built_in_one() -> None:
    custom = {"Reader": frozenset({("can_read", "Users")}), "Viewer": EVERYTHING}
    assert permissions_of(["Reader", "Viewer"], custom) == BUILT_IN["Viewer"] | {("can_read", "Users")}
    assert permissions_of(["Nobody"]) == frozenset()


def test_dagsters_permissions_follow_the_roles() -> None:
    names = {"launch_pipeline_execution": True, "edit_concurrency_limit": True, "wipe_assets": True, "absent": False}
    names |= {"start_schedule": True, "launch_partition_backfill": True, "terminate_pipeline_execution": True}
    assert not any(permissions_for(identity("Viewer"), names).values())
    assert not any(permissions_for(None, names).values())
    user = permissions_for(identity("User"), names)
    assert {name for name, allowed in user.items() if allowed} == {
        "launch_pipeline_execution", "start_schedule", "launch_partition_backfill", "terminate_pipeline_execution",
    }  # fmt: skip
    assert {name for name, allowed in permissions_for(identity("Op"), names).items() if not allowed} == {"absent"}


def test_locks_begin_at_the_fifth_failure_double_and_have_a_longest() -> None:
    assert [lock_time("user", failures).total_seconds() for failures in (1, 4, 5, 6, 7)] == [0, 0, 30, 60, 120]
    assert lock_time("user", 1000) == LONGEST_LOCK
    assert lock_time("address", 19) == timedelta(0)
    assert lock_time("address", 20) > timedelta(0)


@pytest.mark.parametrize(
    ("address", "group"),
    [
        ("10.0.0.7", "10.0.0.7"),
        ("::ffff:10.0.0.7", "10.0.0.7"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("command line", "command line"),
    ],
)
def test_one_host_is_one_address(address: str, group: str) -> None:
    assert address_group(address) == group


class Seconds:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_a_proof_holds_for_a_while_and_falls_with_the_next_revision() -> None:
    seconds = Seconds()
    proofs = Proofs(seconds)
    assert proofs.stale
    proofs.revised(7)
    assert not proofs.stale
    name = proofs.name("basic", "ann:secret")
    proofs.keep(name, identity("Viewer"), 7)
    assert proofs.find(name) == identity("Viewer")
    assert proofs.find(proofs.name("basic", "ann:other")) is None
    assert proofs.find(proofs.name("session", "ann:secret")) is None
    seconds.now += LOOK_SECONDS
    assert proofs.stale
    proofs.unreadable()
    assert proofs.find(name) is not None, "while the database is away nobody can have changed a password"
    proofs.revised(8)
    assert proofs.find(name) is None


def test_a_proof_ends_and_is_not_kept_when_users_changed_while_it_was_made() -> None:
    seconds = Seconds()
    proofs = Proofs(seconds)
    proofs.revised(1)
    name = proofs.name("token", "t")
    proofs.keep(name, identity("Viewer"), 0)
    assert proofs.find(name) is None
    proofs.keep(name, identity("Viewer"), 1, seconds=5)
    seconds.now += 5
    assert proofs.find(name) is None
    proofs.keep(name, identity("Viewer"), 1, seconds=10**9)
    seconds.now += KEEP_SECONDS
    assert proofs.find(name) is None


def test_proofs_are_bounded_and_hold_no_credential() -> None:
    proofs = Proofs(Seconds())
    proofs.revised(1)
    for number in range(MOST_PROOFS + 10):
        proofs.keep(proofs.name("basic", f"ann:secret{number}"), identity("Viewer"), 1)
    assert len(proofs._proofs) <= MOST_PROOFS
    assert not any(b"secret" in name for name in proofs._proofs)
    assert Proofs(Seconds()).name("basic", "a") != Proofs(Seconds()).name("basic", "a"), "each process has its own key"


@pytest.mark.usefixtures("quick_hashes")
def test_a_password_is_checked_against_its_hash() -> None:
    stored = hash_password("right")
    assert stored.startswith("$argon2id$")
    assert "right" not in stored
    assert verify_password(stored, "right")
    assert not verify_password(stored, "wrong")
    assert not verify_password(None, "right")
    assert not verify_password("no hash", "right")
    longest = "x" * LONGEST_PASSWORD
    assert not verify_password(hash_password(longest), longest + "y")
    for bad in ("", longest + "y"):
        with pytest.raises(ValueError, match="characters"):
            hash_password(bad)


def test_a_hash_of_other_parameters_is_outdated() -> None:
    assert is_outdated(argon2.PasswordHasher(time_cost=1, memory_cost=8, parallelism=1).hash("x"))
    assert not is_outdated(hash_password("x"))


def test_the_csrf_token_needs_the_sessions_secret() -> None:
    assert csrf_token("a") == csrf_token("a")
    assert csrf_token("a") != csrf_token("b")
    assert "a" * 8 not in csrf_token("a" * 43)


@pytest.mark.parametrize("target", ["/", "/dagster/runs?x=1", "/runs/a/b?task=c#d", "/a:b"])
def test_after_a_login_a_path_of_this_address_is_taken(target: str) -> None:
    assert local_target(target) == target


@pytest.mark.parametrize(
    "target",
    [
        "", "//evil.example", "///evil.example", "https://evil.example/", "/\\evil.example", "\\\\evil.example",
        "javascript:alert(1)", "/\t/evil.example", "/\n/evil.example", "evil.example", "/login?next=/login", "/logout",
        "http:/\\evil", "/x\r\nSet-Cookie: a=b", "//[", " //evil.example",
    ],
)  # fmt: skip
def test_after_a_login_nobody_is_sent_elsewhere(target: str) -> None:
    assert local_target(target) == "/"
