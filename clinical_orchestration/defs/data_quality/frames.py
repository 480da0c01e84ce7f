"""The tables of one trial as polars frames, with the columns that a check needs."""

from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any

from clinical_orchestration.stores.tables import TableStore
from clinical_orchestration.tables import DOMAINS, QUARANTINE, bronze, silver
from clinical_orchestration.trials import TrialProfile

if TYPE_CHECKING:
    import polars as pl

MEASURED = ("patient_vitals", "lab_results")
"""Tables of measurements: they have tests, and a rhythm at each site."""

VERSION_WINDOW = timedelta(days=30)
"""Messages ingested in this time show the contract versions that are in use."""


class TrialFrames:
    """Reads the tables of one trial; rows of other trials share them."""

    def __init__(self, tables: TableStore, profile: TrialProfile) -> None:
        self._tables = tables
        self._profile = profile

    def read(self, name: str, columns: Sequence[str] | None = None, *filters: tuple[str, str, Any]) -> "pl.DataFrame":
        """Return the trial's rows of a table; no rows where it is absent."""
        import polars as pl

        chosen = [("trial", "=", self._profile.name), *filters]
        return pl.DataFrame(pl.from_arrow(self._tables.read(name, columns=columns, filters=chosen)))

    def silver(self, domain: str, *columns: str) -> "pl.DataFrame":
        """Return the trial's rows of a silver table; all columns where none are named."""
        return self.read(silver(domain), list(columns) or None)

    def sites(self) -> "pl.DataFrame":
        """Return ``patient_id, site`` of the subjects."""
        return self.silver("subjects", "patient_id", "site").unique("patient_id")

    def at_sites(self, domain: str, sites: "pl.DataFrame", *columns: str) -> "pl.DataFrame":
        """Return the rows of a silver table with the `site` of their subject."""
        return self.silver(domain, *columns).join(sites, on="patient_id", how="left")

    def rejections(self, sites: "pl.DataFrame") -> "pl.DataFrame":
        """Return the quarantined records by reason, see :func:`..quality.quarantine.rejections`."""
        from clinical_orchestration.quality.quarantine import rejections

        rows = self.read(QUARANTINE, ["table", "source_position", "reasons", "payload"])
        return rejections(rows, sites)

    def acceptance(self, domain: str, accepted: int, rejected: "pl.DataFrame") -> float:
        """Return the share of the received records of a domain that were not quarantined."""
        import polars as pl

        count = rejected.filter(pl.col("table") == domain).height
        return accepted / (accepted + count) if accepted + count else 1.0

    def versions(self, domain: str, now: datetime) -> dict[str | None, int]:
        """Return the contract version that recent messages say -> their number; None for those that say none."""
        import polars as pl

        rows = self.read(
            bronze(domain),
            ["payload"],
            ("record_format", "=", "message"),
            ("payload_encoding", "=", "utf-8"),
            ("ingested_at", ">=", now - VERSION_WINDOW),
        )
        # a pattern, because a quarter of a percent of the payloads is no JSON, and the path would be null for a number
        version = pl.col("payload").str.extract(r'"schema_version"\s*:\s*"?([^",}\s]+)')
        counts = rows.select(version.alias("version")).group_by("version").len()
        return {name: int(count) for name, count in counts.iter_rows()}

    def sdtm_rows(self) -> "dict[str, pl.DataFrame]":
        """Return the SDTM rows as submitted, by domain; none for a trial of messages only."""
        from clinical_orchestration.quality import sdtm
        from clinical_orchestration.transforms.sdtm import DOMAIN_TABLES

        rows = {}
        for domain in sdtm.DOMAINS:
            found = self.read(
                bronze(DOMAIN_TABLES[domain]),
                ["source_position", "payload"],
                ("record_format", "=", f"sdtm:{domain}"),
                ("payload_encoding", "=", "utf-8"),
            )
            if found.height:
                rows[domain] = sdtm.parse_rows(domain, found)
        return rows

    def arrivals(self, sites: "pl.DataFrame", rejected: "pl.DataFrame") -> "pl.DataFrame":
        """Return ``table, patient_id, site, test_code, lab_id, time`` of everything that arrived.

        Quarantined records count: their source sends. The time is that of the event where the trial's clock is its
        data, and of the arrival where it is the wall clock; what has no rhythm of its own counts when it was known.
        """
        import polars as pl

        measured_at = "event_time" if self._profile.clock == "data" else "received_at"
        parts = []
        for domain in DOMAINS:
            if domain == "subjects":
                continue
            names = [name for name in ("test_code", "lab_id") if name in _columns(domain)]
            time = measured_at if domain in MEASURED else "received_at"
            rows = self.at_sites(domain, sites, "patient_id", time, *names)
            parts.append(
                rows.select(
                    pl.lit(domain).alias("table"),
                    "patient_id",
                    "site",
                    *(pl.col(name) if name in names else pl.lit(None, pl.String).alias(name)
                      for name in ("test_code", "lab_id")),
                    pl.col(time).alias("time"),
                )
            )  # fmt: skip
        refused = rejected.filter(pl.col("table").is_in(MEASURED)).unique(["table", "source_position"])
        parts.append(
            refused.explode("tests").select(
                "table",
                "patient_id",
                "site",
                pl.col("tests").alias("test_code"),
                "lab_id",
                pl.col("event_time").alias("time"),
            )
        )
        return pl.concat(parts)


def _columns(domain: str) -> dict[str, str]:
    from clinical_orchestration.tables import SILVER_COLUMNS

    return SILVER_COLUMNS[domain]
