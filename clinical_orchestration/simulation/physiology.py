"""The hidden state of simulated subjects, hour by hour, and what it does to vital signs, labs and adverse events.

All subjects advance together in arrays, so memory grows with the number of subjects and not with time. Each subject
has a frailty and passes through episodes of deterioration: the severity rises over hours, stays and falls. Severity
raises heart rate, temperature and inflammation markers, lowers blood pressure and oxygen saturation, and multiplies the
hazard of an adverse event. Part of the hazard is background that no measurement shows, so that prediction is possible
and bounded.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

VITALS = ("heart_rate", "blood_pressure_systolic", "blood_pressure_diastolic", "temperature", "spo2")
# the contract's range of each vital sign; a simulated good value stays inside
VITAL_RANGES = {
    "heart_rate": (40.0, 200.0),
    "blood_pressure_systolic": (60.0, 250.0),
    "blood_pressure_diastolic": (40.0, 150.0),
    "temperature": (35.0, 42.0),
    "spo2": (70.0, 100.0),
}

# vital -> mean and spread between subjects, circadian amplitude, effect of severity 1, spread of the noise
_VITAL_MODEL = {
    "heart_rate": (72.0, 7.0, 4.0, 9.0, 5.0),
    "blood_pressure_systolic": (126.0, 11.0, 5.0, -7.0, 6.5),
    "blood_pressure_diastolic": (77.0, 7.0, 3.0, -4.0, 4.5),
    "temperature": (36.7, 0.15, 0.25, 0.5, 0.2),
    "spo2": (97.4, 0.7, 0.2, -1.5, 0.8),
}
_NOISE_MEMORY = 0.6  # correlation of the noise with that of the hour before


@dataclass(frozen=True)
class Lab:
    """One laboratory test: median and log spread between subjects, log effect of severity 1, log noise."""

    code: str
    unit: str
    median: float
    between: float
    effect: float
    noise: float
    low: float
    high: float
    digits: int


LABS = (
    Lab("ALT", "U/L", 22.0, 0.30, 0.12, 0.12, 7, 56, 0),
    Lab("AST", "U/L", 23.0, 0.25, 0.12, 0.12, 10, 40, 0),
    Lab("BILI", "umol/L", 9.0, 0.30, 0.10, 0.12, 2, 21, 1),
    Lab("CREAT", "umol/L", 78.0, 0.18, 0.10, 0.06, 53, 115, 0),
    Lab("GLUC", "mmol/L", 5.4, 0.12, 0.08, 0.10, 3.9, 6.1, 1),
    Lab("HGB", "g/L", 138.0, 0.09, -0.02, 0.03, 120, 175, 0),
    Lab("K", "mmol/L", 4.2, 0.06, 0.03, 0.05, 3.5, 5.1, 1),
    Lab("PLAT", "10^9/L", 245.0, 0.20, -0.07, 0.08, 150, 400, 0),
    Lab("SODIUM", "mmol/L", 140.0, 0.012, -0.008, 0.01, 136, 145, 0),
    Lab("WBC", "10^9/L", 6.8, 0.22, 0.18, 0.10, 4, 11, 1),
    Lab("CRP", "mg/L", 2.5, 0.50, 0.75, 0.30, 0, 5, 1),
    Lab("LACTATE", "mmol/L", 1.1, 0.20, 0.28, 0.15, 0.5, 2.0, 1),
)

_EPISODES_PER_DAY = 0.09  # of a subject of median frailty
_BACKGROUND_PER_DAY = 0.025  # adverse events without deterioration, median frailty
_DRIVEN_PER_DAY = 0.6  # adverse events at severity 1; grows with its power below
_DRIVEN_POWER = 1.7


class Cohort:
    """Subjects and their present state.

    Args:
        count: number of subjects.
        sites: number of sites; subjects are spread evenly.
        arms: names of the arms; subjects are randomised in equal blocks.
        step_hours: length of one step.
        rng: source of all randomness of the physiology.
    """

    def __init__(self, count: int, sites: int, arms: tuple[str, ...], step_hours: float, rng: np.random.Generator):
        self.count = count
        self._rng = rng
        self._step = step_hours
        index = np.arange(count)
        self.site = index % sites
        self.arm = rng.permuted(np.resize(np.arange(len(arms)), count))
        self.age = np.clip(np.round(rng.normal(63, 12, count)), 18, 92).astype(np.int64)
        self.male = rng.random(count) < 0.48
        self.race = rng.choice(4, count, p=(0.62, 0.15, 0.17, 0.06))
        dose = self.arm / max(1, len(arms) - 1)  # 0 for the first arm, 1 for the last
        self._dose = dose
        site_effect = rng.normal(0, 0.12, sites)[self.site]
        self.frailty = np.exp(rng.normal(0, 0.45, count) + 0.015 * (self.age - 63) - 0.3 * dose + site_effect)
        self._base = {
            vital: mean + spread * rng.standard_normal(count)
            for vital, (mean, spread, *_) in _VITAL_MODEL.items()
        }  # fmt: skip
        self._base["blood_pressure_systolic"] += 0.35 * (self.age - 63) - 3 * dose  # the drug lowers blood pressure
        self._base["heart_rate"] += 2.5 * dose
        self._noise = {vital: rng.standard_normal(count) for vital in VITALS}
        self._lab_base = {
            lab.code: np.log(lab.median) + lab.between * rng.standard_normal(count) for lab in LABS
        }  # fmt: skip
        self._lab_base["ALT"] += 0.25 * dose  # a liver signal of the drug
        self._lab_base["HGB"] += np.where(self.male, 0.04, -0.04)
        self.severity = np.zeros(count)
        self._age_of_episode = np.full(count, np.inf)  # hours since its start; infinite without an episode
        self._peak, self._rise, self._plateau, self._fall = (np.ones(count) for _ in range(4))

    def advance(self) -> None:
        """Go on by one step."""
        rng, count, step = self._rng, self.count, self._step
        starts = rng.random(count) < 1 - np.exp(-self.frailty * _EPISODES_PER_DAY * step / 24)
        peak, rise = rng.gamma(4.0, 0.4, count), rng.uniform(10, 40, count)
        plateau, fall = rng.uniform(6, 36, count), rng.uniform(12, 60, count)
        self._age_of_episode += step
        over = self._age_of_episode > self._rise + self._plateau + self._fall
        new = starts & over
        self._age_of_episode = np.where(new, 0.0, self._age_of_episode)
        for name, drawn in (("_peak", peak), ("_rise", rise), ("_plateau", plateau), ("_fall", fall)):
            setattr(self, name, np.where(new, drawn, getattr(self, name)))
        age = self._age_of_episode
        falling = 1 - (age - self._rise - self._plateau) / self._fall
        self.severity = self._peak * np.clip(np.minimum(age / self._rise, falling), 0, 1)
        for vital in VITALS:
            fresh = rng.standard_normal(count) * np.sqrt(1 - _NOISE_MEMORY**2)
            self._noise[vital] = _NOISE_MEMORY * self._noise[vital] + fresh

    def vitals(self, hour_of_day: float) -> dict[str, Floats]:
        """Return the vital signs of all subjects now, inside the contract's ranges, in the contract's units."""
        circadian = np.sin((hour_of_day - 10) / 24 * 2 * np.pi)  # lowest at 4, highest at 16 o'clock
        values = {}
        for vital, (_, _, amplitude, effect, spread) in _VITAL_MODEL.items():
            value = self._base[vital] + amplitude * circadian + effect * self.severity + spread * self._noise[vital]
            digits = 1 if vital == "temperature" else 0
            values[vital] = np.round(np.clip(value, *VITAL_RANGES[vital]), digits)
        # the pulse pressure stays positive
        values["blood_pressure_diastolic"] = np.clip(
            np.minimum(values["blood_pressure_diastolic"], values["blood_pressure_systolic"] - 10), 40, 150
        )
        return values

    def labs(self) -> dict[str, Floats]:
        """Return the laboratory values of all subjects now, by test code, in the unit of :data:`LABS`."""
        values = {}
        for lab in LABS:
            log_value = self._lab_base[lab.code] + lab.effect * self.severity
            drawn = np.exp(log_value + lab.noise * self._rng.standard_normal(self.count))
            values[lab.code] = np.round(drawn, lab.digits)
        return values

    def event_rate(self) -> Floats:
        """Return the hazard of an adverse event now, in events a day."""
        background = _BACKGROUND_PER_DAY * self.frailty * (1 + 0.5 * self._dose)
        return background + _DRIVEN_PER_DAY * self.severity**_DRIVEN_POWER

    def events(self, factor: float | Floats = 1.0) -> Ints:
        """Return the indices of the subjects for whom an adverse event starts in this step.

        `factor`, one for all or one a subject, multiplies the hazard.
        """
        chance = 1 - np.exp(-self.event_rate() * factor * self._step / 24)
        return np.flatnonzero(self._rng.random(self.count) < chance)
