"""A small code location whose jobs have the names and steps of the contract and do next to nothing."""

import threading
import warnings

import dagster as dg

from clinical_orchestration.contract import PIPELINES, SCHEDULED_RETRAINING, Pipeline

failing: set[str] = set()
"""Steps that fail while their name is here; the in-process launcher runs them in the test's own process."""

holding: dict[str, threading.Event] = {}
"""Steps that wait for their event, for tests that look at a run while it works."""

conf_seen: list[dict] = []  # type: ignore[type-arg]


class PipelineConf(dg.ConfigurableResource):  # type: ignore[type-arg]
    """Takes the conf as the real resource does."""

    conf: dict = {}  # type: ignore[type-arg]  # noqa: RUF012
    trial: str | None = None
    source: str | None = None


def step(of: Pipeline, name: str) -> dg.AssetsDefinition:
    upstream = [before for before, after in of.edges if after == name and before in of.steps]
    branches = of is SCHEDULED_RETRAINING
    below = {after for before, after in of.edges if before == name and after in of.steps}
    outputs = sorted(below) if len(below) > 1 and branches else ["done"]

    @dg.multi_asset(
        name=name,
        specs=[
            dg.AssetSpec(
                [of.name, name, output],
                deps=[
                    dg.AssetKey(
                        [of.name, before, name if branches and before == "check_retraining_conditions" else "done"]
                    )
                    for before in upstream
                ],
                skippable=len(outputs) > 1,
                group_name=of.name,
            )
            for output in outputs
        ],
        retry_policy=dg.RetryPolicy(max_retries=1) if name == "flaky" else None,
        pool="data_validation",
    )
    def work(context: dg.AssetExecutionContext, pipeline: PipelineConf):  # type: ignore[no-untyped-def]
        context.log.info("working on %s", name)
        conf_seen.append(dict(pipeline.conf))
        if name in holding:
            holding[name].wait(30)
        if name in failing or pipeline.conf.get("fail") == name:
            raise ValueError("made to fail")
        for output in outputs[-1:]:  # of two branches the second is taken
            yield dg.MaterializeResult(
                asset_key=[of.name, name, output], metadata={"result": {"rows": 3, "step": name}}
            )

    return work


def location() -> dg.Definitions:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", dg.BetaWarning)
        assets = dg.with_source_code_references(
            [step(pipeline, name) for pipeline in PIPELINES for name in pipeline.steps]
        )
    jobs = [
        dg.define_asset_job(
            pipeline.name,
            selection=dg.AssetSelection.groups(pipeline.name),
            executor_def=dg.in_process_executor,
            tags={f"airflow/{tag}": "true" for tag in pipeline.tags},
        )
        for pipeline in PIPELINES
    ]
    schedules = [
        dg.ScheduleDefinition(
            name=f"{pipeline.name}_schedule",
            job_name=pipeline.name,
            cron_schedule=pipeline.cron,
            execution_timezone="UTC",
            default_status=dg.DefaultScheduleStatus.RUNNING,
        )
        for pipeline in PIPELINES
        if pipeline.cron
    ]
    return dg.Definitions(assets=assets, jobs=jobs, schedules=schedules, resources={"pipeline": PipelineConf()})


__all__ = ["conf_seen", "defs", "failing", "holding"]
defs = location()
