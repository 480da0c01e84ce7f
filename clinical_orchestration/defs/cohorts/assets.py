"""Cohort tables from criteria: shipped ones, a file, or criteria given with the run."""

import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import dagster as dg
from pydantic import Field

from clinical_orchestration.defs.common import asset_key, markdown_table, spec, step
from clinical_orchestration.defs.results import materialized
from clinical_orchestration.resources import PipelineResource
from clinical_orchestration.stores.objects import Objects
from clinical_orchestration.stores.tables import TableStore
from clinical_orchestration.tables import COHORT_ATTRITION, COHORT_DEFINITIONS, COHORT_MEMBERS, silver

if TYPE_CHECKING:
    from clinical_orchestration.cohorts.criteria import CohortDefinition
    from clinical_orchestration.stores.cohorts import CohortReport

GROUP = "cohorts"
DOMAINS = ("subjects", "patient_vitals", "lab_results", "medications", "adverse_events")
ADDS_UP = dg.AssetCheckSpec(
    "attrition_adds_up",
    asset=asset_key(COHORT_ATTRITION),
    description="Each step of the flow keeps or removes everybody who entered it, and the last one has the members.",
)


class CohortConfig(dg.Config):
    """Which criteria to apply."""

    criteria: list[str] = Field(
        default_factory=list,
        description="Names of criteria that ship with the package, or paths of YAML files; "
        "empty: those that ship for the trial.",
    )
    definition: dict[str, Any] | None = Field(
        default=None, description="Criteria given here, as in a YAML file; instead of `criteria`."
    )

    def definitions(self, trial: str) -> "list[CohortDefinition]":
        """Return the definitions to build.

        Raises:
            dagster.Failure: one of them cannot be read, or there are none.
        """
        from clinical_orchestration.cohorts.criteria import CriteriaError, available_definitions, load_definition

        try:
            if self.definition is not None:
                return [load_definition(self.definition)]
            found = [load_definition(name) for name in self.criteria or available_definitions(trial)]
        except CriteriaError as error:
            raise dg.Failure(str(error), allow_retries=False) from error
        if not found:
            raise dg.Failure(
                f"no criteria ship for the trial {trial}; give `criteria` a YAML file or `definition` the criteria",
                allow_retries=False,
            )
        return found


@step(
    specs=[
        spec(
            COHORT_MEMBERS,
            "Everybody who was screened for each cohort, whether they belong to it, and the reason for each criterion: "
            "by which value of which time it is met or not, or what is missing.",
            group=GROUP,
            kinds={"deltalake", "polars"},
            deps=[silver(domain) for domain in DOMAINS],
        ),
        spec(
            COHORT_ATTRITION,
            "How many patients each criterion of a cohort took out, in the order of the criteria (a CONSORT flow).",
            group=GROUP,
            kinds={"deltalake", "polars", "minio"},
            deps=[silver(domain) for domain in DOMAINS],
        ),
        spec(
            COHORT_DEFINITIONS,
            "The criteria of each cohort, their hash, and the versions of the tables that it follows from.",
            group=GROUP,
            kinds={"deltalake"},
            deps=[silver(domain) for domain in DOMAINS],
        ),
    ],
    check_specs=[ADDS_UP],
    pool="feature_engineering",
)
def build_cohorts(
    context: dg.AssetExecutionContext,
    config: CohortConfig,
    pipeline: PipelineResource,
    tables: dg.ResourceParam[TableStore],
    objects: dg.ResourceParam[Objects],
) -> Iterator[dg.MaterializeResult[Any]]:
    """Build each cohort over its build before."""
    from clinical_orchestration.cohorts.plots import attrition_plot
    from clinical_orchestration.stores.cohorts import build_cohort

    trial = pipeline.profile().name
    reports: list[CohortReport] = []
    plots: dict[str, str] = {}
    for definition in config.definitions(trial):
        try:
            report, _ = build_cohort(tables, definition, trial)
        except ValueError as error:
            raise dg.Failure(str(error), allow_retries=False) from error
        reports.append(report)
        plots[report.cohort] = objects.put(
            f"reports/cohorts/{trial}/{report.cohort}-{report.definition_hash}.png",
            attrition_plot(report.attrition, report.title),
            "image/png",
        )
        context.log.info("cohort %s: %d of %d patients", report.cohort, report.members, report.screened)
    counts = [(item.cohort, item.screened, item.members, item.definition_hash) for item in reports]
    yield materialized(
        asset_key(COHORT_MEMBERS),
        trial,
        {"cohorts": {item.cohort: item.members for item in reports}},
        {
            "dagster/row_count": sum(item.screened for item in reports),
            "uri": tables.uri(COHORT_MEMBERS),
            "delta_version": tables.version(COHORT_MEMBERS),
            "cohorts": markdown_table(["cohort", "screened", "members", "definition"], counts),
            "statuses": markdown_table(
                ["cohort", "eligible", "ineligible", "undetermined", "no index"],
                [(item.cohort, *item.statuses.values()) for item in reports],
            ),
        },
    )
    broken = [item.cohort for item in reports if not _adds_up(tables, item.cohort, trial)]
    yield materialized(
        asset_key(COHORT_ATTRITION),
        trial,
        {"plots": plots},
        {
            "dagster/row_count": sum(len(item.attrition) for item in reports),
            "uri": tables.uri(COHORT_ATTRITION),
            "delta_version": tables.version(COHORT_ATTRITION),
            **{f"flow of {item.cohort}": _flow(item) for item in reports},
            **{f"plot of {name}": dg.MetadataValue.path(uri) for name, uri in plots.items()},
        },
        [dg.AssetCheckResult(check_name=ADDS_UP.name, passed=not broken, metadata={"broken": ", ".join(broken)})],
    )
    yield materialized(
        asset_key(COHORT_DEFINITIONS),
        trial,
        {"definitions": {item.cohort: item.definition_hash for item in reports}},
        {
            "dagster/row_count": len(reports),
            "uri": tables.uri(COHORT_DEFINITIONS),
            "delta_version": tables.version(COHORT_DEFINITIONS),
            "silver_versions": dict(reports[0].silver_versions),
        },
    )


def _flow(report: "CohortReport") -> dg.MetadataValue:
    return markdown_table(
        ["step", "criterion", "entered", "removed", "unknown", "remaining"],
        [
            (step.criterion, step.description, step.entered, step.removed, step.removed_unknown, step.remaining)
            for step in report.attrition
        ],
    )


def _adds_up(tables: TableStore, cohort: str, trial: str) -> bool:
    """Return whether what is stored agrees with itself: each step, from step to step, and with the members' rows."""
    from clinical_orchestration.stores.cohorts import CohortIncompleteError, read_cohort

    try:
        report, rows = read_cohort(tables, cohort, trial)
    except CohortIncompleteError:  # somebody else builds it at this moment
        return False
    steps = report.attrition
    inside = all(step.entered == step.removed + step.removed_unknown + step.remaining for step in steps)
    joined = all(after.entered == before.remaining for before, after in itertools.pairwise(steps))
    return inside and joined and steps[0].entered == rows.height and steps[-1].remaining == rows["member"].sum()
