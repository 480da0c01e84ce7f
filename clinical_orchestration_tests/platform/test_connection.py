"""Connections as URI, JSON and fields, and what they mean for clients."""

from __future__ import annotations

import json
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clinical_orchestration.configuration import CONNECTION_TYPES, default_connections
from clinical_orchestration.platform.clients import CLIENT_NAMES, client_values
from clinical_orchestration.platform.connection import Connection, ConnectionFormatError, validate_key
from clinical_orchestration.settings import ClientSettings

SECRET = "p@ss/w:rd%"
QUOTED = quote(SECRET, safe="")
WORDS = st.text(st.characters(min_codepoint=33, max_codepoint=0x2FF, exclude_characters="[]"), min_size=1, max_size=12)
HOSTS = st.from_regex(r"[a-z][a-zA-Z0-9-]{0,10}(\.[a-z]{2,5})?", fullmatch=True)


@given(
    st.builds(
        Connection,
        conn_id=st.just("c"),
        conn_type=st.sampled_from(["postgres", "redis", "kafka", "google_cloud"]),
        host=st.none() | HOSTS,
        schema=st.none() | WORDS,
        login=st.none() | WORDS,
        password=st.none() | WORDS,
        port=st.none() | st.integers(1, 65535),
        extra=st.none()
        | st.dictionaries(WORDS, WORDS, min_size=1, max_size=3).map(json.dumps)
        | st.dictionaries(WORDS, st.integers() | st.booleans(), min_size=1, max_size=3).map(json.dumps),
    )
)
def test_a_uri_says_the_whole_connection(connection: Connection) -> None:
    again = Connection.from_uri("c", connection.uri())
    assert again.extra_dejson == connection.extra_dejson
    for name in ("conn_type", "host", "schema", "port", "login", "password"):
        # an authority without a login but with a password reads as an empty login
        assert (getattr(again, name) or None) == getattr(connection, name), name


@pytest.mark.parametrize(
    ("uri", "fields"),
    [
        # the examples of Airflow's documentation
        ("my-conn-type://my-login:my-password@my-host:5432/my-schema?param1=val1&param2=val2",
         ("my_conn_type", "my-login", "my-password", "my-host", 5432, "my-schema",
          {"param1": "val1", "param2": "val2"})),
        ("aws://?__extra__=%7B%22a%22%3A+%7B%22b%22%3A+1%7D%7D",
         ("aws", None, None, None, None, None, {"a": {"b": 1}})),
        ("spark://spark%3A%2F%2Fmaster:7077", ("spark", None, None, "spark://master", 7077, None, {})),
        ("http://https://user@host:443/v1", ("http", "user", None, "https://host", 443, "v1", {})),
        ("postgresql://h", ("postgres", None, None, "h", None, None, {})),
    ],
)  # fmt: skip
def test_airflows_uris_are_read(uri: str, fields: tuple[object, ...]) -> None:
    found = Connection.from_uri("c", uri)
    assert (
        found.conn_type, found.login, found.password, found.host, found.port, found.schema, found.extra_dejson
    ) == fields  # fmt: skip


@pytest.mark.parametrize("uri", ["no-uri", "a://b://c://d", "x://h:port/", f"user:{SECRET}@host"])
def test_what_is_no_uri_is_refused_without_showing_it(uri: str) -> None:
    with pytest.raises(ConnectionFormatError) as raised:
        Connection.from_uri("c", uri)
    assert SECRET not in str(raised.value)


def test_both_ways_to_name_id_and_type_are_read() -> None:
    ours = Connection.from_mapping({"id": "a", "type": "kafka", "port": "9092", "extra": {"x": 1}})
    stock = Connection.from_mapping({"conn_type": "kafka", "port": 9092, "extra": '{"x": 1}'}, "a")
    assert ours == stock


@pytest.mark.parametrize(
    "values",
    [{"type": "kafka"}, {"id": "a", "hots": "h"}, {"id": "a", "port": "many"}, {"id": "a", "port": 70000},
     {"id": "a", "uri": "x://h", "host": "h"}, {"id": "a", "extra": "{}", "extra_dejson": {"a": 1}}],
)  # fmt: skip
def test_wrong_fields_are_refused(values: dict[str, object]) -> None:
    with pytest.raises(ConnectionFormatError):
        Connection.from_mapping(values)


def test_no_secret_is_shown() -> None:
    connection = Connection("c", "x", None, "h", "s", "me", SECRET, 1, json.dumps({"api_key": SECRET, "region": "eu"}))
    shown = f"{connection!r} {connection.masked_uri()} {connection.masked().uri()} {connection.masked().as_mapping()}"
    assert SECRET not in shown
    assert "p%40ss" not in shown
    assert "eu" in shown


@pytest.mark.parametrize("key", ["a b", "a/b", "", "ä" * 251, "a;drop"])
def test_names_follow_airflows_rule(key: str) -> None:
    with pytest.raises(ConnectionFormatError):
        validate_key(key)
    validate_key("slack.webhook-1_x")


@pytest.mark.parametrize(
    ("conn_id", "uri", "said"),
    [
        ("minio_storage", "s3://key:secret@minio:9000", {
            "AWS_ENDPOINT_URL": "http://minio:9000", "AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret"}),
        ("minio_storage", "s3://?endpoint_url=https%3A%2F%2Fs3.eu%2F&region_name=eu&aws_access_key_id=k", {
            "AWS_ENDPOINT_URL": "https://s3.eu", "AWS_REGION": "eu", "AWS_ACCESS_KEY_ID": "k"}),
        ("redis_features", "redis://:p%40ss@cache/2", {"REDIS_URL": "redis://:p%40ss@cache:6379/2"}),
        ("redis_features", "redis://cache:1?ssl=true&db=3", {"REDIS_URL": "rediss://cache:1/3"}),
        ("kafka_clinical", "kafka://k", {"KAFKA_BOOTSTRAP_SERVERS": "k:9092"}),
        ("kafka_clinical", "kafka://?bootstrap.servers=a:1,b:2&security.protocol=SSL", {
            "KAFKA_BOOTSTRAP_SERVERS": "a:1,b:2", "KAFKA_CLIENT_OPTIONS": '{"security.protocol": "SSL"}'}),
        ("mlflow_tracking", "http://https://me:pw@mlflow:443", {
            "MLFLOW_TRACKING_URI": "https://mlflow:443", "MLFLOW_TRACKING_USERNAME": "me",
            "MLFLOW_TRACKING_PASSWORD": "pw"}),
        ("spark_cluster", "spark://spark-connect", {"SPARK_REMOTE": "sc://spark-connect:15002"}),
        ("spark_cluster", "spark://spark%3A%2F%2Fmaster:7077", {}),
        ("model_serving", "http://serving:8000/https", {"SERVING_URL": "https://serving:8000"}),
        ("clinical_gateway", "http://gateway:8081", {"GATEWAY_URL": "http://gateway:8081"}),
        ("lab_processor", "http://lab:8083", {}),
        ("lab_processor", "http://u:p@mq/https?queue_manager=QM1&queue=LAB", {
            "CLINICAL_MQ_URL": "https://mq:9443", "CLINICAL_MQ_USER": "u", "CLINICAL_MQ_PASSWORD": "p",
            "CLINICAL_MQ_QUEUE_MANAGER": "QM1", "CLINICAL_MQ_QUEUE": "LAB"}),
        ("somebody_elses", "http://h", {}),
    ],
)  # fmt: skip
def test_a_connection_says_what_its_client_needs(conn_id: str, uri: str, said: dict[str, str]) -> None:
    assert client_values(Connection.from_uri(conn_id, uri)) == said


def test_default_connections_say_what_the_settings_say_and_no_secret() -> None:
    settings = ClientSettings.model_validate(
        {
            "AWS_ENDPOINT_URL": "https://s3.example:9443", "AWS_SECRET_ACCESS_KEY": SECRET,
            "REDIS_URL": f"redis://:{QUOTED}@cache:6380/1", "KAFKA_BOOTSTRAP_SERVERS": "a:1,b:2",
            "MLFLOW_TRACKING_URI": "http://m:5001", "SPARK_REMOTE": "sc://spark:15003/;token=x",
            "SERVING_URL": "http://s:8001", "GATEWAY_URL": "http://g:8082",
            "POSTGRES_URL": f"postgresql://u:{QUOTED}@p:1/d",
        }
    )  # fmt: skip
    found = {connection.conn_id: connection for connection in default_connections(settings)}

    assert list(found) == list(CONNECTION_TYPES)
    assert {one for one in CLIENT_NAMES if one not in found} == set()
    said = {name: value for connection in found.values() for name, value in client_values(connection).items()}
    assert said == {
        "AWS_ENDPOINT_URL": "https://s3.example:9443", "REDIS_URL": "redis://cache:6380/1",
        "KAFKA_BOOTSTRAP_SERVERS": "a:1,b:2", "MLFLOW_TRACKING_URI": "http://m:5001",
        "SPARK_REMOTE": "sc://spark:15003", "SERVING_URL": "http://s:8001", "GATEWAY_URL": "http://g:8082",
    }  # fmt: skip
    assert not any(connection.password or connection.extra for connection in found.values())
    assert (found["postgres_mlflow"].host, found["postgres_mlflow"].port, found["postgres_mlflow"].schema) == (
        "p", 1, "mlflow",
    )  # fmt: skip
