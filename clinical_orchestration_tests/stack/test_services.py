"""Each embedded service does for its usual clients what the platform needs of it."""

from __future__ import annotations

import io
import os
import time
from pathlib import Path

import pytest

from clinical_orchestration.stack import services
from clinical_orchestration.stack.process import RunAs

pytestmark = pytest.mark.integration

Environment = dict[str, str]


@pytest.fixture
def with_environment(monkeypatch: pytest.MonkeyPatch):
    """Return a function that sets an environment for the test."""

    def apply(environment: Environment) -> None:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)

    return apply


def test_s3_keeps_delta_tables_and_wants_the_key(s3_env: Environment, with_environment) -> None:
    import pyarrow as pa
    from deltalake import DeltaTable, write_deltalake
    from minio import Minio
    from minio.error import S3Error

    with_environment(s3_env)
    write_deltalake("s3://clinical-mlops/stack/rows", pa.table({"a": [1, 2]}))
    write_deltalake("s3://clinical-mlops/stack/rows", pa.table({"a": [3]}), mode="append")

    assert DeltaTable("s3://clinical-mlops/stack/rows").version() == 1
    host = s3_env["AWS_ENDPOINT_URL"].removeprefix("http://")
    own = Minio(host, s3_env["AWS_ACCESS_KEY_ID"], s3_env["AWS_SECRET_ACCESS_KEY"], secure=False)
    assert {bucket.name for bucket in own.list_buckets()} >= {"clinical-mlops", "mlflow-artifacts"}
    with pytest.raises(S3Error):
        Minio(host, s3_env["AWS_ACCESS_KEY_ID"], "wrong", secure=False).list_buckets()


def test_redis_keeps_hashes_with_a_time_to_live(redis_env: Environment) -> None:
    import redis

    connection = redis.Redis.from_url(redis_env["REDIS_URL"])
    connection.hset("stack:test", mapping={"a": "1.5"})
    connection.expire("stack:test", 60)

    assert connection.hgetall("stack:test") == {b"a": b"1.5"}
    assert 0 < connection.ttl("stack:test") <= 60


def test_postgres_has_both_databases_and_runs_as_no_root(postgres_env: Environment) -> None:
    import psycopg2

    connection = psycopg2.connect(postgres_env["POSTGRES_URL"])
    with connection.cursor() as cursor:
        cursor.execute("select array_agg(datname::text) from pg_database")
        (names,) = cursor.fetchone()
        cursor.execute("show timezone")
        assert cursor.fetchone() == ("UTC",)
        cursor.execute("show data_directory")
        folder = Path(cursor.fetchone()[0])
    connection.close()

    assert {"clinical", "mlflow"} <= set(names)
    assert folder.stat().st_uid != 0
    with pytest.raises(psycopg2.OperationalError):
        psycopg2.connect(postgres_env["POSTGRES_URL"].replace("://clinical:", "://clinical:not"))


def test_kafka_has_the_topics_and_keeps_headers(kafka_env: Environment) -> None:
    from confluent_kafka import Consumer, Producer
    from confluent_kafka.admin import AdminClient

    server = kafka_env["KAFKA_BOOTSTRAP_SERVERS"]
    listed = AdminClient({"bootstrap.servers": server}).list_topics(timeout=10).topics
    assert {name: len(listed[name].partitions) for name in services.topics()} == services.topics()

    producer = Producer({"bootstrap.servers": server, "acks": "all"})
    producer.produce("medications", b"{}", key=b"p1", headers=[("trial", b"simulated")])
    assert producer.flush(20) == 0
    consumer = Consumer({"bootstrap.servers": server, "group.id": "stack-test", "auto.offset.reset": "earliest"})
    consumer.subscribe(["medications"])
    deadline = time.monotonic() + 30
    message = None
    while message is None and time.monotonic() < deadline:
        message = consumer.poll(1.0)
    consumer.close()

    assert message is not None
    assert message.error() is None
    assert message.headers() == [("trial", b"simulated")]


def test_mlflow_keeps_runs_and_artifacts(mlflow_env: Environment, with_environment) -> None:
    from minio import Minio
    from mlflow import MlflowClient

    with_environment(mlflow_env)
    client = MlflowClient(mlflow_env["MLFLOW_TRACKING_URI"])
    run = client.create_run(client.create_experiment("stack"))
    client.log_text(run.info.run_id, "figures", "report.txt")
    client.create_registered_model("stack-model")

    assert [item.path for item in client.list_artifacts(run.info.run_id)] == ["report.txt"]
    store = Minio(
        mlflow_env["AWS_ENDPOINT_URL"].removeprefix("http://"),
        mlflow_env["AWS_ACCESS_KEY_ID"],
        mlflow_env["AWS_SECRET_ACCESS_KEY"],
        secure=False,
    )
    stored = [item.object_name for item in store.list_objects("mlflow-artifacts", recursive=True)]
    assert any(str(name).endswith(f"{run.info.run_id}/artifacts/report.txt") for name in stored)


def test_spark_and_delta_rs_read_each_other_and_python_runs_on_the_workers(
    spark_env: Environment, with_environment
) -> None:
    import pyarrow as pa
    from deltalake import DeltaTable, write_deltalake
    from pyspark.sql import SparkSession

    with_environment(spark_env)
    spark = SparkSession.builder.remote(spark_env["SPARK_REMOTE"]).create()
    spark.range(10).write.format("delta").mode("overwrite").save("s3://clinical-mlops/stack/by_spark")
    write_deltalake("s3://clinical-mlops/stack/by_rust", pa.table({"a": [1, 2]}), mode="overwrite")

    def with_package(batches):
        from clinical_orchestration import tables

        assert tables
        yield from batches

    assert DeltaTable("s3://clinical-mlops/stack/by_spark").to_pyarrow_table().num_rows == 10
    assert spark.read.format("delta").load("s3://clinical-mlops/stack/by_rust").count() == 2
    assert spark.range(3).mapInArrow(with_package, "id long").count() == 3
    assert spark.conf.get("spark.sql.session.timeZone") == "UTC"
    spark.stop()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root starts programs as another user")
def test_root_passes_closed_folders_to_the_other_user(tmp_path: Path) -> None:
    from clinical_orchestration.stack.model import StackError
    from clinical_orchestration.stack.settings import StackSettings

    closed = tmp_path / "closed"
    closed.mkdir(mode=0o700)
    context = services.Context(StackSettings.load(closed / "home"))

    # a container may allow neither way around; then the error must say what to do
    found: RunAs | str
    try:
        found = services.postgres_user(context) or "no user"
    except StackError as error:
        found = error.cure

    if isinstance(found, RunAs):
        assert found.mode in ("capability", "namespace")
        services._prepare_postgres(context)
        cluster = closed / "home" / "data" / "postgres" / "cluster"
        assert (cluster / "PG_VERSION").stat().st_uid == found.owner[0]
    else:
        assert "as an ordinary user" in found


def test_s3_data_outlives_a_restart_on_other_ports(tmp_path: Path) -> None:
    from minio import Minio

    from clinical_orchestration.stack.testing import embedded

    def client(environment: Environment) -> Minio:
        host = environment["AWS_ENDPOINT_URL"].removeprefix("http://")
        return Minio(host, environment["AWS_ACCESS_KEY_ID"], environment["AWS_SECRET_ACCESS_KEY"], secure=False)

    content = os.urandom(3_000_000)
    with embedded(tmp_path / "home", "s3") as first:
        client(first).put_object("clinical-mlops", "kept/file", io.BytesIO(content), len(content))
    with embedded(tmp_path / "home", "s3") as second:
        assert second["AWS_ENDPOINT_URL"] != first["AWS_ENDPOINT_URL"]
        assert client(second).get_object("clinical-mlops", "kept/file").data == content
        client(second).put_object("clinical-mlops", "kept/other", io.BytesIO(b"x"), 1)
        assert len(list(client(second).list_objects("clinical-mlops", "kept/"))) == 2
