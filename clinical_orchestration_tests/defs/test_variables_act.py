"""Each variable acts where the documentation says, in the next run; connections reach their clients."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import dagster as dg
import httpx
import pytest

from clinical_orchestration.configuration import CONNECTION_TYPES
from clinical_orchestration.defs.monitoring.assets import _above_threshold
from clinical_orchestration.platform.clients import CLIENT_NAMES
from clinical_orchestration.resources import (
    MAX_RUNTIME_TAG,
    OnlineStoreResource,
    PipelineResource,
    RegistryResource,
    ServingResource,
    SparkResource,
    TablesResource,
    profiles,
)
from clinical_orchestration.settings import ClientSettings, Variables
from clinical_orchestration.trials import configured_trial, load_trial

OPERATIONS = Path(__file__).resolve().parents[2] / "docs" / "operations.md"


def made(resource: Any) -> Any:
    return resource.create_resource(dg.build_init_resource_context())


# ---------------------------------------------------------------------------------------------------------------- runs


def tags_of_a_run(**given: str) -> dict[str, str]:
    @dg.asset
    def something(pipeline: PipelineResource) -> None: ...

    with dg.DagsterInstance.ephemeral() as instance:
        result = dg.materialize([something], resources={"pipeline": PipelineResource()}, instance=instance, tags=given)
        run = instance.get_run_by_id(result.run_id)
        assert run is not None
        return dict(run.tags)


def test_execution_timeout_hours_bounds_each_run(monkeypatch: pytest.MonkeyPatch) -> None:
    assert tags_of_a_run()[MAX_RUNTIME_TAG] == "7200"
    monkeypatch.setenv("CLINICAL_VAR_EXECUTION_TIMEOUT_HOURS", "0.5")
    assert tags_of_a_run()[MAX_RUNTIME_TAG] == "1800"
    assert tags_of_a_run(**{MAX_RUNTIME_TAG: "60"})[MAX_RUNTIME_TAG] == "60"


# -------------------------------------------------------------------------------------------------------------- trials


def test_model_name_begins_the_names_of_all_models(monkeypatch: pytest.MonkeyPatch) -> None:
    assert configured_trial("cdisc-pilot") is load_trial("cdisc-pilot")
    monkeypatch.setenv("CLINICAL_VAR_MODEL_NAME", "mine")
    assert PipelineResource(trial="cdisc-pilot").profile().model_name == "mine"
    assert PipelineResource(trial="simulated").profile().model_name == "mine-simulated"
    assert {profile.model_name for profile in profiles().values()} >= {"mine", "mine-simulated"}


def test_a_model_name_of_its_own_stays() -> None:
    assert Variables(model_name="mine").registered_model("another-model") == "another-model"


def test_feature_engineering_window_days_is_how_far_features_look_back(monkeypatch: pytest.MonkeyPatch) -> None:
    from clinical_orchestration.features.definitions import feature_set_id

    plain = load_trial("simulated")
    assert configured_trial("simulated") is plain
    monkeypatch.setenv("CLINICAL_VAR_FEATURE_ENGINEERING_WINDOW_DAYS", "14")

    changed = PipelineResource(trial="simulated").profile()

    assert changed.features.adverse_event_lookback.days == 14
    assert feature_set_id(changed) != feature_set_id(plain)
    assert load_trial("simulated").features.adverse_event_lookback.days == 7


def test_model_performance_threshold_is_a_share_of_the_performance_at_training() -> None:
    def passed(now: float | None, then: float | None, share: float = 0.85) -> bool:
        auroc = None if now is None else {"value": now}
        return _above_threshold({"auroc": auroc, "baseline": None if then is None else {"auroc": then}}, share).passed

    assert passed(0.69, 0.8)
    assert not passed(0.67, 0.8)
    assert not passed(0.69, 0.8, 0.95)
    assert passed(None, 0.8)
    assert passed(0.5, None)


# ------------------------------------------------------------------------------------------------------------- clients


def test_retry_variables_reach_the_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLINICAL_VAR_MAX_RETRY_ATTEMPTS", "7")
    monkeypatch.setenv("CLINICAL_VAR_RETRY_DELAY_MINUTES", "0.5")
    options = made(TablesResource(root="s3://bucket"))._options
    assert (options["max_retries"], options["backoff_config.max_backoff"]) == ("7", "30s")


def test_a_request_to_tables_is_tried_as_often_as_the_variable_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLINICAL_VAR_MAX_RETRY_ATTEMPTS", "1")
    with pytest.raises(OSError, match=r"(?s)after 1 retries"):
        made(TablesResource(root="s3://bucket")).version("t")


@pytest.mark.integration
def test_clinical_data_bucket_is_made_where_it_is_absent(
    s3_env: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in s3_env.items():
        if name.startswith("AWS_"):
            monkeypatch.setenv(name, value)
    monkeypatch.setenv("CLINICAL_VAR_CLINICAL_DATA_BUCKET", "bucket-of-a-variable")

    tables = made(TablesResource())

    assert tables.uri("t") == "s3://bucket-of-a-variable/t"
    assert tables.ensure("silver/lab_results") == 0


def test_retry_variables_reach_redis(monkeypatch: pytest.MonkeyPatch) -> None:
    import redis

    from clinical_orchestration.stores.online import OnlineStoreError

    monkeypatch.setenv("CLINICAL_VAR_MAX_RETRY_ATTEMPTS", "2")
    monkeypatch.setenv("CLINICAL_VAR_RETRY_DELAY_MINUTES", "0.05")
    pauses: list[float] = []
    monkeypatch.setattr("redis.retry.sleep", pauses.append)
    store = made(OnlineStoreResource())

    with pytest.raises(OnlineStoreError):
        store.count()

    assert isinstance(store._client(), redis.Redis)
    assert len(pauses) == 2
    assert max(pauses) <= 3


def test_retry_variables_reach_the_model_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLINICAL_VAR_MAX_RETRY_ATTEMPTS", "3")
    monkeypatch.setenv("CLINICAL_VAR_RETRY_DELAY_MINUTES", "0.05")
    pauses: list[float] = []
    answers: list[Exception | httpx.Response] = [
        httpx.ConnectError("no"), httpx.ConnectError("no"), httpx.ConnectError("no"),
        httpx.Response(200, json={"status": "ok"}),
    ]  # fmt: skip

    def answer(*arguments: object, **options: object) -> httpx.Response:
        found = answers.pop(0)
        if isinstance(found, Exception):
            raise found
        return found

    monkeypatch.setattr("clinical_orchestration.stores.serving.time.sleep", pauses.append)
    monkeypatch.setattr(httpx, "request", answer)

    assert made(ServingResource()).health() == {"status": "ok"}
    assert pauses == [1, 2, 3]


def test_data_processing_batch_size_is_what_spark_hands_over_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from clinical_orchestration.stores import spark

    class Session:
        def __init__(self) -> None:
            self.settings: dict[str, str] = {}
            self.conf = self

        def set(self, name: str, value: str) -> None:
            self.settings[name] = value

    monkeypatch.setenv("CLINICAL_VAR_DATA_PROCESSING_BATCH_SIZE", "250")
    monkeypatch.setattr(spark, "_check_listening", lambda remote: None)
    monkeypatch.setattr(spark, "_create", lambda remote: Session())
    assert made(SparkResource(root="/tmp/x")).session.settings == {spark.BATCH_ROWS: "250"}


def test_spark_master_url_is_the_master_of_the_spark_that_the_stack_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from clinical_orchestration.stack.services import Context, spark_configuration
    from clinical_orchestration.stack.settings import StackSettings

    context = Context(StackSettings.load(tmp_path))
    assert spark_configuration(context)["spark.master"].startswith("local[")
    assert "spark.driver.host" in spark_configuration(context)
    monkeypatch.setenv("CLINICAL_VAR_SPARK_MASTER_URL", "spark://master:7077")
    assert spark_configuration(context)["spark.master"] == "spark://master:7077"
    assert "spark.driver.host" not in spark_configuration(context)


def test_model_stage_and_login_reach_mlflow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLINICAL_VAR_MODEL_STAGE", "staging")
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    monkeypatch.setenv("AIRFLOW_CONN_MLFLOW_TRACKING", "http://me:pw@mlflow:5000")
    registry = made(RegistryResource())
    assert registry.tracking_uri == "http://mlflow:5000"
    assert registry._promoted("now")["stage"] == "staging"
    assert registry._environment["MLFLOW_TRACKING_PASSWORD"] == "pw"


def test_options_of_the_connection_reach_kafka(monkeypatch: pytest.MonkeyPatch) -> None:
    from clinical_orchestration.stores import kafka

    monkeypatch.delenv("KAFKA_BOOTSTRAP_SERVERS")
    monkeypatch.setenv("AIRFLOW_CONN_KAFKA_CLINICAL", "kafka://me:pw@broker?security.protocol=SASL_SSL&group=x")
    settings = ClientSettings()
    assert settings.kafka_bootstrap_servers == "broker:9092"
    wanted = {
        "security.protocol": "SASL_SSL", "sasl.mechanism": "PLAIN", "sasl.username": "me", "sasl.password": "pw",
    }  # fmt: skip
    assert settings.kafka_options == wanted
    assert kafka.topic_reader(settings)._options == wanted
    assert wanted.items() <= kafka.producer(settings)._config.items()


def test_the_connection_lab_processor_switches_the_bridge_on(monkeypatch: pytest.MonkeyPatch) -> None:
    from clinical_orchestration.stores.ibm_mq import MqSettings

    assert not MqSettings().configured
    monkeypatch.setenv("AIRFLOW_CONN_LAB_PROCESSOR", "http://u:pw@mq:9443/https?queue_manager=QM7&queue=LAB")
    found = MqSettings()
    assert (found.url, found.user, found.secret(), found.queue_manager, found.queue) == (
        "https://mq:9443", "u", "pw", "QM7", "LAB",
    )  # fmt: skip
    monkeypatch.setenv("CLINICAL_MQ_URL", "https://other:9443")
    assert (MqSettings().url, MqSettings().user) == ("https://other:9443", "")


def test_home_is_not_taken_from_the_users_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CLINICAL_HOME", raising=False)
    monkeypatch.setenv("HOME", "/somewhere")
    assert ClientSettings().home == Path(".clinical")


# ------------------------------------------------------------------------------------------------------- documentation


def test_the_documentation_has_every_variable_and_connection() -> None:
    text = OPERATIONS.read_text()
    documented = set(re.findall(r"^\| `([a-z0-9_]+)` \|", text, re.MULTILINE))
    assert set(Variables.model_fields) - documented == set()
    assert set(CONNECTION_TYPES) - documented == set()
    for names in CLIENT_NAMES.values():
        assert f"`{names[0]}`" in text
