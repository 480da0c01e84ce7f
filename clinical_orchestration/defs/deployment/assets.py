"""The champion: promotion by rule, and the model server's answer."""

from collections.abc import Iterator
from typing import Any

import dagster as dg

from clinical_orchestration.defs.common import asset_key, spec, step
from clinical_orchestration.defs.results import materialized, result_of
from clinical_orchestration.defs.training.assets import REGISTERED_VERSION
from clinical_orchestration.resources import PipelineResource
from clinical_orchestration.stores.registry import PROMOTION_TAG, ModelRegistry
from clinical_orchestration.stores.serving import ServingClient, answers_with

CHAMPION = "models/champion"
SERVED = dg.AssetCheckSpec(
    "champion_is_served",
    asset=asset_key(CHAMPION),
    description="The model server answers with the version that the alias champion points to.",
)


@step(
    specs=[
        spec(
            CHAMPION,
            "The version that serves: the alias `champion` moves to a new version only when the trial's promotion rule "
            "holds (floor, not worse than the champion, calibration); the model server follows without a restart.",
            group="deployment",
            kinds={"mlflow", "fastapi"},
            deps=[REGISTERED_VERSION],
        )
    ],
    check_specs=[SERVED],
    pool="model_serving",
)
def deploy_model(
    context: dg.AssetExecutionContext,
    pipeline: PipelineResource,
    registry: dg.ResourceParam[ModelRegistry],
    serving: dg.ResourceParam[ServingClient],
) -> Iterator[dg.MaterializeResult[Any]]:
    """Decide on the registered version, move the alias if it may, and see the server answer with the champion."""
    from clinical_orchestration.modeling.plots import decision_table
    from clinical_orchestration.modeling.promotion import decide

    profile = pipeline.profile()
    registered = result_of(context, asset_key(REGISTERED_VERSION), profile.name)
    name, version = registered["model_name"], registered["version"]
    champion = registry.champion(name)
    metadata: dict[str, Any] = {"model": name, "registered_version": version}
    info = next(item for item in registry.versions(name) if item.version == version)
    if champion is not None and champion.version == version:
        outcome = "unchanged"
        metadata["note"] = f"version {version} is the champion already"
        if info.promoted_at is None:  # the run before ended between the alias and its story
            registry.promote(name, version, at=info.created_at)
    elif info.rolled_back or info.promoted_at is not None:
        # only new versions are decided on here: else this step would undo what retraining or a rollback did
        outcome = "unchanged"
        story = "was rolled back" if info.rolled_back else "was champion before another one replaced it"
        metadata["note"] = f"version {version} {story}; it comes back by a rollback or by hand only"
    else:
        decision = decide(
            registry.evaluation_of(info),
            None if champion is None else registry.evaluation_of(champion),
            profile.promotion,
        )
        registry.record_decision(name, version, decision)
        metadata["decision"] = dg.MetadataValue.md(decision_table(decision))
        metadata["reasons"] = "; ".join(decision.reasons)
        outcome = "promoted" if decision.promote else "refused"
        if decision.promote:
            registry.promote(name, version)
            champion = info
        else:
            registry.set_version_tags(name, version, {PROMOTION_TAG: "refused"})
        context.log.info("%s version %s is %s: %s", name, version, outcome, "; ".join(decision.reasons))
    served, served_metadata = answers_with(serving, profile.name, champion.version if champion else None)
    yield materialized(
        asset_key(CHAMPION),
        profile.name,
        {
            "model_name": name,
            "version": version,
            "outcome": outcome,
            "champion": None if champion is None else champion.version,
            "served": served,
        },
        {
            **metadata,
            "outcome": outcome,
            "champion_version": "none" if champion is None else champion.version,
            "serving": dg.MetadataValue.url(f"{serving.url}/docs"),
        },
        [dg.AssetCheckResult(check_name=SERVED.name, passed=served, metadata=served_metadata)],
    )
