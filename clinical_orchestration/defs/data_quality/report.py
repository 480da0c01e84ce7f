"""One score a table over time, the report with its plots, and the alerts."""

from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from typing import Any

import dagster as dg

from clinical_orchestration.alerts.model import Alert, Notifier, Severity
from clinical_orchestration.defs.common import asset_key, markdown_table, spec, step
from clinical_orchestration.defs.data_quality.keys import (
    ANOMALIES,
    COMPLETENESS,
    CONSISTENCY,
    FRESHNESS,
    GROUP,
    REPORT,
    SCHEMA,
    SCORES,
)
from clinical_orchestration.defs.results import find_result, materialized, result_of
from clinical_orchestration.resources import PipelineResource
from clinical_orchestration.stores.objects import Objects
from clinical_orchestration.stores.tables import TableStore
from clinical_orchestration.tables import DOMAINS, QUALITY_SCORES_COLUMNS, arrow_schema

SCORE = dg.AssetCheckSpec(
    "quality_score_at_least_threshold",
    asset=asset_key(REPORT),
    description="The score of every silver table is at least the variable data_quality_threshold.",
)
HISTORY = 500
"""Most rows of the time series in a plot."""


@step(
    specs=[
        spec(
            REPORT,
            "The run's findings as one HTML page with plots in the bucket, the scores, and the alerts that follow.",
            group=GROUP,
            kinds={"matplotlib", "minio"},
            deps=[ANOMALIES, COMPLETENESS, SCHEMA, CONSISTENCY, FRESHNESS],
        ),
        spec(
            SCORES,
            "Quality of each silver table by run: score, completeness, validity, accepted share, coverage.",
            group=GROUP,
            kinds={"deltalake"},
            deps=[ANOMALIES, COMPLETENESS, SCHEMA, CONSISTENCY],
        ),
    ],
    check_specs=[SCORE],
    pool="monitoring_tasks",
)
def generate_quality_report(
    context: dg.AssetExecutionContext,
    pipeline: PipelineResource,
    tables: dg.ResourceParam[TableStore],
    objects: dg.ResourceParam[Objects],
    alerts: dg.ResourceParam[Notifier],
) -> Iterator[dg.MaterializeResult[Any]]:
    """Score the tables, write the time series and the report, raise and resolve alerts."""
    from clinical_orchestration.quality.report import ReportContent, render

    profile = pipeline.profile()
    threshold = pipeline.variables().data_quality_threshold
    now = datetime.now(UTC)
    found = {
        key: result_of(context, asset_key(key), profile.name)
        for key in (COMPLETENESS, SCHEMA, CONSISTENCY, FRESHNESS, ANOMALIES)
    }
    as_of = datetime.fromisoformat(found[FRESHNESS]["as_of"])
    scores = table_scores(found[SCHEMA], found[CONSISTENCY], found[COMPLETENESS])
    version = _append_scores(tables, profile.name, scores, now, as_of, context.run.run_id)
    rules = [rule for key in (COMPLETENESS, SCHEMA, CONSISTENCY) for rule in found[key]["rules"]]
    content = ReportContent(
        trial=profile.name,
        title=profile.title,
        attribution=profile.attribution,
        as_of=as_of,
        made_at=now,
        run_id=context.run.run_id,
        threshold=threshold,
        scores=scores,
        history=_history(tables, profile.name),
        rules=rules,
        sources=found[FRESHNESS]["sources"],
        anomalies=found[ANOMALIES]["anomalies"],
        coverage=found[COMPLETENESS]["cells"],
        rejected=found[ANOMALIES]["rejected"],
    )
    key = f"reports/quality/{profile.name}/{now:%Y-%m-%dT%H%M%SZ}.html"
    uri = objects.put(key, render(content), "text/html; charset=utf-8")
    by_table = {row["table"]: row["score"] for row in scores}
    low = {name: score for name, score in by_table.items() if score < threshold}
    raised = quality_alerts(
        profile.name,
        by_table,
        threshold,
        found[FRESHNESS],
        found[ANOMALIES],
        f"/dagster/runs/{context.run.run_id}",
        uri,
    )
    before = find_result(context, asset_key(REPORT), profile.name) or {}
    for alert in raised:
        alerts.send(alert)
    gone = sorted(set(before.get("alerts", [])) - {alert.key for alert in raised})
    for alert_key in gone:
        alerts.resolve(alert_key, "The newest quality run does not find it any more.")
    stale, anomalies = found[FRESHNESS]["stale"], found[ANOMALIES]["count"]
    broken = [rule for rule in rules if not rule["passed"]]
    yield materialized(
        asset_key(SCORES),
        profile.name,
        {"version": version, "rows": len(scores)},
        {"dagster/row_count": len(scores), "delta_version": version or 0, "uri": tables.uri(SCORES)},
    )
    yield materialized(
        asset_key(REPORT),
        profile.name,
        {
            "scores": by_table,
            "lowest": content.lowest,
            "passed": not low,
            "threshold": threshold,
            "report": uri,
            "stale_sources": stale,
            "anomalies": anomalies,
            "broken_rules": sorted({f"{rule['rule']}:{rule['table']}" for rule in broken}),
            "as_of": as_of.isoformat(),
            "alerts": sorted(alert.key for alert in raised),
            "resolved": gone,
        },
        {
            "lowest_score": content.lowest,
            "threshold": threshold,
            "report": dg.MetadataValue.path(uri),
            "stale_sources": len(stale),
            "anomalies": anomalies,
            "broken_rules": len(broken),
            "alerts_raised": len(raised),
            "alerts_resolved": len(gone),
            "scores": markdown_table(
                ["table", "rows", "score", "completeness", "validity", "accepted", "coverage"],
                [
                    (row["table"], row["rows"], row["score"], row["completeness"], row["validity"], row["acceptance"],
                     row["coverage"])
                    for row in scores
                ],
            ),
        },
        [
            dg.AssetCheckResult(
                check_name=SCORE.name,
                asset_key=asset_key(REPORT),
                passed=not low,
                severity=dg.AssetCheckSeverity.ERROR,
                metadata={"threshold": threshold, **low},
            )
        ],
    )  # fmt: skip


def table_scores(
    schema: Mapping[str, Any], consistency: Mapping[str, Any], completeness: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Return the scores of each silver table from the results of the steps.

    score = completeness x validity x acceptance; validity is the mean, over the rules of the table and those across
    the tables that look at it, of the share of rows that hold them.
    """
    rows = []
    for domain in DOMAINS:
        measures = schema["tables"][domain]
        failed = [
            *measures["failed_shares"],
            *(rule["failed_share"] for rule in consistency["rules"] if rule["table"] == domain),
        ]
        validity = 1.0 - sum(failed) / len(failed) if failed else 1.0
        rows.append(
            {
                "table": domain,
                "rows": measures["rows"],
                "score": measures["completeness"] * validity * measures["acceptance"],
                "completeness": measures["completeness"],
                "validity": validity,
                "acceptance": measures["acceptance"],
                "coverage": completeness["coverage"].get(domain),
                "delta_version": measures["delta_version"],
            }
        )
    return rows


def _append_scores(
    tables: TableStore, trial: str, scores: list[dict[str, Any]], now: datetime, as_of: datetime, run_id: str
) -> int | None:
    """Append the scores of a run, once: a step that is tried again finds its run recorded."""
    import pyarrow as pa

    rows = [{**row, "trial": trial, "scored_at": now, "as_of": as_of, "run_id": run_id} for row in scores]
    data = pa.Table.from_pylist(rows, schema=arrow_schema(QUALITY_SCORES_COLUMNS))
    tables.append(SCORES, data, transactions={f"quality:{run_id}": 1})
    return tables.version(SCORES)


def _history(tables: TableStore, trial: str) -> list[dict[str, Any]]:
    rows = tables.read(SCORES, columns=["table", "scored_at", "score"], filters=[("trial", "=", trial)])
    found: list[dict[str, Any]] = rows.sort_by([("scored_at", "descending")]).slice(0, HISTORY).to_pylist()
    return found


def quality_alerts(
    trial: str,
    scores: Mapping[str, float],
    threshold: float,
    freshness: Mapping[str, Any],
    anomalies: Mapping[str, Any],
    where: str,
    report: str,
) -> list[Alert]:
    """Return the alerts that follow from a run: low scores, stale sources, conspicuous sites."""
    found = []
    for table, score in scores.items():
        if score < threshold:
            found.append(
                Alert(
                    f"data_quality:score:{trial}:{table}",
                    Severity.ERROR,
                    f"Quality of {table} is below its threshold",
                    f"The quality score of {table} is {score:.3f}, the threshold {threshold:.3f}.",
                    where,
                    "See in the report which part of the score is low, and which rules are broken by how many rows.",
                    REPORT,
                    trial,
                    {"report": report, "score": round(score, 4), "threshold": threshold},
                )
            )
    sources = {source["source"]: source for source in freshness["sources"]}
    for name in freshness["stale"]:
        source = sources.get(name)
        if source is None:
            continue
        whole = source["level"] == "table"
        found.append(
            Alert(
                f"data_quality:stale:{trial}:{name}",
                Severity.ERROR if whole else Severity.WARNING,
                f"{name} has stopped sending",
                f"{name} has been silent for {source['silence_hours']:.1f} h; it sends every "
                f"{source['rhythm_hours']:.1f} h at most, and {source['bound_hours']:.1f} h are tolerated.",
                where,
                "Ask the sender whether records are held back; look at the topic's lag and at the quarantine.",
                FRESHNESS,
                trial,
                {"report": report, "newest": source["newest"], "silence_hours": source["silence_hours"]},
            )
        )
    by_site: dict[str, list[Mapping[str, Any]]] = {}
    for item in anomalies["anomalies"]:
        by_site.setdefault(item["site"] or "unknown", []).append(item)
    for site, items in sorted(by_site.items()):
        bad = any(item["severity"] == "error" for item in items)
        found.append(
            Alert(
                f"data_quality:anomaly:{trial}:{site}",
                Severity.ERROR if bad else Severity.WARNING,
                f"{site} differs from the other sites",
                " ".join(f"{item['description']}." for item in items[:3])
                + (f" And {len(items) - 3} more." if len(items) > 3 else ""),
                where,
                "Compare the site's devices, units and entry with the others and see quality/cleaning_log.",
                ANOMALIES,
                trial,
                {"report": report, "rules": sorted({item["rule"] for item in items}), "findings": len(items)},
            )
        )
    return found
