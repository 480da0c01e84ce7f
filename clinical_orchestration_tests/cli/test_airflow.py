"""``airflow connections | variables | pools``: messages, exit statuses, formats, and no secret on the screen."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml

from clinical_orchestration.cli.airflow import main
from clinical_orchestration.configuration import CONNECTION_TYPES, load_defaults
from clinical_orchestration.contract import POOLS
from clinical_orchestration.platform.connection import Connection
from clinical_orchestration.platform.crypto import new_key
from clinical_orchestration.platform.store import PlatformStore
from clinical_orchestration.settings import Variables

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
SECRET = "s3cr3t-value"


class Answer(NamedTuple):
    status: int
    out: str
    err: str


Airflow = Callable[..., Answer]


@pytest.fixture
def airflow(capfd: pytest.CaptureFixture[str]) -> Airflow:
    def run(*arguments: str) -> Answer:
        capfd.readouterr()
        try:
            status = main([str(one) for one in arguments])
        except SystemExit as error:
            status = int(error.code or 0)
        answer = Answer(status, *capfd.readouterr())
        assert SECRET not in answer.out + answer.err
        return answer

    return run


@pytest.fixture
def store(database: str) -> PlatformStore:
    return PlatformStore(database)


@pytest.fixture
def dagster_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Dagster instance with its storage in files."""
    home = tmp_path / "dagster"
    home.mkdir()
    (home / "dagster.yaml").write_text("telemetry:\n  enabled: false\n")
    monkeypatch.setenv("DAGSTER_HOME", str(home))
    return home


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


# ------------------------------------------------------------------------------------------------------------- general


@pytest.mark.parametrize("arguments", [[], ["connections"], ["nonsense"], ["variables", "set", "only-a-key"]])
def test_what_is_not_understood_gives_the_help_and_status_2(airflow: Airflow, arguments: list[str]) -> None:
    answer = airflow(*arguments)
    assert answer.status == 2
    assert "usage: airflow" in answer.out
    assert "see help above" in answer.err


def test_without_a_database_it_is_said_what_to_do(
    airflow: Airflow, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    answer = airflow("variables", "list")
    assert answer.status == 1
    assert "POSTGRES_URL is not set" in answer.err

    monkeypatch.delenv("POSTGRES_URL")
    monkeypatch.setenv("CLINICAL_HOME", str(tmp_path))
    assert airflow("connections", "list").status == 1


def test_a_database_that_is_down_is_said_without_its_password(
    airflow: Airflow, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("POSTGRES_URL", f"postgresql://me:{SECRET}@127.0.0.1:9/db")
    answer = airflow("connections", "list")
    assert answer.status == 1
    assert "PostgreSQL at 127.0.0.1:9/db does not answer" in answer.err


def test_the_embedded_stack_is_found_from_any_shell(
    airflow: Airflow, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from clinical_orchestration.stack.settings import StackSettings

    # what the command takes from the stack is undone with these
    for name in StackSettings.load(tmp_path / "other").environment():
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setenv("CLINICAL_HOME", str(tmp_path / "home"))
    settings = StackSettings.load(tmp_path / "home", ports={"postgres": 9})
    settings.secrets()
    settings.save()

    answer = airflow("variables", "list")

    assert "PostgreSQL at 127.0.0.1:9/clinical does not answer" in answer.err
    assert os.environ["CLINICAL_FERNET_KEY"] == settings.secrets().fernet_key.get_secret_value()


# --------------------------------------------------------------------------------------------------------- connections


@pytest.mark.integration
def test_the_contracts_connections_are_imported_over_the_defaults(airflow: Airflow, store: PlatformStore) -> None:
    load_defaults(store)

    answer = airflow("connections", "import", DEPLOY / "connections.yaml")

    assert answer == (0, "".join(f"Imported connection {one}\n" for one in yaml_ids()), "")
    listed = json.loads(airflow("connections", "list", "-o", "json").out)
    assert {one["conn_id"]: one["conn_type"] for one in listed} == {
        name: kind for name, (kind, _) in CONNECTION_TYPES.items()
    }
    minio = next(one for one in listed if one["conn_id"] == "minio_storage")
    assert minio["extra_dejson"] == {"endpoint_url": "http://minio:9000", "region_name": "us-east-1"}
    assert (minio["host"], minio["port"]) == ("minio", "9000")


def yaml_ids() -> list[str]:
    return [one["id"] for one in yaml.safe_load((DEPLOY / "connections.yaml").read_text())["connections"]]


@pytest.mark.integration
@pytest.mark.parametrize("kind", ["json", "yaml", "env"])
def test_connections_that_are_there_are_kept_unless_told_otherwise(
    airflow: Airflow, store: PlatformStore, tmp_path: Path, kind: str
) -> None:
    store.put_connection(Connection("a", "x", host="mine"))
    text = {
        "json": json.dumps({"a": {"conn_type": "x", "host": "file"}, "b": {"conn_type": "y", "password": SECRET}}),
        "yaml": f"a: {{conn_type: x, host: file}}\nb: {{conn_type: y, password: {SECRET}}}\n",
        "env": f"a=x://file\nb=y://:{SECRET}@\n",
    }[kind]
    (tmp_path / f"c.{kind}").write_text(text)

    first = airflow("connections", "import", tmp_path / f"c.{kind}")
    assert first.status == 0
    assert first.out == "Could not import connection a: connection already exists.\nImported connection b\n"
    assert store.connections()["a"].public.host == "mine"
    assert store.connections()["b"].connection().password == SECRET

    again = airflow("connections", "import", tmp_path / f"c.{kind}", "--overwrite")
    assert again.out == "Imported connection a\nImported connection b\n"
    assert store.connections()["a"].public.host == "file"


@pytest.mark.integration
def test_what_cannot_be_imported_is_said(airflow: Airflow, store: PlatformStore, tmp_path: Path) -> None:
    assert airflow("connections", "import", tmp_path / "none.yaml") == (1, "", "Missing connections file.\n")
    (tmp_path / "c.txt").write_text("")
    assert "Unsupported file format" in airflow("connections", "import", tmp_path / "c.txt").err
    (tmp_path / "c.json").write_text(
        json.dumps({"a b": {"conn_type": "x"}, "c": {"conn_type": "x", "password": "***"}})
    )
    answer = airflow("connections", "import", tmp_path / "c.json")
    assert answer.out.splitlines() == [
        "Could not import connection. The key 'a b' has to be made of alphanumeric characters, dashes, dots and "
        "underscores exclusively",
        "Could not import connection c: its secrets are masked in the file.",
    ]


@pytest.mark.integration
def test_a_connection_is_added_shown_and_deleted(airflow: Airflow, store: PlatformStore) -> None:
    added = airflow("connections", "add", "pg", "--conn-uri", f"postgresql://me:{SECRET}@db:5432/x?sslmode=require")
    assert added == (0, "Successfully added `conn_id`=pg : postgres://me:******@db:5432/x\n", "")
    again = airflow("connections", "add", "pg", "--conn-type", "postgres")
    assert again == (1, "", "A connection with `conn_id`=pg already exists.\n")

    got = yaml.safe_load(airflow("connections", "get", "pg", "--output", "yaml").out)[0]
    assert (got["password"], got["is_encrypted"], got["login"], got["port"]) == ("***", "True", "me", "5432")
    assert got["get_uri"] == "postgres://me:***@db:5432/x?sslmode=require"
    for output in ("table", "plain"):
        assert "postgres://me:***@db" in airflow("connections", "get", "pg", "-o", output).out.replace("\n", "")
    assert airflow("connections", "get", "none") == (1, "", "Connection not found.\n")

    assert airflow("connections", "delete", "pg").out == "Successfully deleted connection with `conn_id`=pg\n"
    assert airflow("connections", "delete", "pg") == (1, "", "Did not find a connection with `conn_id`=pg\n")


@pytest.mark.integration
def test_a_connection_is_added_from_fields_and_from_json(airflow: Airflow, store: PlatformStore) -> None:
    airflow(
        "connections", "add", "a", "--conn-type", "s3", "--conn-host", "h", "--conn-port", "1", "--conn-login", "l",
        "--conn-password", SECRET, "--conn-schema", "s", "--conn-description", "d", "--conn-extra", '{"secret": "x"}',
    )  # fmt: skip
    airflow("connections", "add", "b", "--conn-json", json.dumps({"conn_type": "s3", "extra": {"a": 1}}))

    found = {name: row.connection() for name, row in store.connections().items()}
    assert found["a"] == Connection("a", "s3", "d", "h", "s", "l", SECRET, 1, '{"secret": "x"}')
    assert found["b"].extra_dejson == {"a": 1}
    assert json.loads(airflow("connections", "get", "a", "-o", "json").out)[0]["extra_dejson"] == {"secret": "***"}


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["a"], "Must supply either conn-uri or conn-json if not supplying conn-type"),
        (["a", "--conn-uri", "x://h", "--conn-json", "{}"], "Cannot supply both conn-uri and conn-json"),
        (["a", "--conn-uri", "x://h", "--conn-host", "h"],
         "The following args are not compatible with the --conn-uri flag: ['conn_host']"),
        (["a", "--conn-json", "{}", "--conn-extra", "{}"],
         "The following args are not compatible with the --conn-json flag: ['--conn-extra']"),
        (["a", "--conn-json", '{"host": "h"}'], "conn-json is invalid; must supply conn-type"),
        (["a", "--conn-uri", f"no-uri-{SECRET}"], "Could not create connection. The URI of a is not"),
        (["a b", "--conn-type", "x"], "Could not create connection. The key 'a b' has to be made of"),
        (["a", "--conn-type", "x", "--conn-port", "many"], "Expected integer value for `port`"),
    ],
)  # fmt: skip
def test_what_cannot_be_added_is_said(airflow: Airflow, arguments: list[str], says: str) -> None:
    answer = airflow("connections", "add", *arguments)
    assert answer.status == 1
    assert says in answer.err


@pytest.mark.integration
def test_exports_have_secrets_in_private_files_only(airflow: Airflow, store: PlatformStore, tmp_path: Path) -> None:
    store.put_connection(Connection("a", "x", host="h", password=SECRET, extra=json.dumps({"token": SECRET})))

    shown = airflow("connections", "export", "-")
    assert json.loads(shown.out)["a"]["password"] == "***"
    assert "1 Connections successfully exported." in shown.err

    old_umask = os.umask(0)
    try:
        for name in ("c.json", "c.yaml", "c.env"):
            file = tmp_path / name
            file.write_text("wide open")
            answer = airflow("connections", "export", file)
            assert answer.out == f"1 Connections successfully exported to {file}.\n"
            assert mode(file) == 0o600
            assert SECRET in file.read_text()
    finally:
        os.umask(old_umask)

    for name in ("c.json", "c.yaml", "c.env"):
        airflow("connections", "delete", "a")
        assert airflow("connections", "import", tmp_path / name).out == "Imported connection a\n"
        found = store.connections()["a"].connection()
        assert (found.password, found.extra_dejson) == (SECRET, {"token": SECRET})

    assert (
        "only be used with file type"
        in airflow("connections", "export", tmp_path / "c.json", "--serialization-format", "json").err
    )
    assert "Unsupported file format" in airflow("connections", "export", tmp_path / "c.txt").err
    file = tmp_path / "d"
    assert airflow("connections", "export", file, "--file-format", "env", "--serialization-format", "JSON").status == 0
    assert file.read_text().startswith('a={"conn_type": "x"')
    assert airflow("connections", "export", tmp_path / "no" / "c.json").status == 1


@pytest.mark.integration
def test_with_a_wrong_key_the_list_stays_and_the_rest_says_why(
    airflow: Airflow, store: PlatformStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.put_connection(Connection("a", "x", host="h", password=SECRET))
    monkeypatch.setenv("CLINICAL_FERNET_KEY", new_key())

    listed = airflow("connections", "list", "-o", "json")
    assert listed.status == 0
    assert json.loads(listed.out)[0]["password"] == "***"
    assert "was encrypted with another key" in listed.err
    got = airflow("connections", "get", "a")
    assert (got.status, got.out) == (1, "")
    assert "the password of the connection a was encrypted with another key" in got.err


def test_the_connection_test_is_off_as_it_was(airflow: Airflow) -> None:
    answer = airflow("connections", "test", "a")
    assert answer.status == 1
    assert "Testing connections is disabled" in answer.err


@pytest.mark.integration
def test_it_is_told_which_connection_acts(
    airflow: Airflow, store: PlatformStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("REDIS_URL")
    store.put_connection(Connection("redis_features", "redis", host="cache", password=SECRET))
    told = {one["setting"]: one for one in json.loads(airflow("connections", "explain", "-o", "json").out)}
    assert (told["REDIS_URL"]["value"], told["REDIS_URL"]["source"]) == ("redis://:***@cache:6379/0", "PostgreSQL")


# ----------------------------------------------------------------------------------------------------------- variables


@pytest.mark.integration
def test_the_contracts_variables_are_imported_and_act(airflow: Airflow, store: PlatformStore, tmp_path: Path) -> None:
    load_defaults(store)
    text = (DEPLOY / "variables.yaml").read_text().replace("value: 0.95\n", "value: 0.9\n")
    (tmp_path / "v.yaml").write_text(text)

    assert airflow("variables", "import", tmp_path / "v.yaml").out == "20 of 20 variables successfully updated.\n"

    assert Variables().data_quality_threshold == 0.9
    assert airflow("variables", "get", "data_quality_threshold").out == "0.9\n"
    told = {one["name"]: one for one in json.loads(airflow("variables", "explain", "-o", "json").out)}
    assert (told["data_quality_threshold"]["value"], told["data_quality_threshold"]["source"]) == ("0.9", "PostgreSQL")


@pytest.mark.integration
def test_a_variable_is_set_read_and_deleted(airflow: Airflow, store: PlatformStore) -> None:
    assert airflow("variables", "set", "a", "x", "--description", "about").out == "Variable a created\n"
    assert store.variables()["a"].description == "about"
    assert airflow("variables", "get", "a").out == "x\n"
    assert airflow("variables", "list", "-o", "plain").out == "key\na\n"
    assert airflow("variables", "list", "-o", "json").out == '[{"key": "a"}]\n'
    assert airflow("variables", "delete", "a").out == "Variable a deleted\n"
    assert airflow("variables", "get", "a") == (1, "", "Variable a does not exist\n")
    assert airflow("variables", "get", "a", "-d", "else").out == "else\n"
    assert airflow("variables", "list").out == "No data found\n"


@pytest.mark.integration
def test_json_values_are_written_and_read(airflow: Airflow, store: PlatformStore) -> None:
    airflow("variables", "set", "a", '{"b": [1, 2], "token": "x"}')
    assert airflow("variables", "get", "a", "--json").out == "{'b': [1, 2], 'token': '***'}\n"
    airflow("variables", "set", "c", "text", "-j")
    assert store.variables()["c"].value() == '"text"'
    airflow("variables", "set", "d", "no json")
    assert airflow("variables", "get", "d", "-j").status == 1


@pytest.mark.integration
def test_a_secret_variable_is_never_shown(
    airflow: Airflow, store: PlatformStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    airflow("variables", "set", "slack_webhook_url", SECRET)
    airflow("variables", "set", "my_token", SECRET)
    airflow("variables", "set", "address", f"redis://:{SECRET}@h")

    for key in ("slack_webhook_url", "my_token"):
        assert airflow("variables", "get", key).out == "***\n"
    assert airflow("variables", "get", "address").out == "redis://:***@h\n"
    shown = airflow("variables", "export", "-")
    assert json.loads(shown.out)["my_token"] == "***"
    assert "3 Variables successfully exported." in shown.err

    file = tmp_path / "v.json"
    assert airflow("variables", "export", file).out == f"3 Variables successfully exported to {file}.\n"
    assert mode(file) == 0o600
    assert json.loads(file.read_text())["my_token"] == SECRET
    monkeypatch.setenv("CLINICAL_FERNET_KEY", "")
    assert "there is no key for secrets" in airflow("variables", "set", "my_token", "x").err
    answer = airflow("variables", "import", file)
    assert "1 of 3 variables successfully updated.\n2 variable(s) failed to be updated." in answer.out


@pytest.mark.integration
def test_an_export_of_variables_is_imported_unchanged(airflow: Airflow, store: PlatformStore, tmp_path: Path) -> None:
    values = {"a": "text", "b": '{\n  "c": 1\n}', "d": '{"c":1}', "e": "1.20", "f": "1000", "g": '"quoted"', "h": ""}
    for key, value in values.items():
        store.set_variable(key, value)
    airflow("variables", "export", tmp_path / "v.json")
    for key in values:
        store.delete_variable(key)
    airflow("variables", "import", tmp_path / "v.json")
    assert {key: row.value() for key, row in store.variables().items()} == values


@pytest.mark.integration
@pytest.mark.parametrize(
    ("action", "status", "says", "value"),
    [
        ("overwrite", 0, "2 of 2 variables successfully updated.\n", "file"),
        ("skip", 0, "1 of 2 variables successfully updated.\nThe variables with these keys: ['a'] were skipped because "
                    "they already exists\n", "mine"),
        ("fail", 1, "Failed. These keys: ['a'] already exists.\n", "mine"),
    ],
)  # fmt: skip
def test_existing_variables_are_treated_as_asked(
    airflow: Airflow, store: PlatformStore, tmp_path: Path, action: str, status: int, says: str, value: str
) -> None:
    load_defaults(store)
    store.set_variable("a", "mine")
    (tmp_path / "v.json").write_text('{"a": "file", "model_name": "file"}')

    answer = airflow("variables", "import", tmp_path / "v.json", "-a", action)

    assert (answer.status, answer.out + answer.err) == (status, says)
    assert store.variables()["a"].value() == value
    assert store.variables()["model_name"].value() == ("adverse-event-predictor" if action == "fail" else "file")


@pytest.mark.integration
def test_values_that_do_not_fit_are_refused(airflow: Airflow, store: PlatformStore, tmp_path: Path) -> None:
    answer = airflow("variables", "set", "data_quality_threshold", "7")
    assert answer == (
        1, "", "Variable data_quality_threshold was not set. Input should be less than or equal to 1\n",
    )  # fmt: skip
    assert airflow("variables", "set", "a b", "x").status == 1
    (tmp_path / "v.json").write_text('{"data_quality_threshold": "much", "a": 1}')
    out = airflow("variables", "import", tmp_path / "v.json").out
    assert "Variable import failed: Variable data_quality_threshold was not set." in out
    assert out.endswith("1 of 2 variables successfully updated.\n1 variable(s) failed to be updated.\n")
    assert airflow("variables", "import", tmp_path / "none.json") == (1, "", "Missing variables file.\n")
    (tmp_path / "bad.json").write_text("{")
    assert "Invalid variables file." in airflow("variables", "import", tmp_path / "bad.json").err


# --------------------------------------------------------------------------------------------------------------- pools


@pytest.mark.integration
def test_the_contracts_pools_are_imported_into_dagster(
    airflow: Airflow, store: PlatformStore, dagster_home: Path, tmp_path: Path
) -> None:
    from dagster import DagsterInstance

    from clinical_orchestration.instance import ensure_pools

    assert airflow("pools", "import", DEPLOY / "pools.yaml") == (0, "Uploaded 10 pool(s)\n", "")
    assert airflow("pools", "set", "spark_jobs", "7", "mine").out == "Pool spark_jobs created\n"
    with DagsterInstance.get() as instance:
        assert ensure_pools(instance) == {}
        limits = {pool.name: pool.limit for pool in instance.event_log_storage.get_pool_limits()}
    assert limits == {**POOLS, "spark_jobs": 7}

    got = json.loads(airflow("pools", "get", "spark_jobs", "-o", "json").out)
    assert got == [{"pool": "spark_jobs", "slots": "7", "description": "mine", "include_deferred": "False"}]
    assert len(json.loads(airflow("pools", "list", "-o", "json").out)) == 10

    file = tmp_path / "p.json"
    assert airflow("pools", "export", file).out == f"Exported 10 pools to {file}\n"
    assert json.loads(file.read_text())["spark_jobs"] == {"slots": 7, "description": "mine", "include_deferred": False}
    assert airflow("pools", "delete", "spark_jobs").out == "Pool spark_jobs deleted\n"
    assert airflow("pools", "get", "spark_jobs") == (1, "", "Pool spark_jobs does not exist\n")
    assert airflow("pools", "delete", "spark_jobs") == (1, "", "Pool spark_jobs does not exist\n")
    assert airflow("pools", "import", file).out == "Uploaded 10 pool(s)\n"
    assert json.loads(airflow("pools", "get", "spark_jobs", "-o", "json").out) == got


@pytest.mark.integration
def test_pools_that_cannot_be_are_said(
    airflow: Airflow, store: PlatformStore, dagster_home: Path, tmp_path: Path
) -> None:
    (tmp_path / "p.json").write_text('{"a": {"slots": 2, "description": ""}, "b": {"slots": 5000, "description": ""}, '
                                     '"c": {"description": ""}, "d": {"slots": -1, "description": ""}}')  # fmt: skip
    answer = airflow("pools", "import", tmp_path / "p.json")
    assert answer == (1, "", "Failed to update pool(s): c, b\n")
    assert json.loads(airflow("pools", "get", "d", "-o", "json").out)[0]["slots"] == "1000"
    assert "Bad value for `slots`: -2" in airflow("pools", "set", "a", "--", "-2", "x").err
    assert airflow("pools", "import", tmp_path / "none.json").err == f"Missing pools file {tmp_path / 'none.json'}\n"


def test_without_an_instance_pools_say_what_to_do(airflow: Airflow, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POSTGRES_URL", "postgresql://127.0.0.1:9/x")
    monkeypatch.delenv("DAGSTER_HOME", raising=False)
    answer = airflow("pools", "list")
    assert answer.status == 1
    assert "DAGSTER_HOME is not set" in answer.err


@pytest.mark.integration
def test_secrets_are_rotated(airflow: Airflow, store: PlatformStore, monkeypatch: pytest.MonkeyPatch) -> None:
    store.put_connection(Connection("a", "x", password=SECRET, extra='{"a": 1}'))
    old, new = os.environ["CLINICAL_FERNET_KEY"], new_key()
    monkeypatch.setenv("CLINICAL_FERNET_KEY", f"{new},{old}")
    assert airflow("rotate-fernet-key").out == "2 secrets encrypted with the first key of CLINICAL_FERNET_KEY.\n"
    monkeypatch.setenv("CLINICAL_FERNET_KEY", new)
    assert airflow("connections", "get", "a").status == 0
