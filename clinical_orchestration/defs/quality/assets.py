"""Table rules, completeness and one score a table, compared with the platform's threshold."""

from collections.abc import Iterator
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import dagster as dg

from clinical_orchestration.defs.common import asset_key, markdown_table, spec, step
from clinical_orchestration.defs.deployment.assets import CHAMPION
from clinical_orchestration.defs.results import materialized
from clinical_orchestration.resources import PipelineResource
from clinical_orchestration.stores.objects import Objects
from clinical_orchestration.stores.tables import TableStore
from clinical_orchestration.tables import DOMAINS, QUARANTINE, silver

if TYPE_CHECKING:
    import polars as pl

    from clinical_orchestration.quality.rules import TableQuality

CLINICAL_DATA_QUALITY = "quality/clinical_data"
SCORE = dg.AssetCheckSpec(
    "quality_score_at_least_threshold",
    asset=asset_key(CLINICAL_DATA_QUALITY),
    description="The score of every silver table is at least the variable data_quality_threshold.",
)
RULES = dg.AssetCheckSpec(
    "table_rules_hold",
    asset=asset_key(CLINICAL_DATA_QUALITY),
    description="No silver table breaks a rule beyond its tolerance.",
)


@step(
    specs=[
        spec(
            CLINICAL_DATA_QUALITY,
            "How good the trial's silver tables are: rules, completeness, share of accepted records "
            "and a score a table. Each run leaves a JSON report in the bucket.",
            group="quality",
            kinds={"polars", "minio"},
            deps=[CHAMPION, QUARANTINE, *(silver(domain) for domain in DOMAINS)],
        )
    ],
    check_specs=[SCORE, RULES],
    pool="data_validation",
)
def validate_data_quality(
    context: dg.AssetExecutionContext,
    pipeline: PipelineResource,
    tables: dg.ResourceParam[TableStore],
    objects: dg.ResourceParam[Objects],
) -> Iterator[dg.MaterializeResult[Any]]:
    """Check the trial's rows of every silver table."""
    profile = pipeline.profile()
    threshold = pipeline.variables().data_quality_threshold
    now = datetime.now(UTC)
    qualities = _qualities(tables, profile.name, now)
    scores = {domain: quality.score for domain, quality in qualities.items()}
    low = {domain: score for domain, score in scores.items() if score < threshold}
    broken = [(domain, failure) for domain, quality in qualities.items() for failure in quality.failures]
    report = objects.put(
        f"reports/quality/{profile.name}/{now:%Y-%m-%dT%H%M%SZ}.json",
        _report(qualities, profile.name, now, threshold, context.run.run_id),
        "application/json",
    )
    yield materialized(
        asset_key(CLINICAL_DATA_QUALITY),
        profile.name,
        {"scores": scores, "threshold": threshold, "broken_rules": [failure.name for _, failure in broken]},
        {
            "lowest_score": min(scores.values(), default=1.0),
            "threshold": threshold,
            "report": dg.MetadataValue.path(report),
            "tables": markdown_table(
                ["table", "rows", "score", "accepted", "rules broken"],
                [
                    (domain, quality.rows, quality.score, quality.acceptance_rate, len(quality.failures))
                    for domain, quality in qualities.items()
                ],
            ),
            "rules": markdown_table(
                ["table", "rule", "checked", "failed", "tolerated share", "holds"],
                [
                    (domain, rule.name, rule.checked, rule.failed, rule.tolerance, rule.passed)
                    for domain, quality in qualities.items()
                    for rule in quality.results
                ],
            ),
        },
        [
            dg.AssetCheckResult(check_name=SCORE.name, passed=not low, metadata={"threshold": threshold, **low}),
            dg.AssetCheckResult(
                check_name=RULES.name,
                passed=not broken,
                metadata={
                    "broken": markdown_table(
                        ["table", "rule", "failed", "of"],
                        [(domain, rule.description, rule.failed, rule.checked) for domain, rule in broken],
                    )
                },
            ),
        ],
    )


def _report(qualities: "dict[str, TableQuality]", trial: str, now: datetime, threshold: float, run_id: str) -> bytes:
    import orjson

    tables = {
        domain: {
            "rows": quality.rows,
            "score": quality.score,
            "acceptance_rate": quality.acceptance_rate,
            "completeness": quality.completeness,
            "rules": [
                {"name": rule.name, "checked": rule.checked, "failed": rule.failed, "passed": rule.passed}
                for rule in quality.results
            ],
        }
        for domain, quality in qualities.items()
    }
    content = {"trial": trial, "at": now, "run_id": run_id, "threshold": threshold, "tables": tables}
    return orjson.dumps(content, option=orjson.OPT_INDENT_2)


def _qualities(tables: TableStore, trial: str, now: datetime) -> "dict[str, TableQuality]":
    import polars as pl

    from clinical_orchestration.quality.rules import check_table

    mine = [("trial", "=", trial)]

    def frame(name: str, columns: list[str] | None = None) -> "pl.DataFrame":
        return pl.DataFrame(pl.from_arrow(tables.read(name, columns=columns, filters=mine)))

    subjects = frame(silver("subjects"))
    rejected = frame(QUARANTINE, ["table", "source_position"])
    found: dict[str, TableQuality] = {}
    for domain in DOMAINS:
        rows = subjects if domain == "subjects" else frame(silver(domain))
        accepted = rows.get_column("source_position").n_unique() if rows.height else 0
        quarantined = rejected.filter(pl.col("table") == domain).height
        received = accepted + quarantined
        rate = accepted / received if received else 1.0
        found[domain] = check_table(domain, rows, now=now, subjects=subjects, acceptance_rate=rate)
    return found
