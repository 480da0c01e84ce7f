"""The run queue, with the daemon's own loop as the oracle of who may start."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, cast
from unittest.mock import MagicMock

import pytest
import sqlalchemy as sa
from dagster import DagsterInstance, DagsterRunStatus
from dagster._core.errors import DagsterInvalidConfigError
from dagster._core.launcher import LaunchRunContext, RunLauncher
from dagster._core.remote_origin import RegisteredCodeLocationOrigin, RemoteRepositoryOrigin
from dagster._core.storage.dagster_run import DagsterRun, RunOpConcurrency, RunsFilter
from dagster._core.storage.tags import PRIORITY_TAG
from dagster._core.test_utils import create_run_for_test, instance_for_test
from dagster._serdes import ConfigurableClass

from clinical_orchestration.execution import coordinator, storage
from clinical_orchestration.execution.coordinator import LockedQueueDaemon, create_daemons, queue_lock
from clinical_orchestration_tests.databases import execute, new_database

HERE = "clinical_orchestration_tests.execution.test_coordinator"
ORIGIN = RemoteRepositoryOrigin(RegisteredCodeLocationOrigin("here"), "repository").get_job_origin("job")
launched: list[str] = []
launching: Callable[[str], None] = launched.append


class NotingLauncher(RunLauncher, ConfigurableClass):  # type: ignore[type-arg]
    """Notes what is launched and executes nothing: runs stay in STARTING."""

    def __init__(self, inst_data: Any = None) -> None:
        self._inst_data = inst_data
        super().__init__()

    @property
    def inst_data(self) -> Any:
        return self._inst_data

    @classmethod
    def config_type(cls) -> Any:
        return {}

    @classmethod
    def from_config_value(cls, inst_data: Any, config_value: Mapping[str, Any]) -> NotingLauncher:
        return cls(inst_data)

    def launch_run(self, context: LaunchRunContext) -> None:
        launching(context.dagster_run.run_id)

    def terminate(self, run_id: str) -> bool:
        return False


@pytest.fixture(scope="module")
def database(postgres_env: dict[str, str]) -> str:
    return new_database(postgres_env["POSTGRES_URL"], "warm_coordinator")


def _settings(database: str, **concurrency: Any) -> dict[str, Any]:
    pooled = {"module": storage.__name__, "class": "PooledPostgresStorage", "config": {"postgres_url": database}}
    return {
        "storage": {"custom": pooled},
        "run_launcher": {"module": HERE, "class": "NotingLauncher"},
        "run_coordinator": {"module": coordinator.__name__, "class": "QueuedRunCoordinator"},
        "concurrency": concurrency,
    }


@contextmanager
def _instance(database: str, folder: Path, *, stock: bool = False, **concurrency: Any) -> Iterator[DagsterInstance]:
    folder.mkdir(exist_ok=True)
    settings = _settings(database, **concurrency)
    if stock:
        settings["storage"] = {"postgres": {"postgres_url": database}}
    with instance_for_test(temp_dir=str(folder), overrides=settings) as instance:
        yield instance


@pytest.fixture(autouse=True)
def _empty(database: str) -> Iterator[None]:
    yield
    launched.clear()
    engine = sa.create_engine(database)
    with engine.begin() as connection:
        for table in ("run_tags", "event_logs", "runs", "concurrency_slots", "concurrency_limits"):
            connection.execute(sa.text(f"DELETE FROM {table}"))  # noqa: S608  # fixed names
    engine.dispose()


def _run(instance: DagsterInstance, tags: dict[str, str] | None = None, pool: str = "") -> DagsterRun:
    run = create_run_for_test(instance, tags=tags, remote_job_origin=ORIGIN)
    if pool:
        run = run._replace(
            run_op_concurrency=RunOpConcurrency(
                root_key_counts={pool: 1}, has_unconstrained_root_nodes=False, all_pools={pool}
            )
        )
        instance.delete_run(run.run_id)
        instance.add_run(run)
    return cast("DagsterRun", run)


def _submit(instance: DagsterInstance, run: DagsterRun) -> DagsterRunStatus:
    from dagster._core.run_coordinator import SubmitRunContext

    return instance.run_coordinator.submit_run(SubmitRunContext(run, workspace=MagicMock())).status


def _enqueue(instance: DagsterInstance, run: DagsterRun) -> None:
    """Put a run into the queue as somebody does who then waits for the daemon."""
    with queue_lock(instance):
        assert _submit_elsewhere(instance, run) is DagsterRunStatus.QUEUED


def _submit_elsewhere(instance: DagsterInstance, run: DagsterRun) -> DagsterRunStatus:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(coordinator.QueuedRunCoordinator, "_launch_up_to", lambda *_: None)
        return _submit(instance, run)


def _daemon(instance: DagsterInstance) -> list[Any]:
    context = MagicMock(instance=instance)
    return list(LockedQueueDaemon(interval_seconds=1).run_iteration(context))


def test_a_run_that_need_not_wait_is_launched_at_once(database: str, tmp_path: Path) -> None:
    with _instance(database, tmp_path) as instance:
        run = _run(instance)
        assert _submit(instance, run) is DagsterRunStatus.STARTING
        assert launched == [run.run_id]
        kinds = [log.dagster_event.event_type_value for log in instance.all_logs(run.run_id) if log.dagster_event]
        assert kinds == ["PIPELINE_ENQUEUED", "PIPELINE_STARTING"], "it was in the queue, as ever"


@pytest.mark.parametrize("stock", [False, True], ids=["pooled storage", "stock storage"])
def test_the_limit_of_runs_holds(database: str, tmp_path: Path, stock: bool) -> None:
    with _instance(database, tmp_path, stock=stock, runs={"max_concurrent_runs": 2}) as instance:
        states = [_submit(instance, _run(instance)) for _ in range(3)]
        assert states == [DagsterRunStatus.STARTING] * 2 + [DagsterRunStatus.QUEUED]
        done = instance.get_run_by_id(launched[0])
        assert done is not None
        instance.report_run_failed(done)
        _daemon(instance)
        assert len(launched) == 3


def test_no_limit_and_nothing_at_all(database: str, tmp_path: Path) -> None:
    with _instance(database, tmp_path / "none", runs={"max_concurrent_runs": -1}) as instance:
        assert _submit(instance, _run(instance)) is DagsterRunStatus.STARTING
    with _instance(database, tmp_path / "zero", runs={"max_concurrent_runs": 0}) as instance:
        assert _submit(instance, _run(instance)) is DagsterRunStatus.QUEUED


def test_runs_that_exclude_one_another_wait(database: str, tmp_path: Path) -> None:
    limits = [{"key": "exclusive", "value": {"applyLimitPerUniqueValue": True}, "limit": 1}]
    with _instance(database, tmp_path, runs={"tag_concurrency_limits": limits}) as instance:
        assert _submit(instance, _run(instance, {"exclusive": "a"})) is DagsterRunStatus.STARTING
        assert _submit(instance, _run(instance, {"exclusive": "a"})) is DagsterRunStatus.QUEUED
        assert _submit(instance, _run(instance, {"exclusive": "b"})) is DagsterRunStatus.STARTING


def test_a_pool_without_slots_holds_runs_back(database: str, tmp_path: Path) -> None:
    with _instance(database, tmp_path, pools={"granularity": "op"}) as instance:
        instance.event_log_storage.set_concurrency_slots("narrow", 1)
        assert _submit(instance, _run(instance, pool="narrow")) is DagsterRunStatus.STARTING
        assert _submit(instance, _run(instance, pool="narrow")) is DagsterRunStatus.QUEUED
        assert _submit(instance, _run(instance)) is DagsterRunStatus.STARTING


def test_who_came_first_goes_first(database: str, tmp_path: Path) -> None:
    with _instance(database, tmp_path, runs={"max_concurrent_runs": 2}) as instance:
        before = _run(instance)
        _enqueue(instance, before)
        run = _run(instance)
        assert _submit(instance, run) is DagsterRunStatus.STARTING
        assert launched == [before.run_id, run.run_id]
        waiting = [_run(instance), _run(instance)]
        for one in waiting:
            assert _submit(instance, one) is DagsterRunStatus.QUEUED
        instance.report_run_failed(before)
        assert _submit(instance, _run(instance)) is DagsterRunStatus.QUEUED, "two others wait for the one free place"


def test_the_more_urgent_goes_first(database: str, tmp_path: Path) -> None:
    with _instance(database, tmp_path, runs={"max_concurrent_runs": 1}) as instance:
        urgent = _run(instance, {PRIORITY_TAG: "5"})
        _enqueue(instance, urgent)
        assert _submit(instance, _run(instance)) is DagsterRunStatus.QUEUED
        instance.report_run_canceled(urgent)
        quick = _run(instance, {PRIORITY_TAG: "1"})
        assert _submit(instance, quick) is DagsterRunStatus.STARTING
        assert launched == [quick.run_id]


def test_a_long_queue_is_left_to_the_daemon(database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coordinator, "MOST", 2)
    with _instance(database, tmp_path) as instance:
        for _ in range(2):
            _enqueue(instance, _run(instance))
        assert _submit(instance, _run(instance)) is DagsterRunStatus.QUEUED
        _daemon(instance)
        assert len(launched) == 3


def test_while_another_holds_the_lock_a_run_waits_for_the_daemon(
    database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with _instance(database, tmp_path) as instance:
        monkeypatch.setattr(queue_lock.__wrapped__, "__defaults__", (0.1,))
        with queue_lock(instance) as mine:
            assert mine
            assert _submit(instance, _run(instance)) is DagsterRunStatus.QUEUED
            assert _daemon(instance) == []
            assert launched == []
        _daemon(instance)
        assert len(launched) == 1


def test_who_has_lost_the_lock_launches_no_more(database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody else may have taken it, and counted anew."""

    def launch(run_id: str) -> None:
        launched.append(run_id)
        execute(
            database,
            "SELECT pg_terminate_backend(pid) FROM pg_locks WHERE locktype = 'advisory' AND granted"
            " AND database = (SELECT oid FROM pg_database WHERE datname = current_database())",
        )

    with _instance(database, tmp_path) as instance:
        for _ in range(3):
            _enqueue(instance, _run(instance))
        with monkeypatch.context() as patch:
            patch.setattr(f"{HERE}.launching", launch)
            _daemon(instance)
        assert len(launched) == 1
        _daemon(instance)
        assert len(launched) == 3
        assert max(Counter(launched).values()) == 1


def test_many_submit_at_once(database: str, tmp_path: Path) -> None:
    """From four instances, with the daemon at work: no more than the limit, none twice, first come first served."""
    together: list[int] = []
    guard = threading.Lock()

    def note(run_id: str) -> None:
        with guard:
            launched.append(run_id)

    with ExitStack() as stack, pytest.MonkeyPatch.context() as patch:
        patch.setattr(f"{HERE}.launching", note)
        instances = [
            stack.enter_context(_instance(database, tmp_path / str(n), runs={"max_concurrent_runs": 7}))
            for n in range(4)
        ]
        watching = stack.enter_context(_instance(database, tmp_path / "watch", runs={"max_concurrent_runs": 7}))
        over = threading.Event()

        def empty_the_queue() -> None:
            while not over.is_set():
                _daemon(watching)
                together.append(watching.get_runs_count(RunsFilter(statuses=[DagsterRunStatus.STARTING])))

        daemon = threading.Thread(target=empty_the_queue)
        daemon.start()
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda n: _submit(instances[n % 4], _run(instances[n % 4])), range(24)))
        over.set()
        daemon.join()
        assert max(together) <= 7
        assert watching.get_runs_count(RunsFilter(statuses=[DagsterRunStatus.STARTING])) == 7
        assert watching.get_runs_count(RunsFilter(statuses=[DagsterRunStatus.QUEUED])) == 17
        assert max(Counter(launched).values()) == 1
        assert len(launched) == 7


def test_a_run_in_the_queue_is_cancelled(database: str, tmp_path: Path) -> None:
    with _instance(database, tmp_path, runs={"max_concurrent_runs": 0}) as instance:
        run = _run(instance)
        _submit(instance, run)
        assert instance.run_coordinator.cancel_run(run.run_id)
        found = instance.get_run_by_id(run.run_id)
        assert found is not None
        assert found.status is DagsterRunStatus.CANCELED


def test_the_daemon_has_all_its_parts_and_our_queue(database: str, tmp_path: Path) -> None:
    with _instance(database, tmp_path) as instance:
        daemons = create_daemons(instance)
        assert [type(one).daemon_type() for one in daemons] == list(instance.get_required_daemon_types())
        assert [type(one) for one in daemons if one.daemon_type() == "QUEUED_RUN_COORDINATOR"] == [LockedQueueDaemon]


def test_settings_that_contradict_are_refused(database: str, tmp_path: Path) -> None:
    """Dagster looks at the name of the class for this."""
    settings = _settings(database, runs={"max_concurrent_runs": 2})
    settings["run_coordinator"]["config"] = {"max_concurrent_runs": 3}
    with (
        pytest.raises(DagsterInvalidConfigError, match="incompatible"),
        instance_for_test(temp_dir=str(tmp_path), overrides=settings),
    ):
        pass


def test_without_postgresql_the_daemon_does_it_all(tmp_path: Path) -> None:
    settings = _settings("")
    del settings["storage"]
    with instance_for_test(temp_dir=str(tmp_path), overrides=settings) as instance:
        assert _submit(instance, _run(instance)) is DagsterRunStatus.QUEUED
