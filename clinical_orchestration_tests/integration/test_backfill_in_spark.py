"""Backfills on S3 with Spark and Delta: ranges equal the whole, other days keep their files, kills do no harm."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from datetime import date, timedelta
from typing import TYPE_CHECKING

import pytest

from clinical_orchestration.stores.feature_backfill import Days, FeatureBackfill
from clinical_orchestration.stores.feature_store import OfflineStore, read_features, verify
from clinical_orchestration.stores.online import RedisOnlineStore
from clinical_orchestration.stores.spark import SparkSessions, spark_tables
from clinical_orchestration.stores.tables import DeltaTableStore
from clinical_orchestration.tables import FEATURE_STAGING, FEATURES
from clinical_orchestration_tests.integration.test_features_in_spark import GRID, START, VISITS, history
from clinical_orchestration_tests.integration.test_features_store import NoSpark, write

if TYPE_CHECKING:
    from collections.abc import Iterator

    from clinical_orchestration.stores.spark import SparkTables
    from clinical_orchestration.trials import TrialProfile

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]

FIRST = START.date()


@pytest.fixture
def lake(
    spark_env: dict[str, str],
    redis_env: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> Iterator[tuple[DeltaTableStore, SparkTables]]:
    root = f"s3://clinical-mlops/backfill-{request.node.name.replace('[', '-').strip(']')}"
    for name, value in {**spark_env, "REDIS_URL": redis_env["REDIS_URL"], "CLINICAL_LAKE_ROOT": root}.items():
        monkeypatch.setenv(name, value)
    tables = DeltaTableStore.from_settings()
    sessions = SparkSessions()
    write(tables, history(11, patients=10))
    yield tables, spark_tables(tables, sessions=sessions)
    sessions.close()


def day(number: int) -> date:
    return FIRST + timedelta(days=number)


def files(tables: DeltaTableStore) -> dict[str, set[str]]:
    """Return the data files of each day."""
    from deltalake import DeltaTable

    found: dict[str, set[str]] = {}
    for uri in DeltaTable(tables.uri(FEATURES), storage_options=tables._options).file_uris():
        of_day = uri.split("feature_date=")[1].split("/")[0]
        found.setdefault(of_day, set()).add(uri)
    return found


@pytest.mark.parametrize("profile", [VISITS, GRID], ids=["visits", "grid"])
def test_ranges_one_after_another_give_the_rows_of_the_whole(
    lake: tuple[DeltaTableStore, SparkTables], profile: TrialProfile
) -> None:
    from polars.testing import assert_frame_equal

    tables, spark = lake
    store = FeatureBackfill(spark, tables)
    span = store.span(profile)
    assert span is not None
    # the second half first: history before a range is read, stored or not
    middle = span.first + timedelta(days=len(span) // 2)
    for days in (Days(middle, span.last), Days(span.first, middle - timedelta(days=1))):
        staged = store.stage(profile, days)
        assert staged.rows > 5
        report = store.check(profile, days, staged)
        assert report.complete
        loaded = store.load(profile, days, staged)
        assert (loaded.differences.added, loaded.differences.changed) == (staged.rows, 0)
        assert store.verify(profile, days, loaded.request, loaded.versions).holds
        assert store.untouched(profile, days, loaded.version_before).holds
    ranges = read_features(tables, profile)
    report = OfflineStore(spark, tables).refresh(profile, full=True)
    assert report.rows == ranges.height
    whole = read_features(tables, profile)
    assert_frame_equal(whole, ranges, rel_tol=1e-9, abs_tol=1e-9)


def test_only_days_that_differ_get_new_files_and_a_repetition_none(
    lake: tuple[DeltaTableStore, SparkTables],
) -> None:
    import polars as pl

    tables, spark = lake
    OfflineStore(spark, tables).refresh(VISITS)
    wrong = day(4)
    spoiled = read_features(tables, VISITS, dates=[wrong]).with_columns(pl.lit(50.0).alias("age_years"))
    tables.replace(FEATURES, spoiled.to_arrow(), predicate=f"feature_date = CAST('{wrong}' AS DATE)")
    before = files(tables)

    store = FeatureBackfill(spark, tables)
    days = Days(day(2), day(6))
    loaded = store.load(VISITS, days, store.stage(VISITS, days))
    assert loaded.differences.days == (wrong,)
    after = files(tables)
    assert {name for name in after if after[name] != before.get(name)} == {wrong.isoformat()}
    assert store.untouched(VISITS, days, loaded.version_before).holds

    store.discard(VISITS)
    assert tables.row_count(FEATURE_STAGING) == 0
    again = store.load(VISITS, days, store.stage(VISITS, days))
    assert (again.written, again.resumed, again.differences.nothing) == (False, False, True)
    assert files(tables) == after
    assert OfflineStore(NoSpark(), tables).refresh(VISITS).status == "up_to_date"  # type: ignore[arg-type]


def test_many_rows_are_staged_and_written_by_spark(lake: tuple[DeltaTableStore, SparkTables]) -> None:
    from polars.testing import assert_frame_equal

    tables, spark = lake
    OfflineStore(spark, tables).refresh(VISITS)
    whole = read_features(tables, VISITS)
    days = Days(day(1), day(6))
    tables.replace(FEATURES, whole.clear().to_arrow(), predicate=f"trial = '{VISITS.name}' AND {days.predicate()}")
    assert read_features(tables, VISITS).height < whole.height
    store = FeatureBackfill(spark, tables, arrow_rows=3)
    staged = store.stage(VISITS, days)
    assert store.check(VISITS, days, staged).complete
    loaded = store.load(VISITS, days, staged)
    assert loaded.differences.added == staged.rows > 3
    assert_frame_equal(read_features(tables, VISITS), whole, rel_tol=1e-9, abs_tol=1e-9)


@pytest.mark.slow
def test_a_backfill_killed_anywhere_is_finished_by_the_next_one(
    lake: tuple[DeltaTableStore, SparkTables], redis_env: dict[str, str]
) -> None:
    from polars.testing import assert_frame_equal

    tables, spark = lake
    OfflineStore(spark, tables).refresh(VISITS)
    whole = read_features(tables, VISITS)
    days = Days(day(1), day(7))
    predicate = f"trial = '{VISITS.name}' AND {days.predicate()}"
    worker = [sys.executable, "-m", "clinical_orchestration_tests.integration.backfill_worker"]
    arguments = [str(days.first), str(days.last)]
    for place, (computed, written, resumed) in {
        "staged": (False, True, False),
        "written": (False, False, True),
    }.items():
        tables.replace(FEATURES, whole.clear().to_arrow(), predicate=predicate)
        lost = whole.height - read_features(tables, VISITS).height
        assert lost > 5
        killed = subprocess.run([*worker, *arguments, place], env=os.environ, check=False, capture_output=True)
        assert killed.returncode == -signal.SIGKILL
        ended = subprocess.run(
            [*worker, *arguments], env=os.environ, check=True, capture_output=True, text=True
        ).stdout.splitlines()[-1]
        assert ended == f"{computed} {written} {resumed} {lost}"
        assert_frame_equal(read_features(tables, VISITS), whole, rel_tol=1e-9, abs_tol=1e-9)
        online = RedisOnlineStore(redis_env["REDIS_URL"], prefix="backfill-test:")
        assert verify(OfflineStore(spark, tables), online, VISITS).consistent


def test_a_range_without_records_computes_nothing(lake: tuple[DeltaTableStore, SparkTables]) -> None:
    tables, _ = lake
    store = FeatureBackfill(NoSpark(), tables)  # type: ignore[arg-type]
    days = Days(date(2020, 1, 1), date(2020, 1, 31))
    found = store.history(VISITS, days)
    assert found.empty
    staged = store.stage(VISITS, days)
    assert (staged.rows, staged.computed) == (0, False)
    assert store.load(VISITS, days, staged).rows == 0
