"""What sensors decide: functions of what was observed, of what was asked for before, and of the time.

A sensor's *position* is a small JSON object that says up to where events have started a run. A decision either keeps
quiet, with the reason, or asks for one run together with the position that holds once that run is stored.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

Position = dict[str, Any]


@dataclass(frozen=True)
class Wait:
    """Start nothing.

    Attributes:
        reason: why, for people.
        position: the new position where the observation alone moves it; None: it stays.
        memory: what the next evaluation has to know; it is no part of any event. None: it stays.
    """

    reason: str
    position: Position | None = None
    memory: Position | None = None


@dataclass(frozen=True)
class Ask:
    """Start one run.

    Attributes:
        reason: why, for people; goes into the run's tags and into ``conf["reason"]``.
        position: what holds once the run is stored.
        trial: trial of the run; None: the deployment's default.
        source: folder of files, or an ``s3://`` prefix.
        conf: further free-form settings of the run.
        memory: see :class:`Wait`.
    """

    reason: str
    position: Position
    trial: str | None = None
    source: str | None = None
    conf: Mapping[str, Any] = field(default_factory=dict)
    memory: Position | None = None


Decision = Wait | Ask


@dataclass(frozen=True)
class PartitionLag:
    """One partition: `end` is the offset after its newest message, `begin` the next one that bronze does not hold."""

    begin: int
    end: int


@dataclass(frozen=True)
class DomainRows:
    """A raw table: its rows, and whether silver has not seen all of them."""

    rows: int
    behind: bool


@dataclass(frozen=True)
class Inflow:
    """What has arrived: partitions by ``topic/partition``, raw tables by domain, and the newest quality score.

    Attributes:
        partitions: None where there is no broker.
        domains: the raw tables.
        domain_of: domain by topic.
        quality: lowest score of the newest quality result; None where none was made yet.
    """

    partitions: Mapping[str, PartitionLag] | None
    domains: Mapping[str, DomainRows]
    domain_of: Mapping[str, str]
    quality: float | None


def clinical_data(inflow: Inflow, position: Position, *, minimum: int, threshold: float) -> Decision:
    """Ask for `clinical_data_pipeline` when enough records arrived and their quality is known to be good.

    Records count once: as messages that bronze does not hold, or as rows of bronze that silver has not seen, and not
    again when a run was asked for because of them, whatever became of that run. A failed run is an alert, and the
    schedule repeats it.

    Args:
        inflow: what has arrived.
        position: ``offsets`` by ``topic/partition`` and ``rows`` by domain, up to which records started a run.
        minimum: records that are worth a run (variable ``clinical_data_minimum_records``).
        threshold: lowest quality score (variable ``data_quality_threshold``).
    """
    seen_offsets: Mapping[str, int] = position.get("offsets", {})
    seen_rows: Mapping[str, int] = position.get("rows", {})
    offsets = dict(seen_offsets)
    expected: dict[str, int] = {}
    messages = 0
    for name, lag in (inflow.partitions or {}).items():
        # a topic that was made anew starts at 0 again: its messages are new ones
        seen = seen_offsets.get(name, 0)
        start = max(lag.begin, seen if seen <= lag.end else 0)
        new = max(0, lag.end - start)
        messages += new
        offsets[name] = lag.end
        domain = inflow.domain_of.get(name.rpartition("/")[0])
        if domain is not None:
            expected[domain] = expected.get(domain, 0) + max(0, lag.end - lag.begin)
    unread = 0
    rows = {}
    for domain, table in inflow.domains.items():
        if table.behind:
            # while the messages that were counted once are in bronze and not in silver they are no news
            unread += max(0, table.rows - seen_rows.get(domain, 0))
        rows[domain] = max(table.rows, seen_rows.get(domain, 0) if table.behind else 0)
    found = messages + unread
    parts = f"{messages:,} messages beyond the raw tables, {unread:,} raw rows beyond silver"
    if inflow.partitions is None:
        parts = f"{unread:,} raw rows beyond silver; no Kafka broker is installed here"
    if found < minimum:
        reason = f"{found:,} new records, a run needs {minimum:,} ({parts})"
        # rows that silver holds are nobody's news any more; offsets stay where they are
        settled = {
            domain: table.rows if not table.behind else seen_rows.get(domain, 0)
            for domain, table in inflow.domains.items()
        }
        moved = settled != dict(seen_rows)
        return Wait(reason, {"offsets": dict(seen_offsets), "rows": settled} if moved else None)
    if inflow.quality is not None and inflow.quality < threshold:
        return Wait(
            f"{found:,} new records, but the newest quality score {inflow.quality:.3f} is below "
            f"data_quality_threshold {threshold:.3f}; the schedule goes on"
        )
    after = {domain: rows.get(domain, 0) + expected.get(domain, 0) for domain in {*rows, *expected}}
    return Ask(f"{found:,} new records: {parts}", {"offsets": offsets, "rows": after})


@dataclass(frozen=True)
class LandingFile:
    """A file in a landing folder; `identity` changes whenever its content does (size and time, or etag).

    Attributes:
        trial: name of the trial profile, by its folder.
        name: of the file, within the trial's landing folder.
        identity: of the content.
        declared: whether a marker says that the file is complete.
    """

    trial: str
    name: str
    identity: str
    declared: bool = False


def landing_files(
    files: Sequence[LandingFile], sources: Mapping[str, str], position: Position, memory: Position
) -> Decision:
    """Ask for a run over a trial's landing folder when it holds complete files that no run was started for.

    A file is complete when a marker says so, or when it was the same at the evaluation before.

    Args:
        files: all files of all landing folders.
        sources: landing folder by trial.
        position: ``done``: identity by file, by trial.
        memory: ``seen``: identity by file, by trial, at the evaluation before.
    """
    done: Mapping[str, Mapping[str, str]] = position.get("done", {})
    seen: Mapping[str, Mapping[str, str]] = memory.get("seen", {})
    now: dict[str, dict[str, str]] = {}
    for file in files:
        now.setdefault(file.trial, {})[file.name] = file.identity
    memory = {"seen": now}
    growing: dict[str, int] = {}
    for trial in sorted(now):
        fresh = [file for file in files if file.trial == trial and done.get(trial, {}).get(file.name) != file.identity]
        if not fresh:
            continue
        incomplete = [
            file for file in fresh if not file.declared and seen.get(trial, {}).get(file.name) != file.identity
        ]
        if incomplete:
            # a run reads the whole folder: it waits until every new file of it is there
            growing[trial] = len(incomplete)
            continue
        names = ", ".join(sorted(file.name for file in fresh))
        # files that are gone need no memory
        kept = {name: identity for name, identity in done.get(trial, {}).items() if name in now[trial]}
        after = {**done, trial: {**kept, **{file.name: file.identity for file in fresh}}}
        return Ask(
            f"{len(fresh)} new files in the landing folder of {trial}: {names}",
            {"done": after},
            trial=trial,
            source=sources[trial],
            memory=memory,
        )
    if growing:
        waiting = ", ".join(f"{count} of {trial}" for trial, count in growing.items())
        return Wait(f"new files are not known to be complete yet: {waiting}", memory=memory)
    return Wait("no new file" if files else "no file in any landing folder", memory=memory)


@dataclass(frozen=True)
class OnlineRow:
    """One patient's row online: when its features hold, whose set they are, how many there are."""

    feature_time: datetime
    feature_set: str
    features: int


@dataclass(frozen=True)
class FeatureStoreState:
    """A trial's features offline and online.

    Attributes:
        trial: name of the profile.
        offline: newest feature time by patient, in ``gold/patient_features``.
        newest_record: time of the newest vital sign by patient, in silver.
        silver_moved: whether silver holds versions that the offline rows do not follow from.
        online: rows by patient; those asked for, see `asked`.
        asked: patients whose online rows were read (all, or a sample of a large trial).
        now: the trial's present.
        max_age: age beyond which online features are too old.
        feature_set: id of the profile's features.
    """

    trial: str
    offline: Mapping[str, datetime]
    newest_record: Mapping[str, datetime]
    silver_moved: bool
    online: Mapping[str, OnlineRow]
    asked: frozenset[str]
    now: datetime
    max_age: timedelta
    feature_set: str


@dataclass(frozen=True)
class FeatureFindings:
    """Patients by what is wrong with their online features."""

    missing: int = 0
    stale: int = 0
    incomplete: int = 0
    asked: int = 0

    @property
    def any(self) -> bool:
        """Whether something is wrong."""
        return bool(self.missing or self.stale or self.incomplete)

    def __str__(self) -> str:
        parts = [
            (self.missing, "without online features"),
            (self.stale, "with stale ones"),
            (self.incomplete, "with missing features"),
        ]
        said = ", ".join(f"{count} {text}" for count, text in parts if count)
        return f"{said} of {self.asked} patients" if said else f"all {self.asked} patients have their features"


def feature_findings(state: FeatureStoreState) -> FeatureFindings:
    """Return what a reload would cure.

    A patient is *missing* who has features offline, or records that the offline features do not know yet, and none
    online. A row is *stale* when a newer one is offline, or when it is older than the trial allows while newer records
    of the patient are waiting: a patient who has left the trial has old features and nothing that could renew them. A
    row is *incomplete* when it is of another set of features than the profile's, or holds none.
    """
    missing = stale = incomplete = 0
    for patient in state.asked:
        row = state.online.get(patient)
        offline = state.offline.get(patient)
        if row is None:
            missing += offline is not None or state.silver_moved
        elif row.feature_set != state.feature_set or not row.features:
            incomplete += 1
        elif (offline is not None and row.feature_time < offline) or (
            state.silver_moved
            and state.now - row.feature_time > state.max_age
            and (newest := state.newest_record.get(patient)) is not None
            and newest > row.feature_time
        ):
            stale += 1
    return FeatureFindings(missing, stale, incomplete, len(state.asked))


FEATURE_STORE_PAUSE = timedelta(hours=6)


def feature_store(states: Sequence[FeatureStoreState], position: Position, now: datetime) -> Decision:
    """Ask for a run that loads features again, for the first trial that needs it.

    Args:
        states: one a trial that has features or records.
        position: by trial, the problem that a run was asked for and when. The same problem is not asked for again
            within :data:`FEATURE_STORE_PAUSE`: if a run did not cure it, another one at once will not.
        now: the wall clock.
    """
    if not states:
        return Wait("no trial has records or features yet")
    reasons = []
    for state in states:
        found = feature_findings(state)
        reasons.append(f"{state.trial}: {found}")
        if not found.any:
            continue
        problem = f"{found.missing}/{found.stale}/{found.incomplete}"
        before = position.get(state.trial)
        if before and before["problem"] == problem and now - datetime.fromisoformat(before["at"]) < FEATURE_STORE_PAUSE:
            reasons[-1] += f"; a run was asked for at {before['at'][:16]}"
            continue
        return Ask(
            f"{state.trial}: {found}",
            {**position, state.trial: {"problem": problem, "at": now.isoformat()}},
            trial=state.trial,
            conf={"full_features": True} if found.incomplete else {},
        )
    return Wait("; ".join(reasons))


@dataclass(frozen=True)
class ModelState:
    """What monitoring last found out about a trial's model; each result with the id of the event that stored it.

    Attributes:
        trial: name of the profile.
        performance: result of ``monitoring/performance``, or None.
        data_drift: result of ``monitoring/data_drift``, or None.
        concept_drift: result of ``monitoring/concept_drift``, or None.
        events: id of the newest event by result.
        auroc_by_window: AUROC of consecutive windows of time, oldest first.
        min_auroc: bound of the trial's promotion rule.
    """

    trial: str
    performance: Mapping[str, Any] | None
    data_drift: Mapping[str, Any] | None
    concept_drift: Mapping[str, Any] | None
    events: Mapping[str, int]
    auroc_by_window: Sequence[float]
    min_auroc: float


MAX_DROP = 0.05
"""The contract's alert: accuracy down by more than 5 %, here a share of the AUROC at training."""
TREND_POINTS = 6
TREND_P = 0.05


def model_reasons(state: ModelState) -> list[str]:
    """Return why the model should be trained again: threshold, drop, trend or drift; none is an empty list."""
    reasons = []
    performance = state.performance or {}
    status = performance.get("status")
    auroc = (performance.get("auroc") or {}).get("value")
    if status in ("ok", "degraded") and auroc is not None:
        baseline = (performance.get("baseline") or {}).get("auroc")
        if status == "degraded":
            said = "; ".join(str(reason) for reason in performance.get("reasons", []))
            reasons.append(f"performance is degraded: {said}" if said else "performance is degraded")
        if auroc < state.min_auroc:
            reasons.append(f"AUROC {auroc:.3f} is below {state.min_auroc:.3f}")
        drop = performance.get("drop")
        # significant as well: on few outcomes a drop of this size is noise
        lower = performance.get("drop_lower", 0.0)
        if drop is not None and baseline and drop > MAX_DROP * baseline and (lower is None or lower > 0):
            reasons.append(f"AUROC is {drop:.3f} lower than at training ({baseline:.3f})")
    recent = state.auroc_by_window[-TREND_POINTS:]
    if len(recent) == TREND_POINTS:
        fall, p = trend(recent)
        if fall > MAX_DROP * recent[0] and p < TREND_P:
            reasons.append(f"AUROC fell by {fall:.3f} over the last {TREND_POINTS} windows (Mann-Kendall p {p:.3f})")
    if (state.data_drift or {}).get("status") == "drift":
        features = len((state.data_drift or {}).get("drifted_features", []))
        reasons.append(f"data drift in {features} features")
    if (state.concept_drift or {}).get("status") == "drift":
        reasons.append("concept drift")
    return reasons


def trend(values: Sequence[float]) -> tuple[float, float]:
    """Return by how much `values` fell from first to last (Theil-Sen slope times span) and how likely that is chance.

    The p value is one-sided, of the Mann-Kendall statistic by its normal approximation with continuity correction and
    ties (Kendall 1975, Rank Correlation Methods).
    """
    count = len(values)
    if count < 3:
        return 0.0, 1.0
    pairs = [(i, j) for i in range(count) for j in range(i + 1, count)]
    slopes = sorted((values[j] - values[i]) / (j - i) for i, j in pairs)
    middle = len(slopes) // 2
    slope = slopes[middle] if len(slopes) % 2 else (slopes[middle - 1] + slopes[middle]) / 2
    score = sum((values[j] > values[i]) - (values[j] < values[i]) for i, j in pairs)
    ties = [list(values).count(value) for value in set(values)]
    variance = (count * (count - 1) * (2 * count + 5) - sum(t * (t - 1) * (2 * t + 5) for t in ties)) / 18
    if variance <= 0 or score >= 0:
        return max(0.0, -slope * (count - 1)), 1.0
    z = (score + 1) / math.sqrt(variance)
    return max(0.0, -slope * (count - 1)), 0.5 * math.erfc(-z / math.sqrt(2))


def model_performance(states: Sequence[ModelState], position: Position, now: datetime, *, pause: timedelta) -> Decision:
    """Ask for `scheduled_retraining` when new monitoring results give a reason.

    Args:
        states: one a trial with monitoring results.
        position: by trial, the newest event ids that were looked at (``events``), and reasons and time of the latest
            request. The same kind of reason asks again only after `pause`: a new model needs outcomes before it can
            be judged.
        now: the wall clock.
        pause: see above (variable ``retraining_pause_hours``).
    """
    if not states:
        return Wait("no monitoring result yet: model_monitoring makes them")
    said = []
    moved = dict(position)
    for state in states:
        before: Mapping[str, Any] = position.get(state.trial, {})
        known: Mapping[str, int] = before.get("events", {})
        if all(known.get(name, -1) >= event for name, event in state.events.items()):
            said.append(f"{state.trial}: no new monitoring result")
            continue
        reasons = model_reasons(state)
        seen = {**before, "events": dict(state.events)}
        if not reasons:
            said.append(f"{state.trial}: the model is fine")
            moved[state.trial] = seen
            continue
        kinds = sorted({_kind(reason) for reason in reasons})
        at = before.get("at")
        if at and set(kinds) <= set(before.get("kinds", [])) and now - datetime.fromisoformat(at) < pause:
            said.append(f"{state.trial}: {'; '.join(reasons)}; retraining was asked for at {at[:16]}")
            moved[state.trial] = seen
            continue
        reason = "; ".join(reasons)
        return Ask(
            f"{state.trial}: {reason}",
            {**moved, state.trial: {"events": dict(state.events), "kinds": kinds, "at": now.isoformat()}},
            trial=state.trial,
            conf={"reason": reason},
        )
    return Wait("; ".join(said), moved if moved != position else None)


def _kind(reason: str) -> str:
    if "drift" in reason:
        return "concept drift" if reason.startswith("concept") else "data drift"
    return "performance"


@dataclass(frozen=True)
class LagVerdict:
    """Topics whose lag is above the bound, and those that are well below it again."""

    high: dict[str, int]
    low: tuple[str, ...]


def kafka_lag(lags: Mapping[str, int], bound: int) -> LagVerdict:
    """Judge each topic's lag behind bronze, in messages; between 80 % of the bound and the bound nothing changes."""
    return LagVerdict(
        {topic: lag for topic, lag in lags.items() if lag > bound},
        tuple(topic for topic, lag in lags.items() if lag <= 0.8 * bound),
    )
