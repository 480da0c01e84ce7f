"""Populations for the drift figures: resamples of a set of subjects, and shifts of one vital sign."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from clinical_orchestration.monitoring.drift import Floats, Integers, Sample

LEVELS = ("latest", "mean", "min", "max")


@dataclass(frozen=True)
class Population:
    """Feature rows of real or simulated subjects, to draw samples of subjects from."""

    name: str
    names: tuple[str, ...]
    values: Floats
    subjects: Integers
    days: Floats | None = None
    hours: Floats | None = None

    @property
    def whole(self) -> Sample:
        """Every row."""
        return Sample(self.names, self.values, self.subjects, self.days, self.hours)

    def draw(self, rng: np.random.Generator, subjects: int) -> Sample:
        """Draw subjects with replacement, each with all of its rows; a subject drawn twice counts as two."""
        order = np.argsort(self.subjects, kind="stable")
        starts = np.flatnonzero(np.append(True, np.diff(self.subjects[order]) != 0))
        groups = np.split(order, starts[1:])
        picked = rng.integers(len(groups), size=subjects)
        rows = np.concatenate([groups[number] for number in picked])
        numbers = np.repeat(np.arange(subjects), [len(groups[number]) for number in picked])
        return replace(self.whole.take(rows), subjects=numbers)

    def halves(self, rng: np.random.Generator) -> tuple[Sample, Sample]:
        """Split the subjects at random into two halves, without replacement."""
        own = np.unique(self.subjects)
        first = np.isin(self.subjects, rng.permutation(own)[: len(own) // 2])
        return self.whole.take(np.flatnonzero(first)), self.whole.take(np.flatnonzero(~first))

    def parts(self, day: float, gap: float, length: float) -> tuple[Sample, Sample]:
        """Return the rows up to a day in the trial, and those of some `length` of days after a `gap`."""
        days = np.zeros(len(self.subjects)) if self.days is None else self.days
        later = (days > day + gap) & (days <= day + gap + length)
        return self.whole.take(np.flatnonzero(days <= day)), self.whole.take(np.flatnonzero(later))

    def standard_deviation(self, vital: str) -> float:
        """Return that of the vital sign's latest value."""
        return float(np.nanstd(self.values[:, self.names.index(f"{vital}_latest")]))


def shifted(sample: Sample, vital: str, amount: float) -> Sample:
    """Add to a vital sign: all features that are a level of it move by the amount."""
    values = sample.values.copy()
    for number, name in enumerate(sample.names):
        rest = name.removeprefix(f"{vital}_")
        if rest != name and rest.split("_")[0] in LEVELS:
            values[:, number] += amount
    return replace(sample, values=values)
