import socket
import time
from datetime import UTC, datetime
from urllib.parse import urlsplit

import pytest

from clinical_orchestration.serving.online import RedisFeatureReader
from clinical_orchestration.stores.online import OnlineFeatures, OnlineStoreError, RedisOnlineStore

MOMENT = datetime(2026, 1, 2, 3, 4, 5, 678901, tzinfo=UTC)
AWKWARD = {"tiny": 5e-324, "third": 1 / 3, "negative": -0.0, "large": 1.7976931348623157e308, "whole": 3.0}


def row(patient_id: str, **features: float) -> OnlineFeatures:
    return OnlineFeatures(patient_id, "cdisc-pilot", MOMENT, dict(features or AWKWARD), "set")


@pytest.mark.integration
def test_it_reads_exactly_what_the_store_reads(redis_env: dict[str, str]) -> None:
    store = RedisOnlineStore(redis_env["REDIS_URL"], "reader:")
    reader = RedisFeatureReader(redis_env["REDIS_URL"], "reader:")
    ids = [f'patient/{number} "quoted" é' for number in range(250)]
    store.put([row(ids[0]), *(row(patient_id, feature=float(n)) for n, patient_id in enumerate(ids[1:]))])
    asked = [*ids, "nobody"]
    for scripts in (True, False):
        reader._scripts = scripts
        found = reader.get_many(asked)
        expected = store.get_many(asked)
        assert found.keys() == expected.keys() == set(ids)
        assert all(found[patient_id].same_values(expected[patient_id]) for patient_id in ids)
    assert reader.get_many(["nobody"]) == {}
    reader.ping()
    store.close()


@pytest.mark.integration
def test_a_forgotten_script_is_loaded_again(redis_env: dict[str, str]) -> None:
    store = RedisOnlineStore(redis_env["REDIS_URL"], "reader:")
    reader = RedisFeatureReader(redis_env["REDIS_URL"], "reader:")
    store.put([row("P")])
    assert reader.get_many(["P"])
    reader._client().script_flush()
    assert reader.get_many(["P"])["P"].same_values(row("P"))
    store.close()


@pytest.mark.integration
def test_without_the_right_to_run_scripts_features_are_read_all_the_same(redis_env: dict[str, str]) -> None:
    store = RedisOnlineStore(redis_env["REDIS_URL"], "reader:")
    store.put([row("P")])
    allowed = ["+hgetall", "+ping", "+client", "+hello", "~reader:*"]
    store._client().execute_command("ACL", "SETUSER", "narrow", "on", ">pw", *allowed)
    parts = urlsplit(redis_env["REDIS_URL"])
    reader = RedisFeatureReader(f"redis://narrow:pw@{parts.hostname}:{parts.port}/0", "reader:")
    assert reader.get_many(["P"])["P"].same_values(row("P"))
    assert reader._scripts is False
    store._client().execute_command("ACL", "DELUSER", "narrow")
    store.close()


@pytest.mark.integration
def test_what_is_no_feature_hash_is_a_value_error(redis_env: dict[str, str]) -> None:
    reader = RedisFeatureReader(redis_env["REDIS_URL"], "reader:")
    client = reader._client()
    client.set("reader:text:features", "x")
    client.hset("reader:timeless:features", mapping={"feature": "1.0"})
    client.hset("reader:word:features", mapping={"feature_time": MOMENT.isoformat(), "feature": "high"})
    for patient_id in ("text", "timeless", "word"):
        with pytest.raises(ValueError):
            reader.get_many([patient_id])


def test_a_redis_that_is_out_is_told_within_two_seconds_and_without_the_password() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound, not listening: refused
        port = taken.getsockname()[1]
        reader = RedisFeatureReader(f"redis://user:secret@127.0.0.1:{port}/0")
        for ask in (reader.ping, lambda: reader.get_many(["SECRET-PATIENT"])):
            started = time.monotonic()
            with pytest.raises(OnlineStoreError, match=f"127.0.0.1:{port} does not answer") as error:
                ask()
            assert time.monotonic() - started < 2
            assert "secret" not in str(error.value).lower()


def test_a_redis_that_hangs_is_told_within_the_timeout() -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        reader = RedisFeatureReader(f"redis://127.0.0.1:{silent.getsockname()[1]}/0", timeout_seconds=0.2)
        started = time.monotonic()
        with pytest.raises(OnlineStoreError):
            reader.get_many(["P"])
        assert time.monotonic() - started < 2
