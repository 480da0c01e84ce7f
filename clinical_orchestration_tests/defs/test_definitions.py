"""The code location: names, edges, pools, retry rules and schedules as the contract has them."""

from datetime import UTC, datetime

import dagster as dg
import pytest
from dagster._utils.schedules import cron_string_iterator

from clinical_orchestration.contract import CLINICAL_DATA_PIPELINE, POOLS, RETRIES, RETRY_DELAY_SECONDS
from clinical_orchestration.definitions import defs
from clinical_orchestration.instance import ensure_pools


@pytest.fixture(scope="module")
def job() -> dg.JobDefinition:
    return defs.resolve_job_def(CLINICAL_DATA_PIPELINE.name)


def test_definitions_are_loadable() -> None:
    dg.Definitions.validate_loadable(defs)


@pytest.mark.parametrize(("asked", "where"), [({}, "in_process"), ({"steps": "forked"}, "forked")])
def test_a_run_may_ask_for_isolated_steps(job: dg.JobDefinition, asked: dict[str, str], where: str) -> None:
    config = dg.validate_run_config(job, {"execution": {"config": asked}})
    assert config["execution"]["shared"]["steps"] == where


def test_steps_carry_the_task_ids_of_the_contract(job: dg.JobDefinition) -> None:
    assert {node.name for node in job.graph.nodes} == set(CLINICAL_DATA_PIPELINE.steps)


def test_steps_run_in_the_order_of_the_contract(job: dg.JobDefinition) -> None:
    upstream: dict[str, set[str]] = {node.name: set() for node in job.graph.nodes}
    for invocation, inputs in job.graph.dependencies.items():
        for dependency in inputs.values():
            upstream[invocation.name] |= {node.node for node in dependency.get_node_dependencies()}

    def ancestors(step: str) -> set[str]:
        return upstream[step].union(*(ancestors(parent) for parent in upstream[step]))

    for before, after in CLINICAL_DATA_PIPELINE.edges:
        if before in upstream and after in upstream:
            assert before in ancestors(after), f"{after} does not wait for {before}"


def test_every_asset_is_described_owned_and_grouped() -> None:
    for spec in defs.resolve_all_asset_specs():
        assert spec.description
        assert spec.owners == ["team:clinical_trials_team"]
        assert spec.group_name != "default"
        assert spec.kinds
        assert spec.code_version


def test_every_step_has_a_pool_of_the_contract_and_its_retry_rule(job: dg.JobDefinition) -> None:
    for node in job.graph.nodes:
        operation = node.definition
        assert isinstance(operation, dg.OpDefinition)
        assert operation.pool in POOLS
        assert operation.retry_policy is not None
        assert (operation.retry_policy.max_retries, operation.retry_policy.delay) == (RETRIES, RETRY_DELAY_SECONDS)


def test_schedule_fires_every_six_hours_utc() -> None:
    schedule = defs.resolve_schedule_def("clinical_data_pipeline_schedule")
    ticks = cron_string_iterator(
        datetime(2026, 3, 28, 12, 30, tzinfo=UTC).timestamp(), str(schedule.cron_schedule), schedule.execution_timezone
    )
    assert [next(ticks).strftime("%d %H:%M") for _ in range(5)] == [
        "28 18:00", "29 00:00", "29 06:00", "29 12:00", "29 18:00",
    ]  # fmt: skip


def test_every_resource_a_step_needs_is_provided(job: dg.JobDefinition) -> None:
    needed = set().union(*(node.definition.required_resource_keys for node in job.graph.nodes))
    assert needed <= set(job.resource_defs)


def test_pools_are_set_once_and_left_alone_afterwards() -> None:
    with dg.DagsterInstance.local_temp() as instance:
        assert ensure_pools(instance) == POOLS
        instance.event_log_storage.set_concurrency_slots("spark_jobs", 7)
        assert ensure_pools(instance) == {}
        limits = {pool.name: pool.limit for pool in instance.event_log_storage.get_pool_limits()}
        assert limits["spark_jobs"] == 7
