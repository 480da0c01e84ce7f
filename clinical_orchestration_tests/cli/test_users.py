"""``airflow users`` and ``roles``, ``clinical users``, and what a named user may command."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from clinical_orchestration.audit.trail import AuditTrail
from clinical_orchestration.cli import main as clinical
from clinical_orchestration.cli.airflow import ENTRIES, main
from clinical_orchestration.cli.clinical import GROUPS, build_parser
from clinical_orchestration.cli.command import Group
from clinical_orchestration.cli.permissions import NEEDED
from clinical_orchestration.cli.recording import EVENTS
from clinical_orchestration.users.roles import BUILT_IN, EVERYTHING
from clinical_orchestration.users.store import UserStore
from clinical_orchestration_tests.users.conftest import quick_hashes

__all__ = ["quick_hashes"]

Run = Callable[..., tuple[int, str, str]]
ANN = ("-u", "ann", "-e", "ann@example.org", "-f", "Ann", "-l", "Other")


@pytest.fixture
def run(database: str, quick_hashes: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run a command of ``airflow``, or with `clinical` as first word of that; return status, output and errors."""
    monkeypatch.delenv("CLINICAL_USER", raising=False)

    def command(*words: str, user: str = "", password: str = "") -> tuple[int, str, str]:
        with monkeypatch.context() as patch:
            if user:
                patch.setenv("CLINICAL_USER", user)
                patch.setenv("CLINICAL_PASSWORD", password)
            status = clinical.main(list(words[1:])) if words[0] == "clinical" else main(list(words))
        out, err = capsys.readouterr()
        return status, out, err

    return command


def commands_of_clinical() -> set[tuple[str, str]]:
    found = set()
    (groups,) = (action for action in build_parser()._actions if action.dest == "group")
    for group in GROUPS:
        (commands,) = (action for action in groups.choices[group]._actions if action.dest == "command")  # type: ignore[index,union-attr]
        found |= {(group, command) for command in commands.choices or ()}
    return found


def test_every_command_says_what_it_needs_and_every_change_more_than_a_viewer_has() -> None:
    airflow = {
        (entry.name, command.name if command else None)
        for entry in ENTRIES
        for command in (entry.commands if isinstance(entry, Group) else (None,))
    }
    assert set(NEEDED) == airflow | commands_of_clinical()
    assert {pair for needed in NEEDED.values() for pair in needed} <= EVERYTHING
    for words in EVENTS:
        assert not set(NEEDED[words]) <= BUILT_IN["Viewer"], words


@pytest.mark.integration
def test_users_are_made_changed_and_removed_with_airflows_words(run: Run, database: str) -> None:
    assert run("users", "create", *ANN, "-r", "Viewer", "-p", "hidden")[:2] == (
        0, 'User "ann" created with role "Viewer"\n',
    )  # fmt: skip
    assert run("users", "create", *ANN, "-r", "Viewer", "-p", "x")[:2] == (0, "ann already exist in the db\n")
    status, _, err = run("users", "create", *ANN, "-r", "Boss", "-p", "x")
    assert (status, "Boss is not a valid role" in err) == (1, True)
    listed = json.loads(run("users", "list", "-o", "json")[1])
    assert [(user["username"], user["roles"]) for user in listed] == [("ann", ["Viewer"])]
    assert run("users", "add-role", "-u", "ann", "-r", "Op")[1] == 'User "ann" added to role "Op"\n'
    assert run("users", "add-role", "-u", "ann", "-r", "Op")[0] == 1
    assert run("users", "remove-role", "-e", "ann@example.org", "-r", "Viewer")[0] == 0
    assert run("users", "remove-role", "-u", "ann", "-r", "Viewer")[0] == 1
    store = UserStore(database)
    assert store.user("ann").roles == ("Op",)
    assert run("users", "reset-password", "-u", "ann", "-p", "other")[0] == 0
    assert store.has_password("ann", "other")
    assert run("users", "delete", "-u", "ann", "-e", "ann@example.org")[0] == 1
    assert run("users", "delete", "-u", "ann")[1] == 'User "ann" deleted\n'
    status, _, err = run("users", "delete", "-u", "ann")
    assert (status, err) == (1, 'User "ann" does not exist\n')
    rows = list(AuditTrail(database).rows())
    assert "cli_users_create.done" in {row.event for row in rows}
    assert "hidden" not in str(rows)


@pytest.mark.integration
def test_roles_are_listed_made_and_removed(run: Run) -> None:
    assert run("roles", "create", "Reader", "Writer")[1] == "Added 2 role(s)\n"
    names = [role["name"] for role in json.loads(run("roles", "list", "-o", "json")[1])]
    assert names == ["Admin", "Op", "Public", "Reader", "User", "Viewer", "Writer"]
    rows = json.loads(run("roles", "list", "-p", "-o", "json")[1])
    assert {
        "name": "User",
        "resource": "DAG Runs",
        "action": "can_create,can_delete,can_edit,can_read,menu_access",
    } in rows
    assert run("roles", "delete", "Reader", "Writer")[1] == "Deleted 2 role(s)\n"
    assert run("roles", "delete", "Reader")[0] == 1
    assert run("roles", "delete", "Admin")[0] == 1


@pytest.mark.integration
def test_permissions_of_roles_are_given_and_taken_and_carried_to_another_deployment(
    run: Run, database: str, tmp_path: Path
) -> None:
    run("roles", "create", "Quiet")
    assert run("roles", "add-perms", "Quiet", "-r", "DAGs", "DAG Runs", "-a", "can_read", "can_edit")[:2] == (
        0,
        "Added can edit on DAG Runs to role Quiet\nAdded can read on DAG Runs to role Quiet\n"
        "Added can edit on DAGs to role Quiet\nAdded can read on DAGs to role Quiet\nAdded 4 permission(s)\n",
    )
    assert run("roles", "add-perms", "Quiet", "-r", "DAGs", "-a", "can_read")[1] == "Added 0 permission(s)\n"
    assert run("roles", "del-perms", "Quiet", "-r", "DAGs", "-a", "can_edit")[1] == (
        "Deleted can edit on DAGs from role Quiet\nDeleted 1 permission(s)\n"
    )
    assert run("roles", "del-perms", "Quiet", "-r", "DAG Runs")[1].endswith("Deleted 2 permission(s)\n")
    store = UserStore(database)
    assert store.role("Quiet").permissions == {("can_read", "DAGs")}
    for words, said in (
        (("None", "-r", "DAGs", "-a", "can_read"), "Role named 'None' does not exist\n"),
        (("Quiet", "-r", "Cats", "-a", "can_read"), "Resource named 'Cats' does not exist\n"),
        (("Quiet", "-r", "DAGs", "-a", "can_fly"), "Action named 'can_fly' does not exist\n"),
        (("Viewer", "-r", "Users", "-a", "can_edit"), "Viewer is one of Airflow's own roles and stays as it is\n"),
    ):
        assert run("roles", "add-perms", *words) == (1, "", said)
    changed = [row for row in AuditTrail(database).rows() if row.event == "cli_roles_del_perms.done"]
    assert json.loads(str(changed[0].old)) == {"Quiet": sorted(
        f"{action} on {resource}" for action in ("can_read", "can_edit") for resource in ("DAGs", "DAG Runs")
    )}  # fmt: skip

    file = tmp_path / "roles.json"
    _, out, _ = run("roles", "export", str(file), "--pretty")
    rows = json.loads(file.read_text())
    assert {"name": "Quiet", "resource": "DAGs", "action": "can_read"} in rows
    assert out == f"5 roles with {len(rows)} linked permissions successfully exported to {file}\n"
    run("roles", "delete", "Quiet")
    assert run("roles", "import", str(file))[1] == "roles and permissions successfully imported\n"
    assert store.role("Quiet").permissions == {("can_read", "DAGs")}
    file.write_text(json.dumps([{"name": "Quiet", "resource": "DAGs", "action": "can_edit"}, {"name": "Bare"}]))
    assert run("roles", "import", str(file))[0] == 0
    assert store.role("Quiet").permissions == {("can_read", "DAGs")}, "what is there stays as it is"
    assert store.role("Bare").permissions == frozenset()
    for text, said in (
        ("{", "is not valid JSON"), ("{}", "is not a JSON list"), ("[1]", "Item 0 of"), ('[{"name": ""}]', "no role"),
        ('[{"name": "X", "resource": "Cats", "action": "can_read"}]', "Resource named 'Cats'"),
        ('[{"name": "X", "resource": "DAGs", "action": "fly"}]', "Action named 'fly'"),
    ):  # fmt: skip
        file.write_text(text)
        status, _, err = run("roles", "import", str(file))
        assert (status, said in err) == (1, True), err
    assert run("roles", "import", "none.json")[2] == "File 'none.json' does not exist\n"
    assert "X" not in {role.name for role in store.roles()}


@pytest.mark.integration
def test_users_are_carried_to_another_deployment_without_their_passwords(
    run: Run, database: str, tmp_path: Path
) -> None:
    run("users", "create", *ANN, "-r", "Viewer", "-p", "hidden")
    file = tmp_path / "users.json"
    assert run("users", "export", str(file))[1] == f"1 users successfully exported to {file}\n"
    (row,) = json.loads(file.read_text())
    assert row == {
        "id": row["id"], "username": "ann", "email": "ann@example.org", "firstname": "Ann", "lastname": "Other",
        "roles": ["Viewer"],
    }  # fmt: skip
    bob = {"username": "bob", "email": "bob@example.org", "firstname": "Bob", "lastname": "B", "roles": ["Op", "User"]}
    file.write_text(json.dumps([{**row, "roles": ["User"], "lastname": "New"}, bob]))
    status, out, err = run("users", "import", str(file))
    assert (status, out) == (
        0,
        "Created the following users:\n\tbob@example.org\nUpdated the following users:\n\tann@example.org\n",
    )
    assert "reset-password" in err
    store = UserStore(database)
    assert (store.user("ann").roles, store.user("ann").last_name) == (("User",), "New")
    assert store.has_password("ann", "hidden")
    assert store.user("bob").roles == ("Op", "User")
    assert not store.has_password("bob", "")
    for rows, said in (
        ([{**bob, "roles": ["Boss"]}], "Boss is not a valid role"),
        ([{**bob, "username": "rob"}], "Changing the username is not allowed"),
        ([bob, {"username": "x"}], "[Item 1]\n\temail: ['Not a valid string.']"),
        ([1], "[Item 0]\n\t_schema"),
        ([{**bob, "email": "new@example.org"}], "username 'bob' is taken"),
    ):
        file.write_text(json.dumps(rows))
        status, _, err = run("users", "import", str(file))
        assert (status, said in err) == (1, True), err
    assert "cli_users_import.done" in {row.event for row in AuditTrail(database).rows()}


@pytest.mark.integration
def test_clinical_users_does_the_same_and_has_tokens(run: Run, database: str) -> None:
    assert run("clinical", "users", "create", "ann", "-p", "right")[0] == 0
    assert run("clinical", "users", "roles", "ann", "User", "Op")[0] == 0
    listed = json.loads(run("clinical", "users", "list", "--json")[1])
    assert [(row["username"], row["roles"]) for row in listed["rows"]] == [("ann", ["Op", "User"])]
    status, out, _ = run("clinical", "users", "token", "create", "ann", "--name", "nightly", "--days", "1")
    assert status == 0
    store = UserStore(database)
    admission = store.token(out.strip())
    assert admission is not None
    assert admission.identity.name == "ann"
    assert "nightly" in run("clinical", "users", "token", "list")[1]
    (number,) = [str(token.id) for token in store.tokens("ann")]
    assert run("clinical", "users", "token", "revoke", number)[0] == 0
    assert store.token(out.strip()) is None
    assert run("clinical", "users", "token", "revoke", number)[0] == 1
    assert run("clinical", "users", "delete", "ann")[0] == 0
    assert out.strip() not in str(list(AuditTrail(database).rows()))


@pytest.mark.integration
def test_a_viewer_changes_nothing_by_commands(run: Run, database: str) -> None:
    run("clinical", "users", "create", "vera", "-p", "see")
    run("variables", "set", "colour", "red")
    vera = {"user": "vera", "password": "see"}
    refused = [
        ("variables", "set", "colour", "blue"),
        ("variables", "get", "colour"),
        ("dags", "trigger", "clinical_data_pipeline"),
        ("dags", "pause", "clinical_data_pipeline"),
        ("pools", "set", "a", "1", "b"),
        ("users", "add-role", "-u", "vera", "-r", "Admin"),
        ("users", "import", "users.json"),
        ("roles", "add-perms", "Viewer", "-r", "DAGs", "-a", "can_edit"),
        ("roles", "import", "roles.json"),
        ("dags", "backfill", "clinical_data_pipeline", "-s", "2025-10-25"),
        ("dags", "test", "clinical_data_pipeline"),
        ("users", "reset-password", "-u", "admin", "-p", "x"),
        ("clinical", "users", "roles", "vera", "Admin"),
        ("clinical", "cohort", "build", "any"),
        ("clinical", "models", "promote", "1"),
        ("clinical", "audit", "list"),
    ]
    for words in refused:
        status, _, err = run(*words, **vera)
        assert status == 1, words
        assert "vera may not do this" in err, words
        assert "Viewer" in err
    assert run("variables", "get", "colour")[1] == "red\n"
    assert run("db", "check", **vera)[0] == 0
    assert run("clinical", "users", "password", "vera", "-p", "new", **vera)[0] == 0, "one's own password"
    assert UserStore(database).has_password("vera", "new")
    events = {(row.event, row.who) for row in AuditTrail(database).rows()}
    assert ("cli_variables_set.refused", "vera") in events
    assert ("cli_dag_trigger.refused", "vera") in events


@pytest.mark.integration
def test_a_named_user_acts_with_its_own_roles_and_name(run: Run, database: str) -> None:
    run("clinical", "users", "create", "otto", "-r", "Op", "-p", "right")
    assert run("variables", "set", "colour", "blue", user="otto", password="right")[0] == 0
    status, _, err = run("variables", "set", "colour", "red", user="otto", password="wrong")
    assert (status, "CLINICAL_USER" in err, "wrong" in err) == (1, True, False)
    events = [(row.event, row.who) for row in AuditTrail(database).rows()]
    assert ("cli_variables_set", "otto") in events
    assert events[-1] == ("login_failed", "?")
    assert run("variables", "get", "colour")[1] == "blue\n"
