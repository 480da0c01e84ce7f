"""False alarms and power of the data drift detection, as a Markdown table.

    eval "$(./pipeline-manager.sh --env)"
    python -m benchmarks.drift [--trials 200] [--write docs/benchmarks/drift.md]

Works on the features of a running stack: run `clinical_data_pipeline` for the trials `cdisc-pilot` and `simulated`
first. `--features NAME=FILE.parquet` takes the rows of `gold/patient_features` from a file instead.

A trial draws subjects with replacement, each with all of its rows, once as the reference and once as the current
population. For false alarms both come from the same subjects unchanged; for detection 0.5 standard deviations (of the
latest value, over rows) are added to one vital sign of the second. An alarm is that of the whole set of features, as
the pipeline raises it; a shift is found when a feature of the shifted vital sign itself is named.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from clinical_orchestration.features.definitions import feature_names
from clinical_orchestration.monitoring.drift import PSI_BOUND, Sample, class_counts, class_edges, compare, shares
from clinical_orchestration.monitoring.drift import population_stability_index as stability
from clinical_orchestration.stores.feature_store import read_features
from clinical_orchestration.stores.tables import DeltaTableStore
from clinical_orchestration.trials import load_trial
from clinical_orchestration_tests.monitoring.populations import Population, shifted

N = 500


def population(trial: str, file: Path | None) -> Population:
    import polars as pl

    profile = load_trial(trial)
    rows = pl.read_parquet(file) if file else read_features(DeltaTableStore.from_settings(), profile)
    if rows.is_empty():
        raise SystemExit(f"no features of {trial}: ./pipeline-manager.sh --run clinical_data_pipeline --trial {trial}")
    names = tuple(name for name in feature_names(profile) if name in rows.columns)
    if "on_treatment" in names:
        rows = rows.filter(pl.col("on_treatment") == 1.0)
    first = pl.col("feature_time").min().over("patient_id")
    days = rows.select((pl.col("feature_time") - first).dt.total_seconds() / 86_400).to_series().to_numpy()
    subjects = np.unique(rows["patient_id"].to_numpy(), return_inverse=True)[1].reshape(-1)
    values = rows.select(pl.col(name).cast(pl.Float64) for name in names).to_numpy()
    hours = rows["feature_time"].dt.hour().cast(pl.Float64).to_numpy()
    return Population(trial, names, np.asarray(values, dtype=np.float64), subjects, days, hours)


def share_of(trials: int, alarm: Callable[[np.random.Generator, int], bool], first: int = 0) -> tuple[float, float]:
    """Return the share of trials with an alarm, and the mean seconds of one."""
    started = time.perf_counter()
    found = sum(alarm(np.random.default_rng(first + seed), seed) for seed in range(trials))
    return found / trials, (time.perf_counter() - started) / trials


def usual_alarm(reference: Sample, current: Sample) -> bool:
    """Return what is often done: every row, each feature by itself, KS below 0.05 or PSI above 0.2."""
    from scipy import stats

    edges, _ = class_edges(reference.values)
    sides = [class_counts(side.values, edges)[:, :-1] for side in (reference, current)]
    used = (sides[0] + sides[1]) > 0
    for number in range(len(reference.names)):
        a, b = reference.values[:, number], current.values[:, number]
        a, b = a[np.isfinite(a)], b[np.isfinite(b)]
        if len(a) and len(b) and stats.ks_2samp(a, b, method="asymp").pvalue < 0.05:
            return True
        if float(stability(shares(sides[0][number][used[number]]), shares(sides[1][number][used[number]]))) > PSI_BOUND:
            return True
    return False


def measure(people: Population, trials: int) -> list[tuple[str, str, str, str]]:
    print(f"\n{people.name}", flush=True)
    rows: list[tuple[str, str, str, str]] = []

    def add(what: str, share: float, seconds: float, wanted: str) -> None:
        rows.append((people.name, what, f"{share:.1%}", wanted))
        print(f"  {what}: {share:.1%} ({seconds:.3f} s a comparison) {wanted}", flush=True)

    for n in (N, 100):
        found = share_of(
            trials, lambda rng, seed, n=n: compare(people.draw(rng, n), people.draw(rng, n), seed=seed).has_drifted
        )
        add(f"false alarms, resamples of {n} subjects a side", *found, "≤ 5 %")
    add(
        "false alarms, random halves of the subjects",
        *share_of(trials, lambda rng, seed: compare(*people.halves(rng), seed=seed).has_drifted),
        "≤ 5 %",
    )
    add(
        "for comparison: all rows, each feature by itself, KS < 0.05 or PSI > 0.2 (20 trials)",
        *share_of(20, lambda rng, _: usual_alarm(people.draw(rng, N), people.draw(rng, N))),
        "",
    )
    for vital in load_trial(people.name).features.vitals:
        amount = 0.5 * people.standard_deviation(vital)

        def found_shift(rng: np.random.Generator, seed: int, vital: str = vital, amount: float = amount) -> bool:
            result = compare(people.draw(rng, N), shifted(people.draw(rng, N), vital, amount), seed=seed)
            return any(name.startswith(f"{vital}_") for name in result.drifted)

        add(
            f"{vital.replace('_', ' ')} shifted by 0.5 SD, found at n = {N}",
            *share_of(trials, found_shift, 10_000),
            "≥ 95 %",
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=200)
    parser.add_argument("--features", action="append", default=[], metavar="NAME=FILE")
    parser.add_argument("--write", type=Path)
    given = parser.parse_args()
    files = {name: Path(file) for name, _, file in (item.partition("=") for item in given.features)}
    rows, sizes = [], []
    for trial in ("cdisc-pilot", "simulated"):
        people = population(trial, files.get(trial))
        sizes.append(
            f"`{trial}` {len(np.unique(people.subjects))} subjects, {len(people.subjects):,} rows on treatment, "
            f"{len(people.names)} features"
        )
        rows += measure(people, given.trials)
    lines = ["| population | figure | share of trials | wanted |", "|---|---|--:|---|"]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    table = "\n".join(lines)
    print(f"\n{table}")
    if given.write:
        text = (
            "# Data drift\n\n"
            f"Measured with `python -m benchmarks.drift --trials {given.trials}` on the features of "
            f"{' and '.join(sizes)}. {' '.join((__doc__ or '').split('file instead.')[1].split())}\n\n{table}\n"
        )
        given.write.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
