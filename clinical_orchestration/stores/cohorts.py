"""Cohorts as tables: built from a trial's silver tables, with everybody's reasons and the attrition counts.

``gold/cohort_members``, ``gold/cohort_attrition`` and ``gold/cohort_definitions`` hold the newest build of each cohort
of each trial. A build reads every silver table at one version and says which, so that the same definition on the same
versions gives the same cohort; Delta keeps the builds before.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from clinical_orchestration.cohorts.cohort import COLUMNS, RECORDS, AttritionStep, Cohort, assemble_from_frames
from clinical_orchestration.cohorts.criteria import CohortDefinition
from clinical_orchestration.tables import (
    COHORT_ATTRITION,
    COHORT_ATTRITION_COLUMNS,
    COHORT_DEFINITIONS,
    COHORT_DEFINITIONS_COLUMNS,
    COHORT_MEMBERS,
    COHORT_MEMBERS_COLUMNS,
    arrow_schema,
    silver,
)

if TYPE_CHECKING:
    import polars as pl

    from clinical_orchestration.stores.tables import TableStore


class CohortNotFoundError(LookupError):
    """No such cohort was built; the message lists those there are."""


class CohortIncompleteError(RuntimeError):
    """A build of the cohort was interrupted between its tables: build it again."""


@dataclass(frozen=True)
class CohortReport:
    """One build of a cohort.

    Attributes:
        definition_hash: :meth:`clinical_orchestration.cohorts.criteria.CohortDefinition.hash`.
        screened, members: patients.
        statuses: patients by status over all criteria, see ``PatientMatch.status``.
        attrition: the flow, a step a criterion.
        silver_versions: Delta version of each silver table that was read.
        built_at: when (UTC).
    """

    cohort: str
    trial: str
    title: str
    definition_hash: str
    screened: int
    members: int
    statuses: Mapping[str, int]
    attrition: tuple[AttritionStep, ...]
    silver_versions: Mapping[str, int]
    built_at: datetime

    def as_dict(self) -> dict[str, Any]:
        """Return it as JSON-ready values, without patients."""
        return {
            **asdict(self),
            "attrition": [asdict(step) for step in self.attrition],
            "statuses": dict(self.statuses),
            "silver_versions": dict(self.silver_versions),
            "built_at": self.built_at.isoformat(),
        }


def match_trial(
    tables: TableStore, definition: CohortDefinition, trial: str, *, versions: Mapping[str, int] | None = None
) -> Cohort:
    """Match every patient of a trial, and write nothing.

    Args:
        tables: the lakehouse.
        definition: the criteria.
        trial: name of the trial profile.
        versions: silver table -> version to read; default: the newest.
    """
    import polars as pl

    wanted = versions or _versions(tables)
    frames = {
        domain: pl.DataFrame(
            pl.from_arrow(
                tables.read(
                    silver(domain),
                    columns=COLUMNS[domain],
                    filters=[("trial", "=", trial)],
                    version=wanted.get(silver(domain)),
                )
            )
        )
        for domain in RECORDS
    }
    return assemble_from_frames(definition, frames)


def build_cohort(
    tables: TableStore, definition: CohortDefinition, trial: str, *, now: datetime | None = None
) -> tuple[CohortReport, Cohort]:
    """Build a cohort from the newest silver tables and store it over its build before; return counts and patients.

    Raises:
        ValueError: the definition is meant for another trial.
    """
    import pyarrow as pa

    if definition.trial not in (None, trial):
        raise ValueError(f"the criteria {definition.name} are meant for the trial {definition.trial}, not for {trial}")
    versions = _versions(tables)
    cohort = match_trial(tables, definition, trial, versions=versions)
    report = CohortReport(
        cohort=definition.name,
        trial=trial,
        title=definition.title or definition.name,
        definition_hash=definition.hash(),
        screened=len(cohort.screened),
        members=len(cohort.members),
        statuses=cohort.statuses(),
        attrition=cohort.attrition,
        silver_versions=versions,
        built_at=now or datetime.now(UTC),
    )
    common = {
        "cohort": report.cohort,
        "trial": trial,
        "definition_hash": report.definition_hash,
        "built_at": report.built_at,
    }
    members = [
        {
            **common,
            "patient_id": item.match.patient_id,
            "index_time": item.match.index_time,
            "status": item.match.status,
            "member": item.member,
            "removed_by": item.removed_by,
            "reasons": [result.text() for result in item.match.results],
        }
        for item in cohort.screened
    ]
    steps = [{**common, **asdict(step), "step": number} for number, step in enumerate(report.attrition)]
    definitions = [
        {
            **common,
            "title": report.title,
            "definition": definition.model_dump_json(),
            "silver_versions": json.dumps(versions, sort_keys=True),
            "screened": report.screened,
            "members": report.members,
        }
    ]
    # the definition comes last: a reader that finds it finds the others of the same build
    for name, columns, rows in (
        (COHORT_MEMBERS, COHORT_MEMBERS_COLUMNS, members),
        (COHORT_ATTRITION, COHORT_ATTRITION_COLUMNS, steps),
        (COHORT_DEFINITIONS, COHORT_DEFINITIONS_COLUMNS, definitions),
    ):
        tables.ensure(name)
        tables.replace(name, pa.Table.from_pylist(rows, arrow_schema(columns)), predicate=_predicate(trial, report))
    return report, cohort


def list_cohorts(tables: TableStore, trial: str | None = None) -> pl.DataFrame:
    """Return one row a stored cohort (columns of ``tables.COHORT_DEFINITIONS_COLUMNS``), by name and trial."""
    import polars as pl

    filters = None if trial is None else [("trial", "=", trial)]
    return pl.DataFrame(pl.from_arrow(tables.read(COHORT_DEFINITIONS, filters=filters))).sort("cohort", "trial")


def read_cohort(tables: TableStore, name: str, trial: str) -> tuple[CohortReport, pl.DataFrame]:
    """Return the newest build of a cohort: its report, and one row a screened patient sorted by patient.

    Raises:
        CohortNotFoundError: it was never built.
        CohortIncompleteError: its last build was interrupted.
    """
    import polars as pl

    mine = [("cohort", "=", name), ("trial", "=", trial)]
    found = tables.read(COHORT_DEFINITIONS, filters=mine).to_pylist()
    if not found:
        known = ", ".join(list_cohorts(tables, trial)["cohort"].to_list())
        raise CohortNotFoundError(
            f"no cohort {name!r} was built for the trial {trial}; "
            + (f"there are: {known}" if known else "build it first: clinical cohort build")
        )
    built = found[0]
    members = pl.DataFrame(pl.from_arrow(tables.read(COHORT_MEMBERS, filters=mine))).sort("patient_id")
    steps = sorted(tables.read(COHORT_ATTRITION, filters=mine).to_pylist(), key=lambda row: int(row["step"]))
    times = {built["built_at"], *members["built_at"].unique().to_list(), *(step["built_at"] for step in steps)}
    if len(times) > 1:
        raise CohortIncompleteError(f"the last build of the cohort {name} was interrupted; build it again")
    counted = dict(members.group_by("status").len().iter_rows())
    report = CohortReport(
        cohort=name,
        trial=trial,
        title=built["title"],
        definition_hash=built["definition_hash"],
        screened=built["screened"],
        members=built["members"],
        statuses={status: counted.get(status, 0) for status in ("eligible", "ineligible", "undetermined", "no index")},
        attrition=tuple(
            AttritionStep(**{column: step[column] for column in AttritionStep.__dataclass_fields__}) for step in steps
        ),
        silver_versions=json.loads(built["silver_versions"]),
        built_at=built["built_at"].astimezone(UTC),
    )
    return report, members


def _versions(tables: TableStore) -> dict[str, int]:
    found = {silver(domain): tables.version(silver(domain)) for domain in RECORDS}
    return {name: version for name, version in found.items() if version is not None}


def _predicate(trial: str, report: CohortReport) -> str:
    quoted = trial.replace("'", "''")
    return f"cohort = '{report.cohort}' AND trial = '{quoted}'"
