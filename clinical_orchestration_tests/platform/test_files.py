"""Files of connections, variables and pools, in every shape that people have."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from clinical_orchestration.configuration import CONNECTION_TYPES, POOL_DESCRIPTIONS, default_variables
from clinical_orchestration.contract import POOLS
from clinical_orchestration.platform.connection import Connection
from clinical_orchestration.platform.files import (
    ImportFileError,
    is_masked,
    is_masked_variable,
    read_connections,
    read_pools,
    read_variables,
)

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
SECRET = "s3cr3t-value"

LIST = """
connections:
  - id: kafka_clinical
    type: kafka
    host: kafka
    port: 9092
    extra: '{"security.protocol": "PLAINTEXT"}'
  - id: redis_features
    type: redis
    host: redis
    port: "6379"
    login: me
    password: "pw"
    schema: "0"
    extra: |
      {"ssl": false}
"""
STOCK = {
    "kafka_clinical": {
        "conn_type": "kafka", "host": "kafka", "port": 9092, "login": "", "password": None, "schema": "",
        "extra": {"security.protocol": "PLAINTEXT"},
    },
    "redis_features": {
        "conn_type": "redis", "host": "redis", "port": 6379, "login": "me", "password": "pw", "schema": "0",
        "extra": '{"ssl": false}',
    },
}  # fmt: skip
ENV = (
    "# a comment\n\n"
    "kafka_clinical=kafka://kafka:9092/?security.protocol=PLAINTEXT\n"
    f"redis_features={json.dumps(STOCK['redis_features'])}\n"
)


@pytest.mark.parametrize(
    ("name", "text"),
    [("a.yaml", LIST), ("a.yml", yaml.safe_dump(STOCK)), ("a.json", json.dumps(STOCK)), ("a.env", ENV),
     ("b.json", json.dumps(yaml.safe_load(LIST))), (".env", ENV)],
)  # fmt: skip
def test_all_shapes_of_connections_say_the_same(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)

    found = read_connections(tmp_path / name)

    assert list(found) == ["kafka_clinical", "redis_features"]
    kafka, redis = found.values()
    assert (kafka.conn_type, kafka.host, kafka.port, kafka.login, kafka.password) == (
        "kafka",
        "kafka",
        9092,
        None,
        None,
    )
    assert kafka.extra_dejson == {"security.protocol": "PLAINTEXT"}
    assert (redis.login, redis.password, redis.schema, redis.port) == ("me", "pw", "0", 6379)
    assert redis.extra_dejson == {"ssl": False}


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("a.txt", "", "Unsupported file format"),
        ("a.yaml", "", "The file is empty"),
        ("a.yaml", "- 1", "should contain the object"),
        ("a.json", "{", "Invalid json file"),
        ("a.yaml", f"a: [{SECRET}", "Invalid yaml file"),
        ("a.json", '{"a": {"conn_type": "x"}, "a": {"conn_type": "y"}}', "Found multiple values for a"),
        ("a.env", f"a=x://h\na=x://:{SECRET}@h\n", "Found multiple values for a"),
        ("a.env", SECRET, "line 1: The line should contain"),
        ("a.env", "a=", "line 1: Key or value is empty"),
        ("a.yaml", "connections: [{type: kafka}]", "entry 1 under connections"),
        ("a.yaml", f"a: {{conn_type: x, password: {SECRET}, port: y}}", "Expected integer value"),
        ("a.yaml", "a: 5", "neither a URI nor an object"),
    ],
)
def test_what_is_wrong_in_a_file_is_said_and_no_secret(tmp_path: Path, name: str, text: str, says: str) -> None:
    (tmp_path / name).write_text(text)

    with pytest.raises(ImportFileError, match=says) as raised:
        read_connections(tmp_path / name)

    assert SECRET not in str(raised.value)
    assert raised.value.__cause__ is None


def test_an_export_is_read_back(tmp_path: Path) -> None:
    connection = Connection("c", "x", "about", "h", "s", "me", SECRET, 1, '{"a": 1}')
    (tmp_path / "a.json").write_text(json.dumps({"c": connection.as_mapping()}))
    (tmp_path / "a.env").write_text(f"c={connection.uri()}\n")

    assert read_connections(tmp_path / "a.json") == {"c": connection}
    assert read_connections(tmp_path / "a.env")["c"].password == SECRET


def test_what_was_shown_is_known_as_masked(tmp_path: Path) -> None:
    connection = Connection("c", "x", password=SECRET, extra=json.dumps({"token": SECRET}))
    (tmp_path / "a.json").write_text(json.dumps({"c": connection.masked().as_mapping()}))
    (tmp_path / "v.json").write_text('{"my_token": "***", "stars": "***"}')

    assert is_masked(read_connections(tmp_path / "a.json")["c"])
    assert not is_masked(connection)
    assert [is_masked_variable(write) for write in read_variables(tmp_path / "v.json").values()] == [True, False]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("v.json", '{"a": "x", "b": {"c": [1]}, "d": 1000, "e": null, "f": true}'),
        ("v.yaml", "a: x\nb: {c: [1]}\nd: 1000\ne:\nf: true\n"),
        ("v.yml", "variables:\n- {key: a, value: x, description: about}\n- {key: b, value: {c: [1]}}\n"
                  "- {key: d, value: 1000}\n- {key: e, value: }\n- {key: f, value: true}\n"),
        ("w.json", '{"variables": {"a": {"value": "x", "description": "about"}, "b": {"c": [1]}, "d": 1000, "e": "", '
                   '"f": true}}'),
    ],
)  # fmt: skip
def test_all_shapes_of_variables_say_the_same(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)

    found = read_variables(tmp_path / name)

    assert {key: write.value for key, write in found.items()} == {
        "a": "x", "b": json.dumps({"c": [1]}, indent=2), "d": "1000", "e": "", "f": "true",
    }  # fmt: skip
    assert found["a"].description in (None, "about")


def test_a_variable_without_a_value_is_refused(tmp_path: Path) -> None:
    (tmp_path / "v.yaml").write_text("variables:\n- key: a\n")
    with pytest.raises(ImportFileError, match="a has no value"):
        read_variables(tmp_path / "v.yaml")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("p.json", '{"a": {"slots": 5, "description": "x", "include_deferred": true}, "b": {"slots": -1, '
                   '"description": ""}, "bad": {"description": "x"}, "worse": 3, "no name": {"slots": 1}, '
                   '"few": {"slots": -2}}'),
        ("p.yaml", "pools:\n- {name: a, slots: 5, description: x, include_deferred: true}\n- {name: b, slots: '-1'}\n"
                   "- {name: bad}\n- {name: worse, slots: many}\n- {name: no name, slots: 1}\n"
                   "- {name: few, slots: -2}\n"),
    ],
)  # fmt: skip
def test_all_shapes_of_pools_say_the_same(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)

    pools, failed = read_pools(tmp_path / name)

    assert [(pool.name, pool.slots, pool.info.description, pool.info.include_deferred) for pool in pools] == [
        ("a", 5, "x", True),
        ("b", -1, "", False),
    ]
    assert failed == ["bad", "worse", "no name", "few"]


def test_the_shipped_templates_have_the_contract_and_no_secret() -> None:
    connections = read_connections(DEPLOY / "connections.yaml")
    variables = read_variables(DEPLOY / "variables.yaml")
    pools, failed = read_pools(DEPLOY / "pools.yaml")

    assert {name: one.conn_type for name, one in connections.items()} == {
        name: conn_type for name, (conn_type, _) in CONNECTION_TYPES.items()
    }
    assert not any(one.password for one in connections.values())
    defaults = {write.key: write for write in default_variables()}
    assert variables == {key: defaults[key] for key in variables}
    assert len(variables) == 20
    assert not failed
    assert {pool.name: pool.slots for pool in pools} == POOLS
    assert {pool.name: pool.info.description for pool in pools} == POOL_DESCRIPTIONS
