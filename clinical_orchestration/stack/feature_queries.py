"""What the feature store holds, for the command line: offline rows, online rows, how both compare, how fresh they are.

Every function asks the running stores and returns what ``--json`` prints. The environment must name the stack
(:meth:`clinical_orchestration.stack.settings.StackSettings.environment`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    import polars as pl

    from clinical_orchestration.stores.online import OnlineFeatures, RedisOnlineStore
    from clinical_orchestration.stores.tables import DeltaTableStore
    from clinical_orchestration.trials import TrialProfile

SHOWN_PATIENTS = 10
SHOWN_DAYS = 14


@dataclass(frozen=True)
class Stores:
    """The stores of one trial."""

    profile: TrialProfile
    tables: DeltaTableStore
    online: RedisOnlineStore

    @classmethod
    def open(cls, trial: str) -> Stores:
        """Return the stores that the environment names.

        Raises:
            ValueError: there is no such trial.
        """
        from clinical_orchestration.settings import ClientSettings, Variables
        from clinical_orchestration.stores.online import RedisOnlineStore
        from clinical_orchestration.stores.tables import DeltaTableStore
        from clinical_orchestration.trials import load_trial

        settings = ClientSettings()
        return cls(
            load_trial(trial),
            DeltaTableStore.from_settings(settings),
            RedisOnlineStore(settings.redis_url.get_secret_value(), Variables().feature_store_redis_prefix, retries=0),
        )

    def keys(self) -> pl.DataFrame:
        """Return patient, time and day of the trial's rows."""
        from clinical_orchestration.stores.feature_store import read_rows

        return read_rows(self.tables, self.profile, ["patient_id", "feature_time", "feature_date"])

    def newest(self) -> list[OnlineFeatures]:
        """Return the newest offline row of each patient."""
        from clinical_orchestration.stores.feature_store import OfflineStore

        return OfflineStore(cast(Any, None), self.tables).newest(self.profile)


def compare_stores(stores: Stores, day: date | None = None) -> dict[str, Any]:
    """Compare the newest offline row of each patient (with `day`: of those whose newest row is of it) with Redis.

    Returns:
        ``checked``, ``equal``, ``missing``, ``newer`` (online is ahead), ``differing``, ``consistent``, and for rows
        of the same time which features differ: ``features`` (name -> patients).
    """
    from clinical_orchestration.stores.feature_store import compare

    rows = [row for row in stores.newest() if day is None or row.feature_time.date() == day]
    found = compare(rows, stores.online)
    online = stores.online.get_many([row.patient_id for row in rows])
    features: dict[str, int] = {}
    for row in rows:
        other = online.get(row.patient_id)
        if other is None or other.feature_time != row.feature_time:
            continue
        for name in {*row.features, *other.features}:
            if row.features.get(name) != other.features.get(name):
                features[name] = features.get(name, 0) + 1
    return {
        "trial": stores.profile.name,
        "date": None if day is None else day.isoformat(),
        "checked": found.checked,
        "equal": found.equal,
        "missing": found.missing,
        "newer": found.newer,
        "differing": found.differing,
        "consistent": found.consistent,
        "features": dict(sorted(features.items(), key=lambda item: (-item[1], item[0]))),
    }


def query_offline(stores: Stores, day: date | None = None) -> dict[str, Any]:
    """Return the rows of one day (default: the newest that has any): counts, rows, and each feature's figures.

    Returns:
        ``date``, ``rows``, ``patients``, ``features`` (name -> ``values``, ``mean``, ``min``, ``max``) and ``records``
        (one object a row, with its features).
    """
    from clinical_orchestration.features.definitions import feature_names
    from clinical_orchestration.stores.feature_store import read_features

    if day is None:
        newest = stores.keys()["feature_date"].max()
        day = newest if isinstance(newest, date) else None
    if day is None:
        return {"trial": stores.profile.name, "date": None, "rows": 0, "patients": 0, "features": {}, "records": []}
    rows = read_features(stores.tables, stores.profile, dates=[day])
    names = list(feature_names(stores.profile))
    figures = {}
    if rows.height:
        import polars as pl

        lists = (pl.col(names).count(), pl.col(names).mean(), pl.col(names).min(), pl.col(names).max())
        counted = [rows.select(expression).row(0) for expression in lists]
        figures = {
            name: dict(zip(("values", "mean", "min", "max"), values, strict=True))
            for name, *values in zip(names, *counted, strict=True)
        }
    return {
        "trial": stores.profile.name,
        "date": day.isoformat(),
        "rows": rows.height,
        "patients": rows["patient_id"].n_unique(),
        "features": figures,
        "records": rows.drop("trial").to_dicts(),
    }


def query_online(stores: Stores, patient: str | None = None, now: datetime | None = None) -> dict[str, Any]:
    """Return a patient's online features; without one, how many patients are online and how old they are.

    Returns:
        With a patient: ``patient``, ``found``, and where found ``trial``, ``feature_time``, ``age_seconds``,
        ``loaded_at``, ``lives_seconds``, ``features``. Without: ``patients``, ``examples`` (some patients' ids),
        ``oldest`` and ``newest`` feature time of the trial's patients.
    """
    now = now or datetime.now(UTC)
    if patient is None:
        known = sorted(set(stores.keys()["patient_id"].to_list()))
        online = stores.online.get_many(known)
        times = sorted(row.feature_time for row in online.values())
        return {
            "trial": stores.profile.name,
            "patients": len(online),
            "not_online": len(known) - len(online),
            "oldest": times[0].isoformat() if times else None,
            "newest": times[-1].isoformat() if times else None,
            "examples": [one for one in known if one in online][:SHOWN_PATIENTS],
        }
    row = stores.online.get(patient)
    if row is None:
        return {"patient": patient, "found": False}
    lives = stores.online.time_to_live(patient)
    return {
        "patient": patient,
        "found": True,
        "trial": row.trial,
        "feature_time": row.feature_time.isoformat(),
        "age_seconds": round(row.age(now).total_seconds()),
        "loaded_at": None if row.loaded_at is None else row.loaded_at.isoformat(),
        "lives_seconds": None if lives is None else round(lives.total_seconds()),
        "feature_set": row.feature_set,
        "features": dict(sorted(row.features.items())),
    }


def monitor(stores: Stores, day: date | None = None, now: datetime | None = None) -> dict[str, Any]:
    """Return how the feature pipeline of a trial is doing; with `day`: up to that day.

    Returns:
        ``rows``, ``patients``, ``days`` (day -> rows, the last ones), ``newest``, ``up_to_date`` (the rows follow from
        silver as it is), ``behind`` (silver tables with newer versions), ``feature_table_version``,
        ``last_commit_at``, ``online`` (see :func:`compare_stores`), ``age_seconds`` of the newest row against the
        trial's clock, and ``problems``.
    """
    import polars as pl

    from clinical_orchestration.stores.feature_store import FeatureState
    from clinical_orchestration.tables import DOMAINS, FEATURES, silver

    now = now or datetime.now(UTC)
    keys = stores.keys()
    if day is not None:
        keys = keys.filter(pl.col("feature_date") <= day)
    counts = keys.group_by("feature_date").len().sort("feature_date").tail(SHOWN_DAYS)
    newest = keys["feature_time"].max()
    recorded = FeatureState(stores.profile, stores.tables).recorded()
    versions = {domain: stores.tables.version(silver(domain)) for domain in DOMAINS}
    behind = [
        name for name, version in versions.items() if version is not None and (recorded or {}).get(name) != version
    ]
    comparison = compare_stores(stores)
    commits = stores.tables.history(FEATURES, 1)
    problems = []
    if keys.is_empty():
        problems.append("there are no feature rows")
    elif recorded is None:
        problems.append("the rows were computed with another set of features, or in part; the next run computes all")
    elif behind:
        problems.append(
            f"{', '.join(behind)} changed since the rows were computed; the next run brings them up to date"
        )
    for name, words in (("missing", "not online"), ("differing", "online with other values")):
        if comparison[name]:
            problems.append(f"{comparison[name]} patients are {words}")
    last = _last_record(stores, versions) if stores.profile.clock == "data" else now
    age = (last - newest) if isinstance(newest, datetime) and last is not None else None
    if age is not None and age > stores.profile.online.max_age:
        problems.append(f"the newest row is {age.days} days behind the newest record")
    return {
        "trial": stores.profile.name,
        "date": None if day is None else day.isoformat(),
        "rows": keys.height,
        "patients": keys["patient_id"].n_unique(),
        "days": {
            moment.isoformat(): count
            for moment, count in zip(counts["feature_date"].to_list(), counts["len"].to_list(), strict=True)
        },
        "newest": newest.isoformat() if isinstance(newest, datetime) else None,
        "age_seconds": None if age is None else round(max(age, timedelta(0)).total_seconds()),
        "up_to_date": recorded is not None and not behind,
        "behind": behind,
        "feature_table_version": stores.tables.version(FEATURES),
        "last_commit_at": datetime.fromtimestamp(commits[0]["timestamp"] / 1000, UTC).isoformat() if commits else None,
        "online": comparison,
        "problems": problems,
    }


def _last_record(stores: Stores, versions: Mapping[str, int | None]) -> datetime | None:
    """Return the time of the trial's newest vital sign."""
    import polars as pl

    from clinical_orchestration.tables import silver

    if versions.get("patient_vitals") is None:
        return None
    times = stores.tables.read(
        silver("patient_vitals"), columns=["event_time"], filters=[("trial", "=", stores.profile.name)]
    )
    found = pl.DataFrame(times)["event_time"].max()
    return found if isinstance(found, datetime) else None


def lines(kind: str, found: Mapping[str, Any]) -> list[str]:
    """Return what people see of a result: a few lines."""
    if kind == "query_offline":
        return _offline_lines(found)
    if kind == "query_online" and "patient" in found:
        return _patient_lines(found)
    if kind == "monitor":
        days = [f"  {day}  {count:>6,} rows" for day, count in found["days"].items()]
        state = "up to date with silver" if found["up_to_date"] else "not up to date"
        return [
            f"{found['rows']:,} rows of {found['patients']:,} patients, newest {found['newest']}, {state}",
            f"version {found['feature_table_version']} of {found['last_commit_at']}",
            *days,
            f"online: {found['online']['equal']} of {found['online']['checked']} patients equal",
            *(f"! {problem}" for problem in found["problems"]),
        ]
    shown = [
        f"{name.replace('_', ' ')}: {value}" for name, value in found.items() if not isinstance(value, dict | list)
    ]
    for name in ("features", "examples"):
        values = found.get(name)
        if values:
            text = (
                ", ".join(f"{key} ({count})" for key, count in list(values.items())[:SHOWN_PATIENTS])
                if isinstance(values, Mapping)
                else ", ".join(values)
            )
            shown.append(f"{name}: {text}")
    return shown


def _offline_lines(found: Mapping[str, Any]) -> list[str]:
    if not found["rows"]:
        return [f"no feature rows{' on ' + found['date'] if found['date'] else ''}"]
    records: Sequence[Mapping[str, Any]] = found["records"]
    keys = ("patient_id", "feature_time", "feature_date")
    shown = [f"{found['date']}: {found['rows']:,} rows of {found['patients']:,} patients"]
    for record in records[:SHOWN_PATIENTS]:
        filled = sum(value is not None for name, value in record.items() if name not in keys)
        shown.append(f"  {record['patient_id']}  {record['feature_time']:%Y-%m-%d %H:%M:%S}  {filled} features")
    if len(records) > SHOWN_PATIENTS:
        shown.append(f"  and {len(records) - SHOWN_PATIENTS} more; --json has all rows and features")
    return shown


def _patient_lines(found: Mapping[str, Any]) -> list[str]:
    if not found["found"]:
        return [f"{found['patient']} has no online features: never loaded, or expired"]
    facts = ("trial", "feature_time", "age_seconds", "loaded_at", "lives_seconds")
    return [
        *(f"{name.replace('_', ' ')}: {found[name]}" for name in facts),
        *(f"  {name} = {value:.6g}" for name, value in found["features"].items()),
    ]
