"""Data drift: does a current population have the features of the reference?

One row a subject is compared, because rows of one subject are alike and tests that take them for independent find
drift in any population. Continuous features are tested by Kolmogorov-Smirnov, discrete ones by chi-square, the share of
missing values by Fisher's exact test. The Benjamini-Yekutieli procedure controls false discoveries over all features
together, whatever their correlations. A feature has drifted when its test says so *and* the change is large: population
stability index above 0.2. The whole set has drifted when a feature has.

References: PSI: Siddiqi (2006), Credit Risk Scorecards, ch. 7. Jensen-Shannon: Lin (1991), IEEE Trans. Inf. Theory
37(1). Benjamini and Yekutieli (2001), Ann. Statist. 29(4). Asymptotic Kolmogorov-Smirnov with Stephens' correction for
finite samples: Stephens (1970), J. R. Stat. Soc. B 32(1).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]

PSI_BOUND = 0.2
ALPHA = 0.05
BINS = 10
MAX_CATEGORIES = 12
"""Features with up to so many values in the reference are compared value by value, others by tenths."""
MIN_SUBJECTS = 30
MAX_SUBJECTS = 5000
LAG_BOUND = 0.2
TRUNCATED_BOUND = 0.2
"""A count over a window is of another kind where the share of rows whose window reaches back to the subject's start
differs by more than this."""
"""Sides whose mean days in the trial differ by no more standard deviations than this are of the same time."""
AGEING_BOUND = 0.05
_MIN_EXPECTED = 5.0
_FAR = 1e6


@dataclass(frozen=True)
class Sample:
    """Feature rows of a population.

    Attributes:
        names: the features, in the order of the columns.
        values: rows x features, NaN where missing.
        subjects: number of each row's subject; any integers, equal for rows of one subject.
        days: each row's days since its subject's start in the trial, NaN where unknown; None where unknown for all.
        hours: each row's time of day in hours (UTC), NaN where unknown; None where unknown for all.
        counted_days: of the features that count over a window: its length in days.
    """

    names: tuple[str, ...]
    values: Floats = field(repr=False)
    subjects: Integers = field(repr=False)
    days: Floats | None = field(default=None, repr=False)
    hours: Floats | None = field(default=None, repr=False)
    counted_days: Mapping[str, float] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if self.values.shape != (len(self.subjects), len(self.names)):
            raise ValueError(f"{self.values.shape} values for {len(self.subjects)} rows of {len(self.names)} features")
        for name in ("days", "hours"):
            times = getattr(self, name)
            if times is not None and len(times) != len(self.subjects):
                raise ValueError(f"{len(times)} {name} for {len(self.subjects)} rows")

    @property
    def rows(self) -> int:
        """Number of rows."""
        return len(self.subjects)

    @property
    def subject_count(self) -> int:
        """Number of subjects."""
        return len(np.unique(self.subjects))

    def select(self, names: Sequence[str]) -> Sample:
        """Return the sample with these features only; those it does not have are missing throughout."""
        place = {name: number for number, name in enumerate(self.names)}
        values = np.full((self.rows, len(names)), np.nan)
        for number, name in enumerate(names):
            if name in place:
                values[:, number] = self.values[:, place[name]]
        return replace(self, names=tuple(names), values=values)

    def take(self, rows: Integers) -> Sample:
        """Return the sample of these row numbers."""
        days, hours = (None if times is None else times[rows] for times in (self.days, self.hours))
        return Sample(self.names, self.values[rows], self.subjects[rows], days, hours, self.counted_days)


@dataclass(frozen=True)
class FeatureDrift:
    """How one feature differs.

    Attributes:
        test: ``ks`` or ``chi2``: what compared the values; the missing share is always compared as well.
        statistic: of that test: largest distance of the distribution functions, or chi-square.
        p_value: of values and missing share together.
        q_value: p-value adjusted for the number of features (Benjamini-Yekutieli).
        psi: population stability index over tenths of the reference (or its values) and "missing".
        jensen_shannon: divergence over the same classes, in bits: 0 the same, 1 nothing in common.
        missing_reference, missing_current: shares of missing values.
        mean_reference, mean_current: of the values that are there, None without any.
        ageing: the feature moves with time in the trial, and the current rows are later in it than the reference's:
            it is reported, but raises nothing.
        drifted: significant, and large.
    """

    name: str
    test: str
    statistic: float
    p_value: float
    q_value: float
    psi: float
    jensen_shannon: float
    missing_reference: float
    missing_current: float
    mean_reference: float | None
    mean_current: float | None
    ageing: bool
    drifted: bool


@dataclass(frozen=True)
class DataDrift:
    """How a current population differs from the reference, feature by feature; `rows` are those compared.

    `alpha` is the false discovery rate that was used.
    """

    features: tuple[FeatureDrift, ...] = field(repr=False)
    reference_rows: int
    current_rows: int
    alpha: float = ALPHA

    @property
    def drifted(self) -> tuple[str, ...]:
        """Names of the features that have drifted, largest change first."""
        found = sorted((item for item in self.features if item.drifted), key=lambda item: (-item.psi, item.name))
        return tuple(item.name for item in found)

    @property
    def has_drifted(self) -> bool:
        """Whether the set of features has: whether any of it has."""
        return any(item.drifted for item in self.features)

    @property
    def share_drifted(self) -> float:
        """Drifted features divided by all."""
        return len(self.drifted) / len(self.features) if self.features else 0.0

    @property
    def max_psi(self) -> float:
        """Largest index among features whose difference is significant, 0 where none is.

        The index of a feature that does not differ is noise, whose size depends on the number of subjects alone.
        """
        return max((item.psi for item in self.features if item.q_value < self.alpha and not item.ageing), default=0.0)


def population_stability_index(reference: ArrayLike, current: ArrayLike) -> Floats:
    """Return sum((c - r) ln(c / r)) over the last axis of two arrays of shares; shares must be above 0."""
    r, c = np.asarray(reference, dtype=np.float64), np.asarray(current, dtype=np.float64)
    return np.asarray(((c - r) * np.log(c / r)).sum(axis=-1))


def jensen_shannon_divergence(reference: ArrayLike, current: ArrayLike) -> Floats:
    """Return the divergence in bits (0 to 1) over the last axis of two arrays of shares, each summing to 1."""
    r, c = np.asarray(reference, dtype=np.float64), np.asarray(current, dtype=np.float64)
    middle = (r + c) / 2

    def towards_middle(share: Floats) -> Floats:
        with np.errstate(divide="ignore", invalid="ignore"):
            parts = np.where(share > 0, share * np.log2(share / middle), 0.0)
        return np.asarray(parts.sum(axis=-1))

    return np.clip((towards_middle(r) + towards_middle(c)) / 2, 0.0, 1.0)


def shares(counts: ArrayLike) -> Floats:
    """Return counts as shares over the last axis, none of them 0: half an observation is added to every class.

    Classes must be the same for both sides of a comparison; those that are empty on both sides should be left out.
    """
    smooth = np.asarray(counts, dtype=np.float64) + 0.5
    return np.asarray(smooth / smooth.sum(axis=-1, keepdims=True))


def benjamini_yekutieli(p_values: ArrayLike) -> Floats:
    """Return p-values adjusted for their number, valid for any dependence between the tests."""
    p = np.asarray(p_values, dtype=np.float64)
    count = len(p)
    if not count:
        return p
    order = np.argsort(p)
    harmonic = (1 / np.arange(1, count + 1)).sum()
    stepped = p[order] * count * harmonic / np.arange(1, count + 1)
    adjusted = np.empty(count)
    adjusted[order] = np.minimum(np.minimum.accumulate(stepped[::-1])[::-1], 1.0)
    return adjusted


def one_row_a_subject(sample: Sample, rng: np.random.Generator, like: Sample | None = None) -> Integers:
    """Return a row number for each subject, for at most :data:`MAX_SUBJECTS` of them.

    Args:
        sample: the rows.
        rng: decides.
        like: rows to resemble in time: each subject gives its row nearest, in days in the trial and in the time of day,
            to one of these rows drawn at random. A cohort that is later in its trial than the reference was, or seen
            at another hour, is then not taken for another population. None: any row.
    """
    subjects, codes = np.unique(sample.subjects, return_inverse=True)
    distance = np.zeros(sample.rows)
    if like is not None and like.rows and sample.rows:
        target = rng.integers(like.rows, size=len(subjects))[codes]
        if sample.days is not None and like.days is not None:
            distance += np.nan_to_num(np.abs(sample.days - like.days[target]), nan=_FAR)
        if sample.hours is not None and like.hours is not None:
            gap = np.abs(sample.hours - like.hours[target])
            # an hour apart counts as a day apart: many measurements follow the clock
            distance += np.nan_to_num(np.minimum(gap, 24 - gap), nan=12.0)
    order = np.lexsort((rng.random(sample.rows), distance, codes))
    return _thinned(order[_firsts(codes[order])], rng)


def resembling(reference: Sample, now: Sample, rng: np.random.Generator) -> tuple[Sample, bool]:
    """Return one reference row a subject to compare with the current rows, and whether they were matched in time.

    Rows drawn at random are taken where their days in the trial and times of day are distributed as those of `now`
    (Kolmogorov-Smirnov), else the ones nearest in time: matching favours early rows of subjects who left the trial.
    """
    drawn = reference.take(one_row_a_subject(reference, rng))
    for name in ("days", "hours"):
        then, here = getattr(drawn, name), getattr(now, name)
        if then is not None and here is not None and _kolmogorov_smirnov(then[:, None], here[:, None])[1][0] < ALPHA:
            return reference.take(one_row_a_subject(reference, rng, now)), True
    return drawn, False


def _firsts(sorted_codes: Integers) -> Integers:
    return np.flatnonzero(np.append(True, np.diff(sorted_codes) != 0)) if len(sorted_codes) else sorted_codes


def _thinned(rows: Integers, rng: np.random.Generator) -> Integers:
    return rows if len(rows) <= MAX_SUBJECTS else np.sort(rng.choice(rows, MAX_SUBJECTS, replace=False))


def compare(
    reference: Sample, current: Sample, *, seed: int = 0, alpha: float = ALPHA, bound: float = PSI_BOUND
) -> DataDrift:
    """Compare two populations over the reference's features.

    Args:
        reference: what the model was trained on.
        current: what there is now; features it lacks count as missing.
        seed: decides which row of each subject is compared; the same input and seed give the same result.
        alpha: false discovery rate over all features.
        bound: population stability index above which a significant difference is drift.
    """
    rng = np.random.default_rng(seed)
    now = current.select(reference.names)
    now = now.take(one_row_a_subject(now, rng))
    then, matched = resembling(reference, now, rng)
    moving = ageing(reference, then, now, rng) if matched else np.zeros(len(then.names), dtype=bool)
    return _compared(then, now, moving, alpha, bound)


def _compared(then: Sample, now: Sample, ageing: NDArray[np.bool_], alpha: float, bound: float) -> DataDrift:
    ref, cur = then.values, now.values
    if not len(ref) or not len(cur) or not then.names:
        return DataDrift((), len(ref), len(cur), alpha)
    edges, discrete = class_edges(ref)
    ref_counts, cur_counts = class_counts(ref, edges), class_counts(cur, edges)
    psi, divergence = _distances(ref_counts, cur_counts)
    distance, ks_p = _kolmogorov_smirnov(ref, cur)
    chi2, chi2_p = _chi_square(ref_counts[:, :-1], cur_counts[:, :-1])
    values_p = np.where(discrete, chi2_p, ks_p)
    missing_p = _fisher(ref_counts[:, -1], len(ref), cur_counts[:, -1], len(cur))
    p = np.minimum(1.0, 2 * np.minimum(values_p, missing_p))
    q = np.ones(len(p))
    q[~ageing] = benjamini_yekutieli(p[~ageing])
    drifted = (q < alpha) & (psi > bound) & ~ageing
    statistic = np.where(discrete, chi2, distance)
    ref_mean, cur_mean = _means(ref), _means(cur)
    return DataDrift(
        tuple(
            FeatureDrift(
                name=name,
                test="chi2" if discrete[i] else "ks",
                statistic=float(statistic[i]),
                p_value=float(p[i]),
                q_value=float(q[i]),
                psi=float(psi[i]),
                jensen_shannon=float(divergence[i]),
                missing_reference=float(ref_counts[i, -1] / len(ref)),
                missing_current=float(cur_counts[i, -1] / len(cur)),
                mean_reference=ref_mean[i],
                mean_current=cur_mean[i],
                ageing=bool(ageing[i]),
                drifted=bool(drifted[i]),
            )
            for i, name in enumerate(then.names)
        ),
        reference_rows=len(ref),
        current_rows=len(cur),
        alpha=alpha,
    )


def class_edges(reference: Floats) -> tuple[Floats, NDArray[np.bool_]]:
    """Return the upper edges (inclusive) of each feature's classes, and which features are discrete.

    Args:
        reference: rows x features, NaN where missing.

    Returns:
        features x 13 edges, padded with infinity: class k is (edge k-1, edge k], the last one open; and features.
        Discrete features have a class for every value and two for values beyond, others for every tenth of the
        reference.
    """
    features = reference.shape[1]
    edges = np.full((features, MAX_CATEGORIES + 1), np.inf)
    discrete = np.zeros(features, dtype=bool)
    ordered = np.sort(reference, axis=0)  # NaN last
    present = np.isfinite(ordered).sum(axis=0)
    for column in range(features):
        values = ordered[: present[column], column]
        if not len(values):
            discrete[column] = True
            continue
        distinct = values[np.append(True, np.diff(values) > 0)]
        if len(distinct) <= MAX_CATEGORIES:
            discrete[column] = True
            # values below the lowest and above the highest are new: they have classes of their own
            edges[column, 0] = np.nextafter(distinct[0], -np.inf)
            edges[column, 1 : len(distinct) + 1] = distinct
            continue
        cuts = values[(np.arange(1, BINS) * len(values)) // BINS]
        # a class of its own below a value that most rows have
        cuts = np.unique(np.where(cuts == distinct[-1], distinct[-2], cuts))
        edges[column, : len(cuts)] = cuts
    return edges, discrete


def class_counts(values: Floats, edges: Floats) -> Floats:
    """Return features x 15 counts: the 14 classes of :func:`class_edges`, then "missing"."""
    finite = np.isfinite(values)
    present = finite.sum(axis=0)
    below = np.stack([((values <= edges[:, k]) & finite).sum(axis=0) for k in range(edges.shape[1])], axis=1)
    classes = np.diff(np.column_stack([np.zeros_like(present), below, present]), axis=1)
    return np.column_stack([classes, len(values) - present]).astype(np.float64)


def _distances(ref_counts: Floats, cur_counts: Floats) -> tuple[Floats, Floats]:
    """Return PSI and Jensen-Shannon divergence of each feature, over the classes that are not empty on both sides."""
    used = (ref_counts + cur_counts) > 0

    def smoothed(counts: Floats) -> Floats:
        raised = np.where(used, counts + 0.5, 0.0)
        return np.asarray(raised / raised.sum(axis=1, keepdims=True))

    r, c = smoothed(ref_counts), smoothed(cur_counts)
    with np.errstate(divide="ignore", invalid="ignore"):
        psi = np.where(used, (c - r) * np.log(np.where(used, c, 1.0) / np.where(used, r, 1.0)), 0.0).sum(axis=1)
    raw_r = ref_counts / ref_counts.sum(axis=1, keepdims=True)
    raw_c = cur_counts / cur_counts.sum(axis=1, keepdims=True)
    return psi, jensen_shannon_divergence(raw_r, raw_c)


def _kolmogorov_smirnov(ref: Floats, cur: Floats) -> tuple[Floats, Floats]:
    """Return the two-sample distance of each feature and its asymptotic p-value; 0 and 1 without values."""
    from scipy.special import kolmogorov

    values = np.vstack([ref, cur])
    n, m = np.isfinite(ref).sum(axis=0), np.isfinite(cur).sum(axis=0)
    order = np.argsort(values, axis=0, kind="stable")
    ordered = np.take_along_axis(values, order, axis=0)
    step = np.where(order < len(ref), 1 / np.maximum(n, 1), -1 / np.maximum(m, 1))
    step[~np.isfinite(ordered)] = 0.0
    gap = np.abs(np.cumsum(step, axis=0))
    # between equal values the distribution functions are not defined
    gap[:-1][ordered[:-1] == ordered[1:]] = 0.0
    distance = gap.max(axis=0)
    scale = np.sqrt(n * m / np.maximum(n + m, 1))
    p = kolmogorov((scale + 0.12 + 0.11 / np.maximum(scale, 1e-9)) * distance)
    empty = (n == 0) | (m == 0)
    return np.where(empty, 0.0, distance), np.where(empty, 1.0, np.clip(p, 0.0, 1.0))


def _chi_square(ref_counts: Floats, cur_counts: Floats) -> tuple[Floats, Floats]:
    """Return chi-square of each feature and its p-value.

    Classes in which fewer than five are expected on a side are taken together; if five are still not expected in them,
    they are left out.
    """
    from scipy.special import chdtrc

    n, m = ref_counts.sum(axis=1, keepdims=True), cur_counts.sum(axis=1, keepdims=True)
    smaller = np.minimum(n, m) / np.maximum(n + m, 1)
    rare = (ref_counts + cur_counts) * smaller < _MIN_EXPECTED

    def pooled(counts: Floats) -> Floats:
        kept = np.where(rare, 0.0, counts)
        return np.column_stack([kept, np.where(rare, counts, 0.0).sum(axis=1)])

    r, c = pooled(ref_counts), pooled(cur_counts)
    few = (r[:, -1] + c[:, -1]) * smaller[:, 0] < _MIN_EXPECTED
    r[few, -1] = c[few, -1] = 0.0
    n, m = r.sum(axis=1, keepdims=True), c.sum(axis=1, keepdims=True)
    total = r + c
    with np.errstate(divide="ignore", invalid="ignore"):
        expected_r, expected_c = total * n / (n + m), total * m / (n + m)
        parts = (r - expected_r) ** 2 / expected_r + (c - expected_c) ** 2 / expected_c
    statistic = np.where(total > 0, np.nan_to_num(parts), 0.0).sum(axis=1)
    freedom = (total > 0).sum(axis=1) - 1
    p = np.where(freedom > 0, chdtrc(np.maximum(freedom, 1), statistic), 1.0)
    return statistic, np.asarray(p, dtype=np.float64)


def _fisher(ref_missing: Floats, n: int, cur_missing: Floats, m: int) -> Floats:
    """Return the two-sided (doubled) p-value of Fisher's exact test of the missing shares."""
    from scipy.stats import hypergeom

    total = ref_missing + cur_missing
    pairs = np.column_stack([total, cur_missing])
    distinct, back = np.unique(pairs, axis=0, return_inverse=True)  # few, and the function is slow
    law = hypergeom(n + m, distinct[:, 0].astype(np.int64), m)
    tail = np.minimum(law.cdf(distinct[:, 1]), law.sf(distinct[:, 1] - 1))
    return np.asarray(np.clip(2 * tail, 0.0, 1.0)[back.reshape(-1)], dtype=np.float64)


def _means(values: Floats) -> list[float | None]:
    finite = np.isfinite(values)
    count = finite.sum(axis=0)
    total = np.where(finite, values, 0.0).sum(axis=0)
    return [float(s / k) if k else None for s, k in zip(total, count, strict=True)]


def ageing(reference: Sample, then: Sample, now: Sample, rng: np.random.Generator) -> NDArray[np.bool_]:
    """Return which features move with time in the trial, by as much as the two sides differ in that.

    Days in the trial, cumulative counts and the like differ between any earlier and any later part of a trial. Where no
    reference rows are as late as the current ones, a feature that differs (PSI above 0.05, more than chance gives)
    between the reference rows compared and those as much earlier in the reference itself is such a one. So is a count
    over a window that reached back to the subjects' start in the reference rows and does not any more: what began
    with the trial (drugs, first tests) leaves it all at once, which no earlier rows could show. Where matching found
    rows of about the same time, nothing is left out.

    Args:
        reference: all of its rows.
        then: those compared, one a subject.
        now: the current rows compared.
        rng: decides which earlier rows are looked at.
    """
    none = np.zeros(len(reference.names), dtype=bool)
    if reference.days is None or then.days is None or now.days is None:
        return none
    known = np.isfinite(now.days), np.isfinite(then.days)
    if not known[0].any() or not known[1].any():
        return none
    mine, theirs = now.days[known[0]], then.days[known[1]]
    lag = float(mine.mean() - theirs.mean())
    if abs(lag) <= LAG_BOUND * float(np.sqrt((mine.var() + theirs.var()) / 2)):
        return none
    earlier = reference.take(one_row_a_subject(reference, rng, replace(then, days=then.days - lag)))
    edges, _ = class_edges(earlier.values)
    counts = class_counts(earlier.values, edges), class_counts(then.values, edges)
    psi, _ = _distances(*counts)
    classes = ((counts[0] + counts[1]) > 0).sum(axis=1)
    sampling = 1 / earlier.rows + 1 / then.rows
    # without a difference the index is about `sampling` times a chi-square variable
    chance, deviation = (classes - 1) * sampling, np.sqrt(2 * np.maximum(classes - 1, 0)) * sampling
    return np.asarray(psi - chance > np.maximum(AGEING_BOUND, 1.645 * deviation)) | _outgrown(reference, theirs, mine)


def _outgrown(reference: Sample, then: Floats, now: Floats) -> NDArray[np.bool_]:
    """Return which counts over a window had the subject's start in it `then` (days in the trial) and have not `now`."""
    windows = np.array([reference.counted_days.get(name, np.inf) for name in reference.names])
    truncated = [(days[:, None] < windows).mean(axis=0) for days in (then, now)]
    return np.asarray(truncated[0] - truncated[1] > TRUNCATED_BOUND)
