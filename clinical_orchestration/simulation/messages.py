"""Simulated messages in the order in which they arrive, with the truth about each.

Everything comes from the seed: the same settings give the same bytes. The physiology and what happens to its messages
on the way (broken, late, sent twice) use separate generators, so that changing a rate changes no measurement.
"""

from __future__ import annotations

import hashlib
import heapq
import math
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, Literal

import numpy as np
import orjson

from clinical_orchestration.simulation.faults import FAULTS, broken
from clinical_orchestration.simulation.physiology import LABS, VITALS, Cohort
from clinical_orchestration.trials.profile import SimulationSettings

Kind = Literal["ok", "broken", "duplicate", "late"]

VERSION = 1  # part of the simulation's identity: raise it when the same settings give other bytes
SCHEMA_VERSION = "1.2"
SILENT = "silent"

_PER_SUBJECT_DAY = 24 + len(LABS) + 1.2  # messages at hourly vitals, for sizing only
_RACES = ("WHITE", "BLACK OR AFRICAN AMERICAN", "ASIAN", "OTHER")
_BASELINE_DRUGS = (
    ("METFORMIN", 500.0, "mg", "oral", "BID"),
    ("ATORVASTATIN", 20.0, "mg", "oral", "QD"),
    ("LISINOPRIL", 10.0, "mg", "oral", "QD"),
    ("AMLODIPINE", 5.0, "mg", "oral", "QD"),
    ("OMEPRAZOLE", 20.0, "mg", "oral", "QD"),
    ("WARFARIN", 5.0, "mg", "oral", "QD"),
    ("DIGOXIN", 0.125, "mg", "oral", "QD"),
    ("INSULIN GLARGINE", 20.0, "IU", "subcutaneous", "QD"),
    ("METHOTREXATE", 15.0, "mg", "oral", "QW"),
    ("LEVOTHYROXINE", 75.0, "ug", "oral", "QD"),
)
_RESCUE_DRUGS = (
    ("PARACETAMOL", 1000.0, "mg", "oral", "PRN"),
    ("HEPARIN", 5000.0, "IU", "subcutaneous", "BID"),
    ("MORPHINE", 5.0, "mg", "intravenous", "PRN"),
    ("CEFTRIAXONE", 2000.0, "mg", "intravenous", "QD"),
)
_DRIVEN_EVENTS = ("INFECTION", "PYREXIA", "TACHYCARDIA", "HYPOTENSION", "HYPOXIA", "DYSPNOEA")
_BACKGROUND_EVENTS = ("HEADACHE", "NAUSEA", "DIZZINESS", "RASH", "FATIGUE", "DIARRHOEA")


@dataclass(frozen=True, slots=True)
class SimulatedMessage:
    """One message as it arrives, and the truth about it.

    Attributes:
        sequence: 0-based place in the order of arrival.
        domain: bronze table that it belongs to.
        key: Kafka key: the patient.
        value: the bytes sent; None for a message without value (one of the faults).
        arrival_ms: when it arrives, milliseconds since the epoch.
        event_ms: when what it describes happened.
        kind: ``ok``, ``broken`` (the contract rejects it), ``duplicate`` (the same bytes as an earlier good message)
            or ``late`` (good, but arriving hours after a message of its kind would).
        fault: name of the fault of a broken message.
        record: what a good message says.
    """

    sequence: int
    domain: str
    key: bytes
    value: bytes | None
    arrival_ms: int
    event_ms: int
    kind: Kind
    fault: str | None = None
    record: dict[str, Any] | None = None

    @property
    def arrival(self) -> datetime:
        """UTC time of arrival."""
        return datetime.fromtimestamp(self.arrival_ms / 1000, tz=UTC)


@dataclass(slots=True)
class GroundTruth:
    """How many messages of each domain and kind there were."""

    counts: Counter[tuple[str, str]] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)

    def add(self, message: SimulatedMessage) -> None:
        """Count one message."""
        self.counts[message.domain, message.kind] += 1
        if message.fault:
            self.faults[message.fault] += 1

    def watch(self, messages: Iterable[SimulatedMessage]) -> Iterator[SimulatedMessage]:
        """Count messages as they pass."""
        for message in messages:
            self.add(message)
            yield message

    @property
    def total(self) -> int:
        """Number of messages."""
        return self.counts.total()

    def of_kind(self, *kinds: Kind, domain: str | None = None) -> int:
        """Return the number of messages of these kinds, of one domain or all."""
        return sum(n for (where, kind), n in self.counts.items() if kind in kinds and domain in (None, where))

    def as_dict(self) -> dict[str, dict[str, int]]:
        """Return counts by domain and kind."""
        result: dict[str, dict[str, int]] = {}
        for (domain, kind), count in sorted(self.counts.items()):
            result.setdefault(domain, {})[kind] = count
        return result


def simulation_id(settings: SimulationSettings, study_id: str, messages: int | None = None) -> str:
    """Return the identity of a simulation, 16 hex digits: equal identities mean equal bytes."""
    content = settings.model_dump(mode="json", exclude=None if settings.incidents else {"incidents"})
    what = [VERSION, np.__version__.split(".")[0], study_id, messages, content]
    return hashlib.sha256(orjson.dumps(what, option=orjson.OPT_SORT_KEYS)).hexdigest()[:16]


def subjects_for(settings: SimulationSettings, messages: int) -> int:
    """Return how many subjects give about `messages` messages in the days of `settings`."""
    per_day = _PER_SUBJECT_DAY - 24 + timedelta(days=1) / settings.vitals_every
    return max(2, math.ceil(messages / (settings.days * per_day)))


def simulate(settings: SimulationSettings, study_id: str, *, messages: int | None = None) -> Iterator[SimulatedMessage]:
    """Yield the messages of a simulated trial, ordered by arrival.

    Args:
        settings: seed, size and rates. Rates are shares of all messages; `missing_rate` is the share of measurements
            that were not taken.
        study_id: study, and prefix of patient identifiers.
        messages: exactly how many messages to give: the number of subjects then follows from it instead of
            ``settings.subjects``, and the trial goes on until they are reached. None: all of ``settings.days``.

    Raises:
        ValueError: a rate is outside 0 to 1, the rates add up to 1 or more, or a size is not positive.
    """
    return _Simulation(settings, study_id, messages).run()


class _Simulation:
    """One pass of the generator; holds the subjects' state and the messages that are on their way."""

    def __init__(self, settings: SimulationSettings, study_id: str, messages: int | None) -> None:
        rates = (settings.broken_rate, settings.duplicate_rate, settings.late_rate, settings.missing_rate)
        if any(not 0 <= rate <= 1 for rate in rates) or sum(rates[:3]) >= 1:
            raise ValueError("rates must be between 0 and 1, and broken, duplicate and late together below 1")
        count = settings.subjects if messages is None else subjects_for(settings, messages)
        if min(count, settings.sites, len(settings.arms)) < 1 or settings.days <= 0 or (messages or 1) < 1:
            raise ValueError("subjects, sites, arms, days and messages must be positive")
        self.settings, self.study_id, self.limit = settings, study_id, messages
        physiology, details, fate = np.random.SeedSequence(settings.seed).spawn(3)
        self.rng = np.random.default_rng(details)
        self.fate = np.random.default_rng(fate)
        self.step_ms = round(settings.vitals_every.total_seconds() * 1000)
        self.cohort = Cohort(
            count, settings.sites, settings.arms, self.step_ms / 3_600_000, np.random.default_rng(physiology)
        )
        start = datetime.fromisoformat(settings.start)
        start = start if start.tzinfo else start.replace(tzinfo=UTC)
        self.start_ms = int(start.timestamp()) * 1000
        self.ids = [f"{study_id}-{self.cohort.site[i] + 1:03d}-{i + 1:05d}" for i in range(count)]
        self.keys = [patient.encode() for patient in self.ids]
        self.site_names = [f"SITE-{site + 1:03d}" for site in range(settings.sites)]
        # enrolment over the first day (or fifth of a short trial), in the first half of a step, so that the first
        # measurement is in the same step; measurements at the subject's own minute
        window = min(86_400_000, round(settings.days * 86_400_000 / 5))
        enrolment_step = np.sort(self.rng.integers(0, max(1, window // self.step_ms), count))
        self.enrolled_ms = (
            self.start_ms + enrolment_step * self.step_ms + self.rng.integers(0, self.step_ms // 2, count)
        )
        self.lead_ms = self.step_ms // 20
        self.minute_ms = self.rng.integers(0, max(1, self.step_ms // 6), count)
        self.welcomed = np.zeros(count, dtype=bool)
        self.labs_day = np.full(count, -1)
        self.dose_day = np.full(count, -1)
        self.on_the_way: list[tuple[int, int, SimulatedMessage]] = []
        self.pushed = 0
        # shares of all messages become chances per original one: a duplicate is an additional message
        originals = 1 - settings.duplicate_rate
        self.broken_below = settings.broken_rate / originals
        self.late_below = self.broken_below + settings.late_rate / originals
        self.twice_below = self.late_below + settings.duplicate_rate / originals
        self.fates: list[float] = []

    def run(self) -> Iterator[SimulatedMessage]:
        end = self.start_ms + round(self.settings.days * 86_400_000)
        sent = 0
        now = self.start_ms
        while now < end or self.limit is not None:
            self.step(now)
            now += self.step_ms
            # what arrives before the next step begins can be overtaken by nothing that is still to come
            while self.on_the_way and self.on_the_way[0][0] < now:
                yield self.number(sent)
                sent += 1
                if sent == self.limit:
                    return
        while self.on_the_way:
            yield self.number(sent)
            sent += 1

    def number(self, sequence: int) -> SimulatedMessage:
        message = heapq.heappop(self.on_the_way)[2]
        object.__setattr__(message, "sequence", sequence)  # its place is known only now
        return message

    def step(self, now: int) -> None:
        """Let everybody's time pass and send what they give rise to."""
        cohort, rng = self.cohort, self.rng
        cohort.advance()
        active = self.enrolled_ms < now + self.step_ms
        for index in np.flatnonzero(active & ~self.welcomed):
            self.enrol(int(index))
        self.welcomed |= active
        hour = (now // 3_600_000) % 24
        times = np.maximum(now + self.minute_ms, self.enrolled_ms + self.lead_ms)
        stamps = _iso(times)
        self.vitals(now, times, stamps, active, float(hour))
        day = (now - self.start_ms) // 86_400_000
        # blood is drawn at the first step after 6 o'clock of a day, results come within hours
        due = active & (self.labs_day < day) & (hour >= 6)
        if due.any():
            self.labs(now, due)
            self.labs_day[due] = day
        due = active & (self.dose_day < day) & (hour >= 8)
        if due.any():
            self.doses(times, stamps, due)
            self.dose_day[due] = day
        rescue = np.flatnonzero(active & (rng.random(cohort.count) < 0.02 * cohort.severity * self.step_ms / 3_600_000))
        for index in rescue:
            self.medicate(int(index), _RESCUE_DRUGS[int(rng.integers(len(_RESCUE_DRUGS)))], int(times[index]) + 600_000)
        more = self.affected("event_rate", now)
        events = cohort.events(np.where(more > 0, more, 1.0))
        for index in events[active[events]]:
            self.adverse_event(int(index), now)

    def enrol(self, index: int) -> None:
        cohort, settings = self.cohort, self.settings
        enrolled = int(self.enrolled_ms[index])
        record = {
            "patient_id": self.ids[index],
            "study_id": self.study_id,
            "schema_version": SCHEMA_VERSION,
            "age": int(cohort.age[index]),
            "sex": "M" if cohort.male[index] else "F",
            "race": _RACES[cohort.race[index]],
            "site": self.site_names[cohort.site[index]],
            "arm": settings.arms[cohort.arm[index]],
            "enrolled_at": _iso_one(enrolled),
            "treatment_start": _iso_one(enrolled),
        }
        self.send("subjects", index, record, enrolled, enrolled + 1000)
        drugs = self.rng.choice(len(_BASELINE_DRUGS), int(self.rng.integers(0, 6)), replace=False)
        for place, drug in enumerate(drugs):
            self.medicate(index, _BASELINE_DRUGS[drug], enrolled + 2000 + 1000 * place)

    def affected(self, kind: str, now: int) -> Any:
        """Return the factor of the incidents of a kind for each subject now: 0 where there is none."""
        factors = np.zeros(self.cohort.count)
        for incident in self.settings.incidents:
            if incident.kind == kind and now >= self.start_ms + incident.from_day * 86_400_000:
                here = True if incident.site is None else self.cohort.site == incident.site - 1
                factors = np.where(here, incident.factor, factors)
        return factors

    def vitals(self, now: int, times: Any, stamps: list[str], active: Any, hour: float) -> None:
        cohort, count = self.cohort, self.cohort.count
        values = cohort.vitals(hour)
        taken = self.rng.random((len(VITALS), count)) >= self.settings.missing_rate
        taken[0] |= ~taken.any(axis=0)  # a message has at least one measurement
        delays = self.rng.integers(2_000, 45_000, count)
        columns = [values[vital].tolist() for vital in VITALS]
        fahrenheit = self.affected("fahrenheit", now)
        for index in np.flatnonzero(active).tolist():
            record: dict[str, Any] = {
                "patient_id": self.ids[index],
                "timestamp": stamps[index],
                "study_id": self.study_id,
                "schema_version": SCHEMA_VERSION,
            }
            for place, vital in enumerate(VITALS):
                if taken[place, index]:
                    record[vital] = columns[place][index]
            record["source"] = "bedside_monitor"
            record["trial_site"] = self.site_names[cohort.site[index]]
            record["trial_arm"] = self.settings.arms[cohort.arm[index]]
            moment = int(times[index])
            wrong = bool(fahrenheit[index]) and "temperature" in record
            if wrong:
                record["temperature"] = round(record["temperature"] * 1.8 + 32, 1)
            self.send(
                "patient_vitals", index, record, moment, moment + int(delays[index]), "fahrenheit" if wrong else None
            )

    def labs(self, now: int, due: Any) -> None:
        cohort, rng, count = self.cohort, self.rng, self.cohort.count
        values = cohort.labs()
        drawn = np.maximum(now, self.enrolled_ms) + rng.integers(0, 3_000_000, count)
        stamps = _iso(drawn)
        done = rng.random((len(LABS), count)) >= self.settings.missing_rate
        delays = rng.integers(3_600_000, 4 * 3_600_000, count)
        silent = self.affected("silent_lab", now) > 0
        for place, lab in enumerate(LABS):
            column = values[lab.code].tolist()
            for index in np.flatnonzero(due & done[place]).tolist():
                record = {
                    "patient_id": self.ids[index],
                    "timestamp": stamps[index],
                    "study_id": self.study_id,
                    "schema_version": SCHEMA_VERSION,
                    "test_name": lab.code,
                    "value": column[index],
                    "unit": lab.unit,
                    "reference_range": f"{lab.low:g}-{lab.high:g}",
                    "lab_id": f"LAB-{cohort.site[index] + 1:03d}",
                }
                moment = int(drawn[index])
                arrival = moment + int(delays[index]) + 50 * place
                self.send("lab_results", index, record, moment, arrival, SILENT if silent[index] else None)

    def doses(self, times: Any, stamps: list[str], due: Any) -> None:
        for index in np.flatnonzero(due).tolist():
            arm = self.settings.arms[self.cohort.arm[index]]
            level = self.cohort.arm[index] / max(1, len(self.settings.arms) - 1)
            drug = ("PLACEBO" if level == 0 else "STUDY DRUG", float(round(100 * level, 1)), "mg", "oral", "QD")
            self.medicate(index, drug, int(times[index]) + 300_000, arm=arm)

    def medicate(
        self, index: int, drug: tuple[str, float, str, str, str], moment: int, *, arm: str | None = None
    ) -> None:
        name, dose, unit, route, frequency = drug
        record: dict[str, Any] = {
            "patient_id": self.ids[index],
            "timestamp": _iso_one(moment),
            "study_id": self.study_id,
            "schema_version": SCHEMA_VERSION,
            "drug_name": name,
            "dosage": dose,
            "unit": unit,
            "route": route,
            "frequency": frequency,
        }
        if arm is not None:
            record["trial_arm"] = arm
        self.send("medications", index, record, moment, moment + 30_000)

    def adverse_event(self, index: int, now: int) -> None:
        rng, severity = self.rng, float(self.cohort.severity[index])
        onset = (
            max(now + int(rng.integers(0, self.step_ms)), int(self.enrolled_ms[index]) + self.lead_ms) // 1000 * 1000
        )
        driven = rng.random() < severity / (severity + 0.5)
        kinds = _DRIVEN_EVENTS if driven else _BACKGROUND_EVENTS
        grade = 1 + min(3, int(rng.poisson(0.35 + 0.6 * severity)))
        delay = int(rng.exponential(3 * 3_600_000)) + 300_000  # recognised and reported after some hours
        record = {
            "patient_id": self.ids[index],
            "study_id": self.study_id,
            "schema_version": SCHEMA_VERSION,
            "event_timestamp": _iso_one(onset),
            "event_type": kinds[int(rng.integers(len(kinds)))],
            "severity": f"grade_{grade}",
            "reported_by": ("investigator", "nurse", "patient")[int(rng.integers(3))],
            "report_timestamp": _iso_one(onset + delay),
        }
        self.send("adverse_events", index, record, onset, onset + delay)

    def send(
        self,
        domain: str,
        index: int,
        record: dict[str, Any],
        event_ms: int,
        arrival_ms: int,
        incident: str | None = None,
    ) -> None:
        """Put a message on its way, with the fate that its draw gives it.

        An `incident` decides instead of the fate, which is drawn all the same: other messages stay as they are.
        """
        if not self.fates:
            self.fates = self.fate.random(4096).tolist()
        fate = self.fates.pop()
        key = self.keys[index]
        value: bytes | None
        kind: Kind = "ok"
        fault, again = None, 0
        if fate < self.broken_below:
            names = FAULTS[domain]
            kind, fault = "broken", names[int(self.fate.integers(len(names)))]
            value = broken(fault, record, self.fate)
        else:
            value = orjson.dumps(record)
            if fate < self.late_below:
                kind = "late"
                delay = int(self.fate.integers(6 * 3_600_000, 48 * 3_600_000))
                arrival_ms += 0 if incident else delay
            elif fate < self.twice_below:
                again = arrival_ms + int(self.fate.integers(1_000, 6 * 3_600_000))
        if incident == SILENT:
            return
        if incident is not None and kind != "broken":
            kind, fault, again = "broken", incident, 0
        known = None if kind == "broken" else record
        self.push(SimulatedMessage(-1, domain, key, value, arrival_ms, event_ms, kind, fault, known))
        if again:
            self.push(SimulatedMessage(-1, domain, key, value, again, event_ms, "duplicate", None, record))

    def push(self, message: SimulatedMessage) -> None:
        heapq.heappush(self.on_the_way, (message.arrival_ms, self.pushed, message))
        self.pushed += 1


def _iso(times_ms: Any) -> list[str]:
    """Return ISO 8601 texts, UTC, whole seconds."""
    texts: list[str] = np.datetime_as_string(times_ms.astype("datetime64[ms]"), unit="s").tolist()
    return [text + "Z" for text in texts]


def _iso_one(time_ms: int) -> str:
    return datetime.fromtimestamp(time_ms // 1000, tz=UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
