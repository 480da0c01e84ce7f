"""Features in the lakehouse, and the newest ones of each patient in Redis."""

from collections.abc import Iterator
from typing import Any

import dagster as dg

from clinical_orchestration.defs.common import asset_key, spec, step
from clinical_orchestration.defs.results import materialized
from clinical_orchestration.resources import PipelineResource
from clinical_orchestration.stores.feature_store import OfflineStore, compare
from clinical_orchestration.stores.online import OnlineStore
from clinical_orchestration.stores.spark import SparkTables
from clinical_orchestration.stores.tables import TableStore
from clinical_orchestration.tables import DOMAINS, FEATURES, silver

GROUP = "features"
ONLINE_FEATURES = "online/patient_features"
ROWS = dg.AssetCheckSpec(
    "there_are_feature_rows",
    asset=asset_key(FEATURES),
    blocking=True,
    description="The trial has feature rows: without one there is nothing to train on or to serve.",
)
ENOUGH = dg.AssetCheckSpec(
    "features_as_many_as_expected",
    asset=asset_key(FEATURES),
    description="The trial has at least as many features as the variable feature_count_threshold says.",
)
EQUAL = dg.AssetCheckSpec(
    "online_equals_offline",
    asset=asset_key(ONLINE_FEATURES),
    blocking=True,
    description="The online features of every patient equal the newest offline row, value by value.",
)


@step(
    specs=[
        spec(
            FEATURES,
            "What was known of a subject at a time: vitals over windows, derived values, labs, medications, context, "
            "event history and interactions; only from what had happened and been received by then.",
            group=GROUP,
            kinds={"spark", "deltalake"},
            deps=[silver(domain) for domain in DOMAINS],
            metadata={"partition_column": "feature_date"},
        ),
        spec(
            ONLINE_FEATURES,
            "The newest features of each patient in Redis, `patient:{id}:features`, for the model server; kept 72 "
            "hours.",
            group=GROUP,
            kinds={"redis"},
            deps=[silver(domain) for domain in DOMAINS],
        ),
    ],
    check_specs=[ROWS, ENOUGH, EQUAL],
    pool="feature_engineering",
)
def extract_features(
    context: dg.AssetExecutionContext,
    pipeline: PipelineResource,
    tables: dg.ResourceParam[TableStore],
    spark: dg.ResourceParam[SparkTables],
    online: dg.ResourceParam[OnlineStore],
) -> Iterator[dg.MaterializeResult[Any]]:
    """Compute features where silver changed, load the newest ones, and compare both stores."""
    profile = pipeline.profile()
    offline = OfflineStore(spark, tables)
    report = offline.refresh(profile, full=pipeline.flag("full_features"))
    up_to_date = report.status == "up_to_date"
    context.log.info(
        "No new data: the features stay as they are."
        if up_to_date
        else f"{report.computed_rows} rows of {report.computed_patients} patients computed, "
        f"{report.changed_rows} changed on {report.changed_dates} days."
    )
    wanted = pipeline.variables().feature_count_threshold
    yield materialized(
        asset_key(FEATURES),
        profile.name,
        {
            "rows": report.rows, "patients": report.patients, "features": report.features, "status": report.status,
            "version": report.version, "changed_rows": report.changed_rows,
        },
        {
            "dagster/row_count": report.rows,
            "patients": report.patients,
            "features": report.features,
            "feature_set": report.feature_set,
            "status": report.status,
            "computed_rows": report.computed_rows,
            "changed_rows": report.changed_rows,
            "changed_dates": report.changed_dates,
            "seconds": dg.MetadataValue.json(dict(report.seconds)),
            "silver_versions": dg.MetadataValue.json(dict(report.silver_versions)),
            "delta_version": report.version or 0,
            "uri": tables.uri(FEATURES),
            **({} if report.null_share is None else {"null_share": report.null_share}),
            **({"note": "no new data"} if up_to_date else {}),
        },
        [
            dg.AssetCheckResult(check_name=ROWS.name, asset_key=asset_key(FEATURES), passed=report.rows > 0),
            dg.AssetCheckResult(
                check_name=ENOUGH.name,
                asset_key=asset_key(FEATURES),
                passed=report.features >= wanted,
                severity=dg.AssetCheckSeverity.WARN,
                metadata={"features": report.features, "wanted": wanted},
            ),
        ],
    )  # fmt: skip
    newest = offline.newest(profile)
    loaded = online.put(newest)
    compared = compare(newest, online)
    yield materialized(
        asset_key(ONLINE_FEATURES),
        profile.name,
        {"patients": loaded.total, "written": loaded.written, "unchanged": loaded.unchanged, "older": loaded.older},
        {
            "patients": loaded.total,
            "written": loaded.written,
            "unchanged": loaded.unchanged,
            "older_than_online": loaded.older,
        },
        [
            dg.AssetCheckResult(
                check_name=EQUAL.name,
                asset_key=asset_key(ONLINE_FEATURES),
                passed=compared.consistent,
                metadata={
                    "checked": compared.checked,
                    "equal": compared.equal,
                    "missing": compared.missing,
                    "newer_online": compared.newer,
                    "differing": compared.differing,
                },
            )
        ],
    )
