"""The checks of a trial's data: complete, as described, consistent, fresh, and no site unlike the others."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import dagster as dg

from clinical_orchestration.defs.common import asset_key, markdown_table, spec, step
from clinical_orchestration.defs.data_quality.frames import MEASURED, TrialFrames
from clinical_orchestration.defs.data_quality.keys import (
    ANOMALIES,
    COMPLETENESS,
    CONSISTENCY,
    FRESHNESS,
    GROUP,
    SCHEMA,
)
from clinical_orchestration.defs.results import materialized
from clinical_orchestration.resources import PipelineResource
from clinical_orchestration.stores.tables import TableStore
from clinical_orchestration.tables import DOMAINS, QUARANTINE, bronze, silver

if TYPE_CHECKING:
    from clinical_orchestration.quality.results import RuleResult

SILVER = [silver(domain) for domain in DOMAINS]
SHOWN = 120
"""Most sources, cells or findings that a step hands on."""


def _check(name: str, asset: str, description: str) -> dg.AssetCheckSpec:
    return dg.AssetCheckSpec(name, asset=asset_key(asset), description=description)


COMPLETE = _check(
    "data_is_complete", COMPLETENESS, "Columns are filled, expected measurements arrived, and from every site."
)
ROWS_VALID = _check(
    "rows_match_their_schema", SCHEMA, "Every silver row has the columns, types and values that its schema says."
)
TABLE_RULES = _check("table_rules_hold", SCHEMA, "No silver table breaks a rule beyond its tolerance.")
CONTRACT = _check(
    "messages_follow_the_contract", SCHEMA, "Messages are of the contract version clinical_data_schema_version."
)
SDTM = _check("sdtm_rules_hold", SCHEMA, "SDTM rows hold the published conformance rules of docs/quality.md.")
CONSISTENT = _check("domains_are_consistent", CONSISTENCY, "Nothing contradicts itself across the tables.")
FRESH = _check("sources_are_fresh", FRESHNESS, "Every source that is expected to send has sent in its own rhythm.")
ALIKE = _check("sites_are_alike", ANOMALIES, "No site is conspicuous among the others.")


def judged(check: dg.AssetCheckSpec, rules: Sequence["RuleResult"]) -> dg.AssetCheckResult:
    """Return a check's result: an error where an error rule is broken, a warning where another one is."""
    broken = [rule for rule in rules if not rule.passed]
    error = any(rule.blocking for rule in broken)
    return dg.AssetCheckResult(
        check_name=check.name,
        asset_key=check.asset_key,
        passed=not broken,
        severity=dg.AssetCheckSeverity.ERROR if error else dg.AssetCheckSeverity.WARN,
        metadata={"rules": len(rules), "broken": rules_table(broken)},
    )


def rules_table(rules: Iterable["RuleResult"]) -> dg.MetadataValue:
    """Return rule results as a Markdown table."""
    return markdown_table(
        ["rule", "table", "what must hold", "checked", "fails", "tolerated", "where most"],
        [
            (rule.rule, rule.table, rule.description, rule.checked, rule.failed, f"{rule.tolerance:.1%}",
             ", ".join(f"{name} {count}" for name, count in list(rule.groups.items())[:3]))
            for rule in rules
        ],
    )  # fmt: skip


@step(
    specs=[
        spec(
            COMPLETENESS,
            "What should be there and is not: filled columns, measurements of attended visits or monitored days, "
            "by test and by site.",
            group=GROUP,
            kinds={"polars"},
            deps=[QUARANTINE, *SILVER],
        )
    ],
    check_specs=[COMPLETE],
    pool="data_validation",
)
def check_data_completeness(
    pipeline: PipelineResource, tables: dg.ResourceParam[TableStore]
) -> Iterator[dg.MaterializeResult[Any]]:
    """Compare what arrived with what the trial's own plan, learned from its data, expects."""
    import polars as pl

    from clinical_orchestration.quality import completeness as complete
    from clinical_orchestration.quality.rules import completeness as filled_shares
    from clinical_orchestration.quality.schemas import EXPECTED_COLUMNS, KEY_COLUMNS, REQUIRED_COLUMNS

    profile = pipeline.profile()
    frames = TrialFrames(tables, profile)
    sites = frames.sites()
    rules: list[RuleResult] = []
    cells: list[dict[str, Any]] = []
    filled: dict[str, float] = {}
    coverage: dict[str, float] = {}
    measured: dict[str, pl.DataFrame] = {}
    for domain in DOMAINS:
        expected = list(dict.fromkeys((*KEY_COLUMNS, *REQUIRED_COLUMNS[domain], *EXPECTED_COLUMNS[domain])))
        more = [*complete.COLUMNS, "value"] if domain in MEASURED else []
        more += ["text_value"] if domain == "lab_results" else []
        rows = frames.silver(domain, *dict.fromkeys([*expected, *more]))
        shares = filled_shares(domain, rows)
        filled[domain] = sum(shares.values()) / len(shares)
        rules.append(complete.filled_rule(domain, shares, rows.height))
        if domain in MEASURED:
            measured[domain] = rows
    spans = complete.spans(*measured.values()).join(sites, on="patient_id", how="left")
    for domain, rows in measured.items():
        if rows.is_empty():
            continue
        here = rows.select(*complete.COLUMNS).join(sites, on="patient_id", how="left")
        by_visit = profile.features.times.kind == "visit"
        found = complete.visit_coverage(here) if by_visit else complete.daily_coverage(here, spans)
        rules += complete.coverage_rules(domain, found)
        rules.append(complete.tests_without_values(rows, domain))
        if found.height:
            coverage[domain] = int(found["received"].sum()) / max(1, int(found["expected"].sum()))
        by_test = complete.coverage_by(found, "site", "test_code")
        cells += [
            {"table": domain, "site": site, "test": test, "expected": expected_, "received": received}
            for site, test, expected_, received, _ in by_test.head(4 * SHOWN).iter_rows()
        ]
    yield materialized(
        asset_key(COMPLETENESS),
        profile.name,
        {
            "filled": filled,
            "coverage": coverage,
            "cells": cells,
            "rules": [rule.as_dict() for rule in rules],
            "broken": sum(not rule.passed for rule in rules),
        },
        {
            "expected_by": "attended visits" if profile.features.times.kind == "visit" else "days of monitoring",
            "filled": markdown_table(["table", "share of filled cells"], filled.items()),
            "coverage": markdown_table(["table", "expected measurements that arrived"], coverage.items()),
            "lowest": markdown_table(
                ["table", "site", "test", "expected", "received", "share"],
                [
                    (cell["table"], cell["site"], cell["test"], cell["expected"], cell["received"],
                     cell["received"] / max(1, cell["expected"]))
                    for cell in sorted(cells, key=lambda cell: cell["received"] / max(1, cell["expected"]))[:15]
                ],
            ),
            "rules": rules_table(rules),
        },
        [judged(COMPLETE, rules)],
    )  # fmt: skip


@step(
    specs=[
        spec(
            SCHEMA,
            "Silver rows against their pandera schemas and table rules, messages against the contract version, SDTM "
            "rows against published conformance rules.",
            group=GROUP,
            kinds={"polars", "pandera"},
            deps=[QUARANTINE, *SILVER, *(bronze(domain) for domain in DOMAINS)],
        )
    ],
    check_specs=[ROWS_VALID, TABLE_RULES, CONTRACT, SDTM],
    pool="data_validation",
)
def validate_data_schema(
    pipeline: PipelineResource, tables: dg.ResourceParam[TableStore]
) -> Iterator[dg.MaterializeResult[Any]]:
    """Validate every row of the trial and what it was made from."""
    from dataclasses import replace

    from clinical_orchestration.quality.rules import check_table
    from clinical_orchestration.quality.schemas import contract_versions, validate_schema
    from clinical_orchestration.quality.sdtm import check_conformance
    from clinical_orchestration.transforms.messages import SCHEMA_VERSIONS

    profile = pipeline.profile()
    frames = TrialFrames(tables, profile)
    now = datetime.now(UTC)
    wanted = pipeline.variables().clinical_data_schema_version
    rejected = frames.read(QUARANTINE, ["table", "source_position"])
    subjects = frames.silver("subjects")
    rows_rules: list[RuleResult] = []
    table_rules: list[RuleResult] = []
    versions: list[RuleResult] = []
    measures: dict[str, dict[str, Any]] = {}
    for domain in DOMAINS:
        rows = subjects if domain == "subjects" else frames.silver(domain)
        rows_rules += validate_schema(domain, rows)
        accepted = rows.get_column("source_position").n_unique() if rows.height else 0
        quality = check_table(
            domain, rows, now=now, subjects=subjects, acceptance_rate=frames.acceptance(domain, accepted, rejected)
        )
        table_rules += [replace(rule, table=domain, rule="DQ-TBL") for rule in quality.results]
        measures[domain] = {
            "rows": rows.height,
            "completeness": sum(quality.completeness.values()) / len(quality.completeness),
            "acceptance": quality.acceptance_rate,
            "failed_shares": [rule.failed_share for rule in quality.results],
            "delta_version": tables.version(silver(domain)),
        }
        found = frames.versions(domain, now)
        if found:
            versions.append(contract_versions(found, wanted, domain, SCHEMA_VERSIONS))
    sdtm_rules = check_conformance(frames.sdtm_rows())
    rules = [*rows_rules, *table_rules, *versions, *sdtm_rules]
    yield materialized(
        asset_key(SCHEMA),
        profile.name,
        {
            "tables": measures,
            "rules": [rule.as_dict() for rule in rules],
            "broken": sum(not rule.passed for rule in rules),
            "contract_version": wanted,
        },
        {
            "dagster/row_count": sum(entry["rows"] for entry in measures.values()),
            "tables": markdown_table(
                ["table", "rows", "filled", "accepted"],
                [(name, item["rows"], item["completeness"], item["acceptance"]) for name, item in measures.items()],
            ),
            "broken": rules_table(rule for rule in rules if not rule.passed),
            "sdtm": rules_table(sdtm_rules),
        },
        [
            judged(ROWS_VALID, rows_rules),
            judged(TABLE_RULES, table_rules),
            judged(CONTRACT, versions),
            judged(SDTM, sdtm_rules),
        ],
    )


@step(
    specs=[
        spec(
            CONSISTENCY,
            "Rules across the tables: unknown subjects, records before consent or after death, dates out of order, "
            "units, sex and age, study drug outside treatment.",
            group=GROUP,
            kinds={"polars"},
            deps=SILVER,
        )
    ],
    check_specs=[CONSISTENT],
    pool="data_validation",
)
def check_data_consistency(
    pipeline: PipelineResource, tables: dg.ResourceParam[TableStore]
) -> Iterator[dg.MaterializeResult[Any]]:
    """Apply the rules across the tables."""
    from clinical_orchestration.quality.consistency import COLUMNS, check_consistency

    profile = pipeline.profile()
    frames = TrialFrames(tables, profile)
    rules = check_consistency({domain: frames.silver(domain, *columns) for domain, columns in COLUMNS.items()})
    yield materialized(
        asset_key(CONSISTENCY),
        profile.name,
        {"rules": [rule.as_dict() for rule in rules], "broken": sum(not rule.passed for rule in rules)},
        {
            "rules": rules_table(rules),
            **({} if rules else {"note": "the trial has no subjects yet: nothing can be compared"}),
        },
        [judged(CONSISTENT, rules)],
    )


@step(
    specs=[
        spec(
            FRESHNESS,
            "Which sources (tables, sites, laboratories, tests at a site) have been silent for longer than their own "
            "rhythm explains.",
            group=GROUP,
            kinds={"polars"},
            deps=[COMPLETENESS, SCHEMA, CONSISTENCY],
        )
    ],
    check_specs=[FRESH],
    pool="monitoring_tasks",
)
def monitor_data_freshness(
    pipeline: PipelineResource, tables: dg.ResourceParam[TableStore]
) -> Iterator[dg.MaterializeResult[Any]]:
    """Judge the silence of each source against its history."""
    import polars as pl

    from clinical_orchestration.quality.freshness import newest_record, observation_ends, source_freshness
    from clinical_orchestration.trials.clock import trial_now

    profile = pipeline.profile()
    frames = TrialFrames(tables, profile)
    sites = frames.sites()
    arrivals = frames.arrivals(sites, frames.rejections(sites))
    subjects = frames.silver("subjects", "patient_id", "event_time", "treatment_end", "death_time", "screen_failure")
    measured = arrivals.filter(pl.col("table").is_in(MEASURED))
    now = trial_now(profile, newest_record(measured.select("patient_id", "time")), datetime.now(UTC))
    sources = source_freshness(arrivals, observation_ends(subjects), now, tables=MEASURED)
    stale = [source for source in sources if source.status == "stale"]
    counts = {status: sum(source.status == status for source in sources)
              for status in ("fresh", "stale", "closed", "new")}  # fmt: skip
    worst = sorted(sources, key=lambda source: source.silence / source.bound if source.bound else 0.0, reverse=True)
    whole_table = any(source.level == "table" for source in stale)
    table = _sources_table(stale)
    yield materialized(
        asset_key(FRESHNESS),
        profile.name,
        {
            "as_of": now.isoformat(),
            "clock": profile.clock,
            "counts": counts,
            "stale": [source.source for source in stale],
            "sources": [source.as_dict() for source in (stale + [s for s in worst if s.status != "stale"])[:SHOWN]],
        },
        {
            "as_of": now.isoformat(),
            "clock": profile.clock,
            **counts,
            "stale_sources": table,
            "most_silent": _sources_table(worst[:15]),
        },
        [
            dg.AssetCheckResult(
                check_name=FRESH.name,
                passed=not stale,
                severity=dg.AssetCheckSeverity.ERROR if whole_table else dg.AssetCheckSeverity.WARN,
                metadata={"sources": len(sources), "stale": table},
            )
        ],
    )


def _sources_table(sources: Iterable[Any]) -> dg.MetadataValue:
    rows = [source.as_dict() for source in sources]
    names = ("source", "level", "status", "newest", "silence_hours", "rhythm_hours", "bound_hours", "records")
    return markdown_table([name.replace("_", " ") for name in names], [[row[name] for name in names] for row in rows])


@step(
    specs=[
        spec(
            ANOMALIES,
            "Central statistical monitoring: sites whose means, variability, changes, repeated readings, last digits, "
            "outliers or rejected records differ from those of the other sites.",
            group=GROUP,
            kinds={"polars", "scipy"},
            deps=[FRESHNESS],
        )
    ],
    check_specs=[ALIKE],
    pool="monitoring_tasks",
)
def detect_anomalies(
    pipeline: PipelineResource, tables: dg.ResourceParam[TableStore]
) -> Iterator[dg.MaterializeResult[Any]]:
    """Compare the sites of the trial with one another."""
    import polars as pl

    from clinical_orchestration.quality.anomalies import detect, outlier_counts, prepared

    profile = pipeline.profile()
    frames = TrialFrames(tables, profile)
    sites = frames.sites()
    rejected = frames.rejections(sites)
    columns = ("patient_id", "event_time", "test_code", "value", "original_value", "source_position")
    measured = {domain: frames.at_sites(domain, sites, *columns) for domain in MEASURED}
    others = {domain: frames.at_sites(domain, sites, "patient_id", "event_time", "source_position")
              for domain in ("medications", "adverse_events")}  # fmt: skip
    accepted = pl.concat(
        [
            rows.unique("source_position").select(pl.lit(domain).alias("table"), "site", "event_time")
            for domain, rows in {**measured, **others}.items()
        ]
    )
    found = detect(measured["patient_vitals"], measured["lab_results"], rejected, accepted)
    outliers = pl.concat([outlier_counts(prepared(rows)).with_columns(table=pl.lit(domain))
                          for domain, rows in measured.items()])  # fmt: skip
    hits = outliers.filter(pl.col("outliers") > 0).sort("outliers", descending=True).head(20)
    rates = _rejected_rates(rejected, accepted)
    yield materialized(
        asset_key(ANOMALIES),
        profile.name,
        {
            "anomalies": [item.as_dict() for item in found[:SHOWN]],
            "count": len(found),
            "sites": sorted({item.site for item in found if item.site}),
            "rejected": rates,
            "outliers": hits.select("table", "test_code", "readings", "outliers").to_dicts(),
        },
        {
            "anomalies": markdown_table(
                ["rule", "site", "what", "q-value", "severity"],
                [(item.rule, item.site, item.description, f"{item.q_value:.1e}", item.severity) for item in found[:40]],
            ),
            "count": len(found),
            "outliers": markdown_table(
                ["table", "test", "readings", "far from their patient's median"],
                hits.select("table", "test_code", "readings", "outliers").rows(),
            ),
            "rejected": markdown_table(
                ["table", "site", "rejected", "of"],
                [(row["table"], row["site"], row["rejected"], row["total"]) for row in rates[:20]],
            ),
        },
        [
            dg.AssetCheckResult(
                check_name=ALIKE.name,
                passed=not found,
                severity=dg.AssetCheckSeverity.ERROR
                if any(item.severity == "error" for item in found)
                else dg.AssetCheckSeverity.WARN,
                metadata={"count": len(found), "sites": ", ".join(sorted({item.site or "" for item in found}))},
            )
        ],
    )


def _rejected_rates(rejected: Any, accepted: Any) -> list[Mapping[str, Any]]:
    """Return ``table, site, rejected, total`` of records, the highest share first."""
    import polars as pl

    records = rejected.unique(["table", "source_position"])
    taken = accepted.group_by("table", "site").agg(pl.len().alias("accepted"))
    refused = records.group_by("table", "site").agg(pl.len().alias("rejected"))
    both = taken.join(refused, on=["table", "site"], how="full", coalesce=True, nulls_equal=True)
    both = both.with_columns(pl.col("accepted").fill_null(0), pl.col("rejected").fill_null(0))
    both = both.with_columns(total=pl.col("accepted") + pl.col("rejected"))
    ordered = both.sort(pl.col("rejected") / pl.col("total"), descending=True).head(SHOWN)
    rows: list[Mapping[str, Any]] = ordered.select("table", "site", "rejected", "total").to_dicts()
    return rows
