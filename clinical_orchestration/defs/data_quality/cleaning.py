"""Corrections: always proposed, applied only where asked for and safe, and taken back on request."""

from collections import Counter
from collections.abc import Iterator
from contextlib import nullcontext
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import dagster as dg

from clinical_orchestration.defs.common import asset_key, markdown_table, spec, step
from clinical_orchestration.defs.data_quality.frames import MEASURED, TrialFrames
from clinical_orchestration.defs.data_quality.keys import CLEANING, GROUP, REPORT
from clinical_orchestration.defs.results import materialized
from clinical_orchestration.resources import PipelineResource
from clinical_orchestration.stores.tables import TableStore
from clinical_orchestration.tables import QUARANTINE

if TYPE_CHECKING:
    from clinical_orchestration.quality.accounting import AccountingReport
    from clinical_orchestration.quality.cleaning import Proposal

ACCOUNTED = dg.AssetCheckSpec(
    "every_record_accounted_for_once",
    asset=asset_key(CLEANING),
    description="After cleaning, each bronze source_position is accepted, a duplicate, or quarantined: exactly one.",
)
LOCK_WAIT = 300.0
"""Seconds to wait for whoever refines silver (the data pipeline, the streaming job): it writes the same tables."""


@step(
    specs=[
        spec(
            CLEANING,
            "What was proposed, applied and reverted, record by record with old and new value and the rule. Applied is "
            "what is safe, when data_cleaning_enabled or the run's conf says so.",
            group=GROUP,
            kinds={"deltalake", "polars"},
            deps=[REPORT],
        )
    ],
    check_specs=[ACCOUNTED],
    pool="data_validation",
)
def trigger_data_cleaning(
    context: dg.AssetExecutionContext, pipeline: PipelineResource, tables: dg.ResourceParam[TableStore]
) -> Iterator[dg.MaterializeResult[Any]]:
    """Propose corrections, apply the safe ones where asked, or revert a batch."""
    from clinical_orchestration.ingestion.accounting import account_for
    from clinical_orchestration.ingestion.cleaning import (
        CleaningReport,
        UnknownBatchError,
        applied_batches,
        apply_safe,
        log_proposals,
        revert,
    )
    from clinical_orchestration.quality.cleaning import RULES
    from clinical_orchestration.stores.locks import REFINE, LockedError, exclusive

    profile = pipeline.profile()
    now, run_id = datetime.now(UTC), context.run.run_id
    wanted = pipeline.flag("apply_cleaning") or pipeline.variables().data_cleaning_enabled
    batch = pipeline.conf.get("revert")
    reverted, note, report = 0, "", CleaningReport()
    frames = TrialFrames(tables, profile)
    accounts: dict[str, AccountingReport] = {}
    writing = exclusive(REFINE, tables.uri(QUARANTINE), wait=LOCK_WAIT) if wanted or batch else nullcontext()
    try:
        with writing:
            if batch:
                reverted = revert(tables, profile.name, str(batch), now=now, run_id=run_id)
            proposals = _proposals(frames)
            fresh, still_open = log_proposals(tables, profile.name, proposals, now=now, run_id=run_id)
            if wanted:
                report = apply_safe(tables, profile, still_open, now=now, run_id=run_id)
            if wanted or batch:  # without the lock a record on its way to silver would look lost
                accounts = account_for(tables)
    except UnknownBatchError as error:
        raise dg.Failure(str(error), allow_retries=False) from error
    except LockedError as error:
        if batch:
            raise dg.Failure(
                f"batch {batch} was not reverted, because other work is writing silver ({error}); start this run "
                "again when that has ended",
                allow_retries=False,
            ) from error
        note = f"nothing was applied, because other work is writing silver ({error}); the next run tries again"
        context.log.warning(note)
        fresh, still_open = log_proposals(tables, profile.name, _proposals(frames), now=now, run_id=run_id)
    if not wanted and any(item.safe for item in still_open):
        note = 'safe corrections are not applied: set data_cleaning_enabled, or run with {"apply_cleaning": true}'
    counted = Counter((item.rule, item.safe) for item in still_open)
    batches = applied_batches(tables, profile.name)
    yield materialized(
        asset_key(CLEANING),
        profile.name,
        {
            "new_proposals": fresh,
            "open": len(still_open) - sum(report.applied.values()),
            "safe": sum(item.safe for item in still_open),
            "applied": report.applied,
            "batches": report.batches,
            "finished": report.finished,
            "kept": report.kept,
            "reverted": reverted,
            "enabled": wanted,
        },
        {
            "proposals": markdown_table(
                ["rule", "what it does", "safe", "records"],
                [(rule, RULES[rule][0], safe, count) for (rule, safe), count in sorted(counted.items())],
            ),
            "applied": sum(report.applied.values()),
            "reverted": reverted,
            "uri": tables.uri(CLEANING),
            "batches": markdown_table(
                ["batch", "rules", "records", "applied at", "reverted"],
                [(item["batch_id"], item["rule"], item["records"], item["applied_at"].isoformat(), item["reverted"])
                 for item in batches[:20]],
            ),
            **({"note": note} if note else {}),
        },
        [
            dg.AssetCheckResult(
                check_name=ACCOUNTED.name,
                passed=all(account.balanced for account in accounts.values()),
                severity=dg.AssetCheckSeverity.ERROR,
                metadata={
                    "note": "after cleaning" if accounts else "nothing was written, nothing to account for",
                    "accounts": markdown_table(
                        ["table", "raw records", "accepted", "duplicates", "quarantined", "balanced"],
                        [(name, item.bronze, item.accepted, item.duplicates, item.quarantined, item.balanced)
                         for name, item in accounts.items()],
                    )
                },
            )
        ],
    )  # fmt: skip


def _proposals(frames: TrialFrames) -> "list[Proposal]":
    import polars as pl

    from clinical_orchestration.quality import cleaning
    from clinical_orchestration.quality.anomalies import prepared

    sites = frames.sites()
    vitals = frames.at_sites(
        "patient_vitals", sites, "patient_id", "event_time", "time_point", "test_code", "value", "source_position"
    )
    labs = frames.at_sites(
        "lab_results", sites, "patient_id", "event_time", "test_code", "value", "unit", "source_position"
    )
    drugs = frames.silver("medications", "dose_unit", "source_position")
    rejected = frames.rejections(sites)
    quarantine = frames.read(QUARANTINE, ["source_position", "reasons"], ("table", "=", "patient_vitals"))
    who = rejected.select("source_position", "patient_id", "site").unique("source_position")
    temperatures = vitals.filter(pl.col("test_code") == "TEMP").select("patient_id", "site", "value")
    found = cleaning.fahrenheit_proposals(quarantine.join(who, on="source_position", how="left"), temperatures)
    found += cleaning.spelling_proposals("lab_results", "unit", labs, by="test_code")
    found += cleaning.spelling_proposals("medications", "dose_unit", drugs)
    found += cleaning.swapped_pressures(vitals)
    for domain, rows in zip(MEASURED, (vitals, labs), strict=True):
        found += cleaning.decimal_slips(domain, prepared(rows))
    return found
