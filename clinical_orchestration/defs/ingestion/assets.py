"""Kafka topics, raw tables, and silver with its quarantine."""

from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import dagster as dg

from clinical_orchestration.defs.common import asset_key, markdown_table, spec, step
from clinical_orchestration.defs.results import materialized
from clinical_orchestration.resources import KafkaResource, PipelineResource, profiles
from clinical_orchestration.stores.spark import SparkTables
from clinical_orchestration.stores.tables import TableStore
from clinical_orchestration.tables import DOMAINS, DUPLICATES, QUARANTINE, bronze, silver

TOPICS = "kafka/topics"
SDTM_DOMAINS = {
    "patient_vitals": "VS", "lab_results": "LB", "medications": "CM, EX", "adverse_events": "AE", "subjects": "DM",
}  # fmt: skip
NOT_INSTALLED = "Kafka is not installed here: records come from files only"


def accounted(domain: str) -> dg.AssetCheckSpec:
    """Return the check that every raw record of a domain is accounted for exactly once."""
    return dg.AssetCheckSpec(
        "every_record_accounted_for_once",
        asset=asset_key(silver(domain)),
        blocking=True,
        description="Each bronze source_position is accepted, a duplicate, or quarantined: exactly one of the three.",
    )


@step(
    specs=[
        spec(
            TOPICS,
            "The clinical topics: partitions, offsets, lag behind the raw tables, age and validity of the newest "
            "messages.",
            group="ingestion",
            kinds={"kafka"},
        )
    ],
    pool="kafka_operations",
)
def monitor_kafka_topics(
    context: dg.AssetExecutionContext,
    pipeline: PipelineResource,
    tables: dg.ResourceParam[TableStore],
    kafka: KafkaResource,
) -> dg.MaterializeResult[Any]:
    """Look at every topic, ingest nothing."""
    from clinical_orchestration.ingestion.kafka import monitor_topics

    trial = pipeline.profile().name
    if not kafka.available():
        context.log.warning(NOT_INSTALLED)
        return materialized(asset_key(TOPICS), trial, {"installed": False}, {"note": NOT_INSTALLED})
    reader = kafka.reader()
    try:
        report = monitor_topics(tables, reader, pipeline.variables().topics())
    finally:
        reader.close()
    return materialized(
        asset_key(TOPICS),
        trial,
        {"installed": True, "lag": report.lag, "topics": report.as_metadata()},
        {"lag": report.lag, "topics": dg.MetadataValue.md(report.as_markdown())},
    )


@step(
    specs=[
        spec(
            bronze(domain),
            f"Raw {domain.replace('_', ' ')} as received from Kafka and SDTM files ({SDTM_DOMAINS[domain]}), "
            "append-only, each record once by its source position.",
            group="ingestion",
            kinds={"deltalake", "kafka"},
            tags={"sdtm_domain": SDTM_DOMAINS[domain].replace(", ", "_")},
        )
        for domain in DOMAINS
    ],
    pool="data_validation",
)
def validate_clinical_data(
    context: dg.AssetExecutionContext,
    pipeline: PipelineResource,
    tables: dg.ResourceParam[TableStore],
    kafka: KafkaResource,
) -> Iterator[dg.MaterializeResult[Any]]:
    """Append what is new in files and topics to the raw tables; offsets are committed with the rows."""
    from clinical_orchestration.ingestion.kafka import OffsetsLostError
    from clinical_orchestration.ingestion.sources import ingest_sources
    from clinical_orchestration.stores.sdtm_files import SdtmFileError

    profile = pipeline.profile()
    now = datetime.now(UTC)
    topics = pipeline.variables().topics()
    try:
        report = ingest_sources(
            tables, kafka, profile, pipeline.source_folder(), topics, now, pipeline.scratch(), context.log.info,
            accept_loss=pipeline.flag("accept_loss"),
        )  # fmt: skip
    except (SdtmFileError, OffsetsLostError) as error:
        raise dg.Failure(str(error), allow_retries=False) from error
    for note in report.notes:
        context.log.warning(note)
    if not report.appended:
        context.log.info("No new records: the raw tables stay as they are.")
    for domain in DOMAINS:
        name = bronze(domain)
        counts = report.counts(domain)
        yield materialized(
            asset_key(name),
            profile.name,
            {**counts, "version": tables.version(name)},
            {
                "dagster/row_count": tables.row_count(name),
                **counts,
                "delta_version": tables.version(name) or 0,
                "uri": tables.uri(name),
                "sources": markdown_table(["source", "rows", "new", "known already"], report.sources(domain)),
                **({} if counts["appended"] else {"note": "no new records"}),
            },
        )


@step(
    specs=[
        *(
            spec(
                silver(domain),
                f"Valid, typed, unique {domain.replace('_', ' ')} in standard units and UTC.",
                group="lakehouse",
                kinds={"spark", "deltalake"},
                deps=[bronze(domain), TOPICS],
                tags={"sdtm_domain": SDTM_DOMAINS[domain].replace(", ", "_")},
            )
            for domain in DOMAINS
        ),
        spec(
            QUARANTINE,
            "Every rejected record with all its reasons.",
            group="lakehouse",
            kinds={"spark", "deltalake"},
            deps=[bronze(domain) for domain in DOMAINS],
        ),
        spec(
            DUPLICATES,
            "Every record that says again what an accepted one said, with the position of that one.",
            group="lakehouse",
            kinds={"spark", "deltalake"},
            deps=[bronze(domain) for domain in DOMAINS],
        ),
    ],
    check_specs=[accounted(domain) for domain in DOMAINS],
    pool="spark_jobs",
)
def spark_data_processing(
    context: dg.AssetExecutionContext,
    pipeline: PipelineResource,
    tables: dg.ResourceParam[TableStore],
    spark: dg.ResourceParam[SparkTables],
) -> Iterator[dg.MaterializeResult[Any]]:
    """Decode, validate and deduplicate what is new in bronze; account for every record."""
    from clinical_orchestration.ingestion.accounting import account_for
    from clinical_orchestration.ingestion.silver import refine
    from clinical_orchestration.stores.locks import REFINE, exclusive

    trial = pipeline.profile().name
    # the streaming job refines too, where it runs: one at a time
    with exclusive(REFINE, tables.uri(QUARANTINE), wait=1800):
        report = refine(spark, tables, profiles(), now=datetime.now(UTC))
        if not report.no_new_data:
            _keep_in_shape(context, tables)
        accounts = account_for(tables)
    context.log.info(
        "No new data since the last run."
        if report.no_new_data
        else f"{report.total('received')} records: {report.total('accepted')} accepted, "
        f"{report.total('duplicates')} duplicates, {report.total('quarantined')} quarantined."
    )
    for domain in DOMAINS:
        done, account = report.domains[domain], accounts[domain]
        yield materialized(
            asset_key(silver(domain)),
            trial,
            {
                "received": done.received, "accepted": done.accepted, "duplicates": done.duplicates,
                "quarantined": done.quarantined, "rows": done.rows, "no_new_data": done.no_new_data,
            },
            {
                "dagster/row_count": tables.row_count(silver(domain)),
                "records_received": done.received,
                "records_accepted": done.accepted,
                "records_duplicate": done.duplicates,
                "records_quarantined": done.quarantined,
                "rows_written": done.rows,
                "seconds": done.seconds,
                "delta_version": tables.version(silver(domain)) or 0,
                "uri": tables.uri(silver(domain)),
                "account": markdown_table(
                    ["raw records", "accepted", "duplicates", "quarantined"],
                    [(account.bronze, account.accepted, account.duplicates, account.quarantined)],
                ),
                "reasons": markdown_table(["rule", "records"], sorted(done.reasons.items(), key=lambda item: -item[1])),
                **({"note": "no new data"} if done.no_new_data else {}),
            },
            [
                dg.AssetCheckResult(
                    check_name=accounted(domain).name,
                    asset_key=asset_key(silver(domain)),
                    passed=account.balanced,
                    metadata=account.metadata(),
                )
            ],
        )  # fmt: skip
    for name, count in ((QUARANTINE, report.total("quarantined")), (DUPLICATES, report.total("duplicates"))):
        yield materialized(
            asset_key(name),
            trial,
            {"new": count},
            {
                "dagster/row_count": tables.row_count(name),
                "new": count,
                "delta_version": tables.version(name) or 0,
                "uri": tables.uri(name),
                **(
                    {"reasons": markdown_table(["rule", "records"], report.reasons().items())}
                    if name == QUARANTINE
                    else {}
                ),
            },
        )


def _keep_in_shape(context: dg.AssetExecutionContext, tables: TableStore) -> None:
    """Merge the small files that many small runs leave; runs of this pipeline never overlap, so nobody else writes."""
    names = [*(bronze(domain) for domain in DOMAINS), *(silver(domain) for domain in DOMAINS), QUARANTINE, DUPLICATES]
    for name in names:
        done = tables.maintain(name)
        if done.files_after < done.files_before:
            context.log.info("%s: %d files merged into %d", name, done.files_before, done.files_after)
