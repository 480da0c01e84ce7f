"""Variables and connections in PostgreSQL, and how settings read them."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import psycopg2
import pytest

from clinical_orchestration import configuration
from clinical_orchestration.configuration import CONNECTION_TYPES, explain, load_defaults
from clinical_orchestration.contract import POOLS
from clinical_orchestration.platform import reading
from clinical_orchestration.platform.connection import Connection
from clinical_orchestration.platform.crypto import Cipher, SecretKeyError, new_key
from clinical_orchestration.platform.store import PlatformStore, PoolInfo, StoreUnavailableError, VariableWrite
from clinical_orchestration.settings import ClientSettings, Variables, connection

pytestmark = pytest.mark.integration

SECRET = "s3cr3t-value"
CLIENT_VARIABLES = ("AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_REGION", "REDIS_URL")


def rows(url: str, query: str) -> list[tuple[object, ...]]:
    connection = psycopg2.connect(url)
    try:
        with connection, connection.cursor() as cursor:
            cursor.execute(query)
            return cursor.fetchall()
    finally:
        connection.close()


def test_reading_makes_no_tables(database: str) -> None:
    store = PlatformStore(database)
    assert (store.variables(), store.connections(), store.pools()) == ({}, {}, {})
    assert rows(database, "select count(*) from pg_tables where tablename like 'clinical%'") == [(0,)]


def test_many_first_writers_at_once_make_the_tables_once(database: str) -> None:
    def write(number: int) -> None:
        PlatformStore(database).set_variable(f"v{number}", str(number))
        PlatformStore(database).put_connection(Connection(f"c{number}", "x"))

    with ThreadPoolExecutor(12) as pool:
        list(pool.map(write, range(24)))

    store = PlatformStore(database)
    assert {key: row.value() for key, row in store.variables().items()} == {f"v{n}": str(n) for n in range(24)}
    assert len(store.connections()) == 24


def test_processes_that_start_at_once_load_the_defaults_once(database: str) -> None:
    code = (
        "import os; from clinical_orchestration.configuration import load_defaults\n"
        "from clinical_orchestration.platform.store import PlatformStore\n"
        "print(len(load_defaults(PlatformStore(os.environ['POSTGRES_URL']))))"
    )
    processes = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(3)]
    counts = sorted(int(process.communicate(timeout=90)[0]) for process in processes)

    wanted = len(Variables.model_fields) + len(CONNECTION_TYPES) + len(POOLS)
    assert counts == [0, 0, wanted]


def test_secrets_are_encrypted_and_others_are_not(database: str) -> None:
    store = PlatformStore(database)
    store.set_variable("slack_webhook_url", SECRET)
    store.set_variable("model_name", "plain")
    store.put_connection(Connection("c", "x", password=SECRET, extra=json.dumps({"token": SECRET})))

    written = str(rows(database, "select * from clinical_variable")) + str(
        rows(database, "select * from clinical_connection")
    )
    assert SECRET not in written
    assert "plain" in written
    assert store.variables()["slack_webhook_url"].value() == SECRET
    assert store.connections()["c"].connection().password == SECRET
    assert SECRET not in repr(store.variables()) + repr(store.connections()) + repr(store)


def test_without_a_key_secrets_are_refused_and_others_are_stored(database: str) -> None:
    store = PlatformStore(database, Cipher(""))
    store.set_variable("model_name", "x")
    store.put_connection(Connection("c", "x", host="h"))
    with pytest.raises(SecretKeyError, match="the variable my_token is a secret"):
        store.set_variable("my_token", SECRET)
    with pytest.raises(SecretKeyError, match="the password of the connection d"):
        store.put_connection(Connection("d", "x", password=SECRET))
    assert (set(store.variables()), set(store.connections())) == ({"model_name"}, {"c"})


def test_a_rotation_is_whole_or_not_at_all(database: str) -> None:
    old, new = new_key(), new_key()
    PlatformStore(database, Cipher(old)).put_connection(Connection("c", "x", password=SECRET, extra='{"a": 1}'))
    PlatformStore(database, Cipher(old)).set_variable("a_token", SECRET)
    PlatformStore(database, Cipher(new_key())).set_variable("b_token", SECRET)
    before = rows(database, "select key, value from clinical_variable order by key")

    with pytest.raises(SecretKeyError, match="the variable b_token"):
        PlatformStore(database, Cipher(f"{new},{old}")).rotate()
    assert rows(database, "select key, value from clinical_variable order by key") == before

    PlatformStore(database).delete_variable("b_token")
    assert PlatformStore(database, Cipher(f"{new},{old}")).rotate() == 3
    store = PlatformStore(database, Cipher(new))
    assert store.variables()["a_token"].value(store.cipher) == SECRET
    assert store.connections()["c"].connection(store.cipher).extra == '{"a": 1}'


def test_a_variable_acts_in_the_next_variables(database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    store = PlatformStore(database)
    assert Variables().data_quality_threshold == 0.95

    store.set_variable("data_quality_threshold", "0.8")
    store.set_variable("slack_webhook_url", SECRET)
    assert Variables().data_quality_threshold == 0.8
    assert Variables().slack_webhook_url.get_secret_value() == SECRET
    assert Variables.from_environment().data_quality_threshold == 0.95

    monkeypatch.setenv("CLINICAL_VAR_DATA_QUALITY_THRESHOLD", "0.7")
    assert Variables().data_quality_threshold == 0.7
    monkeypatch.delenv("CLINICAL_VAR_DATA_QUALITY_THRESHOLD")
    assert Variables(data_quality_threshold=0.6).data_quality_threshold == 0.6

    store.delete_variable("data_quality_threshold")
    assert Variables().data_quality_threshold == 0.95


def test_a_change_by_another_process_acts_after_the_cache(database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [1000.0]
    monkeypatch.setattr(reading.time, "monotonic", lambda: clock[0])
    PlatformStore(database).set_variable("model_stage", "one")
    assert Variables().model_stage == "one"

    connection = psycopg2.connect(database)
    with connection, connection.cursor() as cursor:
        cursor.execute("update clinical_variable set value = 'two' where key = 'model_stage'")
    connection.close()

    assert Variables().model_stage == "one"
    clock[0] += reading.KEEP_SECONDS + 0.01
    assert Variables().model_stage == "two"


def test_many_variables_cost_one_query(database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    everything = PlatformStore.everything

    def counted(store: PlatformStore) -> object:
        asked.append(1)
        return everything(store)

    monkeypatch.setattr(PlatformStore, "everything", counted)
    for _ in range(20):
        Variables()
        ClientSettings()
    assert len(asked) <= 2


def test_a_child_process_reads_anew(database: str) -> None:
    Variables()
    reader, writer = os.pipe()
    PlatformStore(database).set_variable("model_stage", "before")
    Variables()
    raw = psycopg2.connect(database)
    with raw, raw.cursor() as cursor:
        cursor.execute("update clinical_variable set value = 'after' where key = 'model_stage'")
    raw.close()
    pid = os.fork()
    if pid == 0:
        try:
            os.write(writer, Variables().model_stage.encode())
        finally:
            os._exit(0)
    os.waitpid(pid, 0)
    assert os.read(reader, 100) == b"after"


def test_values_that_do_not_fit_are_left_out_with_one_warning(database: str, caplog: pytest.LogCaptureFixture) -> None:
    store = PlatformStore(database)
    store.set_variables([VariableWrite("data_quality_threshold", "7"), VariableWrite("model_name", "mine")])

    for _ in range(3):
        found = Variables()

    assert (found.data_quality_threshold, found.model_name) == (0.95, "mine")
    assert caplog.text.count("data_quality_threshold in PostgreSQL does not fit") == 1
    store.set_variable("data_quality_threshold", "0.5")
    assert Variables().data_quality_threshold == 0.5


def test_without_an_answer_defaults_act_with_one_warning(
    database: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("POSTGRES_URL", f"postgresql://clinical:{SECRET}@127.0.0.1:9/clinical")
    monkeypatch.setenv("CLINICAL_VAR_MODEL_STAGE", "staging")

    found = [Variables() for _ in range(5)]

    assert found[0].model_stage == "staging"
    assert found[0].data_quality_threshold == 0.95
    warnings = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 1
    assert "PostgreSQL at 127.0.0.1:9/clinical does not answer" in warnings[0].message
    assert SECRET not in caplog.text


def test_a_database_that_breaks_down_leaves_the_last_values(
    database: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    clock = [1000.0]
    monkeypatch.setattr(reading.time, "monotonic", lambda: clock[0])
    PlatformStore(database).set_variable("clinical_data_bucket", "mine")
    assert Variables().clinical_data_bucket == "mine"

    def fails(store: PlatformStore) -> object:
        raise StoreUnavailableError("gone")

    with monkeypatch.context() as patch:
        patch.setattr(PlatformStore, "everything", fails)
        clock[0] += 60
        assert Variables().clinical_data_bucket == "mine"
        assert "the values read before go on acting" in caplog.text
    PlatformStore(database).set_variable("clinical_data_bucket", "other")
    assert Variables().clinical_data_bucket == "other"


def test_a_wrong_password_is_not_shown(database: str) -> None:
    host = database.partition("@")[2]
    with pytest.raises(StoreUnavailableError, match="does not answer") as raised:
        PlatformStore(f"postgresql://clinical:{SECRET}@{host}").check()
    assert SECRET not in str(raised.value)
    with pytest.raises(StoreUnavailableError, match="POSTGRES_URL is not set"):
        PlatformStore("").check()


def test_a_stored_connection_acts_behind_the_environment(database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in CLIENT_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    store = PlatformStore(database)
    store.put_connection(
        Connection("minio_storage", "s3", None, "minio", None, "key", SECRET, 9000, '{"region_name": "eu"}')
    )

    found = ClientSettings()
    assert (found.s3_endpoint, found.s3_access_key, found.s3_region) == ("http://minio:9000", "key", "eu")
    assert found.s3_secret_key.get_secret_value() == SECRET
    assert connection("minio_storage") == store.connections()["minio_storage"].connection()

    monkeypatch.setenv("AIRFLOW_CONN_MINIO_STORAGE", "s3://other:pw@elsewhere:1")
    assert ClientSettings().s3_endpoint == "http://elsewhere:1"

    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9000")
    embedded = ClientSettings()
    # the login belongs to the other server: it must not be sent to this one
    assert (embedded.s3_endpoint, embedded.s3_access_key) == ("http://127.0.0.1:9000", "")

    monkeypatch.setenv("CLINICAL_STORED_CONNECTIONS", "minio_storage")
    assert ClientSettings().s3_endpoint == "http://elsewhere:1"


def test_a_connection_that_cannot_be_read_stops_the_client_and_not_the_variables(
    database: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv("REDIS_URL")
    store = PlatformStore(database)
    store.put_connection(Connection("redis_features", "redis", host="r", password=SECRET))
    store.set_variable("slack_webhook_url", SECRET)
    monkeypatch.setenv("CLINICAL_FERNET_KEY", new_key())
    reading.forget()

    with pytest.raises(SecretKeyError, match="the password of the connection redis_features"):
        ClientSettings()
    assert Variables().slack_webhook_url.get_secret_value() == ""
    assert "the variable slack_webhook_url was encrypted with another key" in caplog.text
    told = {one.setting: one for one in explain()}
    assert "was encrypted with another key" in told["REDIS_URL"].note
    assert "was encrypted with another key" in told["CLINICAL_VAR_SLACK_WEBHOOK_URL"].note
    assert SECRET not in str(told) + caplog.text


def test_defaults_are_kept_up_to_date_until_somebody_changes_them(
    database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = PlatformStore(database)
    assert len(load_defaults(store)) == len(Variables.model_fields) + len(CONNECTION_TYPES) + len(POOLS)
    assert load_defaults(store) == []
    assert store.pools()["spark_jobs"] == PoolInfo(configuration.POOL_DESCRIPTIONS["spark_jobs"], False)

    store.set_variable("model_name", "mine")
    store.put_connection(Connection("model_serving", "http", host="mine"))
    store.delete_connection("clinical_gateway")
    store.delete_variable("model_stage")
    monkeypatch.setenv("SERVING_URL", "http://127.0.0.1:8099")
    monkeypatch.setenv("REDIS_URL", "redis://127.0.0.1:6399/0")

    assert load_defaults(store) == ["connection redis_features"]
    assert store.variables()["model_name"].value() == "mine"
    connections = store.connections()
    assert connections["model_serving"].public.host == "mine"
    assert connections["redis_features"].public.port == 6399
    assert "clinical_gateway" not in connections
    assert "model_stage" not in store.variables()


def test_a_default_gives_way_to_a_user_and_a_users_value_does_not(database: str) -> None:
    store = PlatformStore(database)
    load_defaults(store)
    mine, other = (
        Connection("kafka_clinical", "kafka", host="mine"),
        Connection("kafka_clinical", "kafka", host="other"),
    )

    assert store.put_connection(mine, overwrite=False) == "added"
    assert store.put_connection(other, overwrite=False) == "exists"
    assert store.connections()["kafka_clinical"].public.host == "mine"
    assert store.put_connection(other) == "replaced"
    assert store.connections()["kafka_clinical"].public.host == "other"


def test_a_description_stays_where_none_is_given(database: str) -> None:
    store = PlatformStore(database)
    load_defaults(store)
    store.set_variable("model_name", "mine")
    assert store.variables()["model_name"].description == Variables.model_fields["model_name"].description
    store.set_variable("model_name", "mine", "about")
    assert store.variables()["model_name"].description == "about"


def test_it_is_told_which_value_acts_and_why(database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in CLIENT_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("CLINICAL_VAR_MODEL_STAGE", "staging")
    store = PlatformStore(database)
    load_defaults(store)
    store.set_variables(
        VariableWrite(key, value)
        for key, value in {
            "model_stage": "mine", "model_name": "mine", "slack_webhook_url": SECRET, "data_quality_threshold": "much",
            "my_own": "x", "my_token": SECRET,
        }.items()
    )  # fmt: skip
    store.put_connection(Connection("minio_storage", "s3", host="minio", port=9000, login="k", password=SECRET))
    store.put_connection(Connection("mlflow_tracking", "http", host="elsewhere", password=SECRET))
    store.put_connection(Connection("postgres_mlflow", "postgres", host="db", password=SECRET))

    told = explain()
    by_setting = {one.setting: one for one in told if one.setting}
    by_name = {one.name: one for one in told if not one.setting}

    def acting(setting: str) -> tuple[str, str]:
        return by_setting[setting].value, by_setting[setting].source

    assert acting("CLINICAL_VAR_MODEL_STAGE") == ("staging", "environment")
    assert "PostgreSQL does not act" in by_setting["CLINICAL_VAR_MODEL_STAGE"].note
    assert acting("CLINICAL_VAR_MODEL_NAME") == ("mine", "PostgreSQL")
    assert acting("CLINICAL_VAR_SLACK_WEBHOOK_URL") == ("***", "PostgreSQL")
    assert acting("CLINICAL_VAR_DATA_QUALITY_THRESHOLD") == ("0.95", "default")
    assert "does not act: Input should be a valid number" in by_setting["CLINICAL_VAR_DATA_QUALITY_THRESHOLD"].note
    assert acting("CLINICAL_VAR_RETRY_DELAY_MINUTES") == ("5", "default")
    assert (by_name["my_own"].value, by_name["my_token"].value) == ("x", "***")
    assert acting("AWS_ENDPOINT_URL") == ("http://minio:9000", "PostgreSQL")
    assert acting("AWS_SECRET_ACCESS_KEY") == ("***", "PostgreSQL")
    assert acting("MLFLOW_TRACKING_URI") == (os.environ["MLFLOW_TRACKING_URI"], "environment")
    assert "the environment goes before it" in by_setting["MLFLOW_TRACKING_URI"].note
    assert acting("MLFLOW_TRACKING_PASSWORD") == ("", "default")
    assert "another server's" in by_setting["MLFLOW_TRACKING_PASSWORD"].note
    assert by_name["postgres_mlflow"].value == "postgres://:***@db"
    assert {one.name for one in told if one.kind == "connection"} == set(CONNECTION_TYPES)
    assert SECRET not in str(told)
