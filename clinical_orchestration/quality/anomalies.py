"""Central statistical monitoring: what no single record shows, and one site against the others does.

Patients are the unit, not readings, because the readings of one patient resemble one another. Each statistic of a
patient (mean, variability, change over time, repeated readings) is compared between sites by a random-effects model
with robust estimates; each count of a site (outliers, rejected records, last digits) with that of the other sites. All
comparisons of a run share one false discovery rate (Benjamini and Hochberg 1995), and a difference must also be large
enough to matter. Methods: Venet et al., Clinical Trials 9 (2012) 705; Desmet et al., Statistics in Medicine 33 (2014)
5265; median absolute deviation and modified z-score: Iglewicz and Hoaglin (1993).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import polars as pl

FALSE_DISCOVERY_RATE = 0.005
MAD_TO_SD = 1.4826
"""Standard deviation of a normal distribution by its median absolute deviation."""

MIN_PATIENTS = 3
MIN_SITES = 4
MIN_READINGS = 8
"""Readings of a test that a patient needs before their spread says something."""

MIN_RUN = 10
"""Readings that a patient needs before repeated ones say something."""

PRIOR_TESTS = 4
"""From so many tests on, each borrows from the others how much sites differ."""

PRIOR_WEIGHT = 10.0
"""What the other tests count for, in degrees of freedom."""

SKEW = 1.5
"""A test is skewed when its upper 40 % of patients' means spread so many times as wide as its lower 40 %."""

BETWEEN_FLOOR = 0.25
"""Smallest variance between sites, as a share of what patients alone would make them differ."""

MEAN_FLOOR = 0.75
"""Smallest shrunken difference of a site's mean that matters, in standard deviations between patients."""

SPREAD_FLOOR = 0.4
"""Smallest difference of log variability that matters: a factor of 1.5."""

SHIFT_FLOOR = 0.75
"""Smallest change over time, beyond that of the other sites, that matters; standard deviations between patients."""

REPEAT_FLOOR = 0.2
"""Smallest difference in the share of readings that repeat the one before."""

DIGIT_FLOOR = 0.2
"""Smallest total variation distance between last digits that matters."""

DIGIT_READINGS = 100
OUTLIER_Z = 10.0
"""A reading so many robust standard deviations from its patient's median is an outlier."""

RATE_FACTOR = 3.0
"""A rate of rejected or outlying records matters from this many times that of the others."""

RATE_OFFSET = 0.005
STUCK_CHANCE = 1e-6
"""A run of equal readings is stuck when the chance of one in all series of the test is lower than this."""


@dataclass(frozen=True)
class Anomaly:
    """One conspicuous site, or test, with the figures that make it so.

    Attributes:
        rule: id in the rule table of the documentation.
        kind: ``mean``, ``variability``, ``shift``, ``repeats``, ``digits``, ``outliers``, ``rejected``, ``stuck``.
        table: the table.
        site: the site; None where the site is not known.
        test: test code, or field and reason of rejected records.
        observed: the site's figure.
        expected: that of the other sites.
        unit: what both figures are.
        n: patients or records that `observed` is of.
        p_value: chance of such a figure where all sites are alike.
        q_value: adjusted for all comparisons of the run.
        severity: ``warning`` or ``error``.
        description: one sentence for people.
    """

    rule: str
    kind: str
    table: str
    site: str | None
    test: str | None
    observed: float
    expected: float
    unit: str
    n: int
    p_value: float
    q_value: float = 1.0
    severity: str = "warning"
    description: str = ""

    def as_dict(self) -> dict[str, Any]:
        """Return it as plain JSON types."""
        return {
            "rule": self.rule,
            "kind": self.kind,
            "table": self.table,
            "site": self.site,
            "test": self.test,
            "observed": round(self.observed, 4),
            "expected": round(self.expected, 4),
            "unit": self.unit,
            "n": self.n,
            "q_value": float(f"{self.q_value:.3g}"),
            "severity": self.severity,
            "description": self.description,
        }


def detect(vitals: pl.DataFrame, labs: pl.DataFrame, rejections: pl.DataFrame, accepted: pl.DataFrame) -> list[Anomaly]:
    """Return the conspicuous sites of a trial, the surest first.

    Args:
        vitals: ``patient_id, site, event_time, test_code, value, original_value``.
        labs: the same columns, rows with a number.
        rejections: see :func:`.quarantine.rejections`.
        accepted: ``table, site, event_time`` of accepted records (not rows).
    """
    candidates: list[Anomaly] = []
    certain: list[Anomaly] = []
    for table, frame in (("patient_vitals", vitals), ("lab_results", labs)):
        rows = prepared(frame)
        if rows.is_empty():
            continue
        for compare in (compare_means, compare_variability, compare_shifts, compare_repeats, compare_digits):
            candidates += compare(table, rows)
        candidates += compare_outliers(table, rows)
        certain += stuck_series(table, rows)
    candidates += compare_rejections(rejections, accepted)
    found = [*significant(candidates), *certain]
    return sorted(found, key=lambda item: (item.severity != "error", item.q_value, item.table, str(item.site)))


def significant(candidates: list[Anomaly], rate: float = FALSE_DISCOVERY_RATE) -> list[Anomaly]:
    """Return those that hold at a false discovery rate, with their q-values.

    `candidates` must hold every comparison made, also those too small to matter (their `description` is empty): the
    number of comparisons is what is corrected for.
    """
    import numpy as np

    if not candidates:
        return []
    q_values = benjamini_hochberg(np.array([item.p_value for item in candidates]))
    return [
        replace(item, q_value=float(q))
        for item, q in zip(candidates, q_values, strict=True)
        if q <= rate and item.description
    ]


def benjamini_hochberg(p_values: np.ndarray) -> np.ndarray:
    """Return the q-values of p-values (Benjamini and Hochberg 1995, step-up)."""
    import numpy as np

    count = p_values.size
    order = np.argsort(p_values)
    scaled = p_values[order] * count / np.arange(1, count + 1)
    adjusted = np.minimum(1.0, np.minimum.accumulate(scaled[::-1])[::-1])
    out = np.empty(count)
    out[order] = adjusted
    return out


def prepared(frame: pl.DataFrame) -> pl.DataFrame:
    """Return the rows with a number and a site, in order of time, with the scaled residual from the patient's median.

    Adds ``centre`` (the patient's median), ``residual`` (reading minus centre) and ``scale`` (robust standard
    deviation of the residuals of the test over all patients, never 0).
    """
    import polars as pl

    key = ["patient_id", "test_code"]
    rows = frame.filter(
        pl.col("value").is_finite().fill_null(False) & pl.col("site").is_not_null() & pl.col("patient_id").is_not_null()
    ).sort("patient_id", "test_code", "event_time")
    rows = rows.with_columns(centre=pl.col("value").median().over(key))
    rows = rows.with_columns(residual=pl.col("value") - pl.col("centre"))
    mad = pl.col("residual").abs().median().over("test_code") * MAD_TO_SD
    # of rounded readings most residuals may be 0: then the mean absolute deviation (times 1.2533) is the scale
    mean = pl.col("residual").abs().mean().over("test_code") * 1.2533
    return rows.with_columns(scale=pl.when(mad > 0).then(mad).otherwise(mean)).filter(pl.col("scale") > 0)


def _site_comparison(
    patients: pl.DataFrame, make: Callable[[dict[str, Any]], Anomaly], floor: float, scaled: bool
) -> list[Anomaly]:
    """Compare a statistic of patients between sites, test by test.

    The site's mean of its patients' (winsorised) figures is compared with the centre of the sites. Its variance is
    the variance between patients over their number, plus the variance between sites beyond that: robust, so that the
    site that is looked for does not hide itself, and shrunken towards that of the table's other tests, because a
    handful of sites says little (as in Smyth, Stat. Appl. Genet. Mol. Biol. 3 (2004) 3). Degrees of freedom follow
    Satterthwaite. The difference is shrunken towards 0 by the number of patients before `floor` is applied.

    Args:
        patients: ``test_code, site, patient_id, figure``.
        make: makes the anomaly from ``test, site, observed, expected, effect, large, n, p_value``; its description is
            empty where the effect is not large.
        floor: smallest shrunken effect that is large.
        scaled: whether effects are in standard deviations between patients, else in the figure's own unit.
    """
    import numpy as np
    import polars as pl
    from scipy import stats

    tests = []
    for (test,), rows in patients.drop_nulls().sort("test_code", "site").group_by("test_code", maintain_order=True):
        sites = rows.group_by("site", maintain_order=True).agg(pl.col("figure"))
        groups = {
            str(site): np.asarray(figures, dtype=float)
            for site, figures in sites.iter_rows()
            if len(figures) >= MIN_PATIENTS
        }
        sigma = _spread(list(groups.values())) if len(groups) >= MIN_SITES else 0.0
        if sigma:
            means = np.array([_winsorised_mean(figures, sigma) for figures in groups.values()])
            sizes = np.array([figures.size for figures in groups.values()])
            usual = float(np.median(1.0 / sizes))
            # variance between sites, in units of that between patients
            between = max(0.0, _biweight_variance(means) / sigma**2 - usual)
            tests.append((str(test), list(groups), means, sizes, sigma, usual, between))
    prior = float(np.median([item[-1] for item in tests])) if len(tests) >= PRIOR_TESTS else 0.0
    weight = PRIOR_WEIGHT if len(tests) >= PRIOR_TESTS else 0.0
    found = []
    for test_code, names, means, sizes, sigma, usual, own in tests:
        df_sites = len(names) - 1 + weight
        between = ((len(names) - 1) * own + weight * prior) / df_sites
        # an estimate of 0 from a few sites is no proof that they are equal
        between = max(between, BETWEEN_FLOOR * usual)
        centre, df_patients = float(np.median(means)), float(sizes.sum() - sizes.size)
        for site, mean, size in zip(names, means, sizes, strict=True):
            total = 1.0 / size + between
            z = (mean - centre) / (sigma * np.sqrt(total))
            freedom = total**2 / ((1.0 / size) ** 2 / df_patients + between**2 / df_sites)
            shrunken = (mean - centre) / (sigma if scaled else 1.0) * size / (size + 2.0)
            found.append(
                make({
                    "test": test_code, "site": site, "observed": float(mean), "expected": centre,
                    "effect": float(shrunken), "large": abs(shrunken) >= floor, "n": int(size),
                    "p_value": float(2 * stats.t.sf(abs(z), df=freedom)),
                })
            )  # fmt: skip
    return found


def _spread(groups: list[np.ndarray]) -> float:
    """Return the robust standard deviation of figures around their site's median."""
    import numpy as np

    # around the median of its own few figures a site varies less than it does
    deviations = np.abs(
        np.concatenate(
            [(figures - np.median(figures)) * np.sqrt(figures.size / (figures.size - 1)) for figures in groups]
        )
    )
    return MAD_TO_SD * float(np.median(deviations)) or 1.2533 * float(np.mean(deviations))


def _winsorised_mean(figures: np.ndarray, sigma: float) -> float:
    import numpy as np

    middle = float(np.median(figures))
    return float(np.clip(figures, middle - 3 * sigma, middle + 3 * sigma).mean())


def _biweight_variance(values: np.ndarray) -> float:
    """Return the biweight midvariance (Mosteller and Tukey 1977) with tuning constant 6.

    Values beyond 6 median absolute deviations, such as the site that is looked for, count for nothing.
    """
    import numpy as np

    distance = values - np.median(values)
    mad = float(np.median(np.abs(distance)))
    if not mad:
        return 0.0
    u = distance / (6 * mad)
    near = np.abs(u) < 1
    top = float((distance[near] ** 2 * (1 - u[near] ** 2) ** 4).sum())
    bottom = float(((1 - u[near] ** 2) * (1 - 5 * u[near] ** 2)).sum())
    return values.size * top / bottom**2 if bottom else 0.0


def compare_means(table: str, rows: pl.DataFrame) -> list[Anomaly]:
    """Compare the patients' means between sites (DQ-AN-01); those of skewed tests on their logarithm."""
    import math

    import polars as pl

    patients = rows.group_by("test_code", "site", "patient_id").agg(pl.col("value").mean().alias("figure"))
    low, middle, high = (pl.col("figure").quantile(share).over("test_code") for share in (0.1, 0.5, 0.9))
    skewed = (pl.col("figure").min().over("test_code") > 0) & (high - middle > SKEW * (middle - low))
    patients = patients.with_columns(skewed=skewed)
    patients = patients.with_columns(
        figure=pl.when("skewed").then(pl.col("figure").log()).otherwise("figure")  # skewed tests by their logarithm
    )
    on_log_scale = set(patients.filter("skewed").get_column("test_code").unique().to_list())

    def make(item: dict[str, Any]) -> Anomaly:
        if item["test"] in on_log_scale:
            item = {**item, "observed": math.exp(item["observed"]), "expected": math.exp(item["expected"])}
        text = (
            f"{item['test']} at {item['site']} is {item['observed']:.4g} on average, "
            f"{item['expected']:.4g} at the other sites ({item['effect']:+.1f} SD)"
        )
        return _anomaly("DQ-AN-01", "mean", table, item, "mean of patients", text if item["large"] else "")

    return _site_comparison(patients, make, MEAN_FLOOR, scaled=True)


def compare_variability(table: str, rows: pl.DataFrame) -> list[Anomaly]:
    """Compare how much a patient's readings vary between sites (DQ-AN-02): too little is as conspicuous as too much."""
    import math

    import polars as pl

    spread = pl.col("residual").abs().mean() * 1.2533
    patients = (
        rows.group_by("test_code", "site", "patient_id")
        .agg(spread.alias("spread"), pl.len().alias("n"), pl.col("scale").first())
        .filter(pl.col("n") >= MIN_READINGS)
        # a twentieth of the usual spread stands for none
        .with_columns(figure=(pl.max_horizontal("spread", pl.col("scale") * 0.05)).log())
    )

    def make(item: dict[str, Any]) -> Anomaly:
        ratio = math.exp(item["observed"] - item["expected"])
        text = f"{item['test']} of a patient varies {ratio:.2g} times as much at {item['site']} as at the other sites"
        return _anomaly("DQ-AN-02", "variability", table, item, "log SD within patients", text if item["large"] else "")

    return _site_comparison(patients, make, SPREAD_FLOOR, scaled=False)


def compare_shifts(table: str, rows: pl.DataFrame) -> list[Anomaly]:
    """Compare the change from the first to the second half of the period between sites (DQ-AN-03)."""
    import polars as pl

    middle = rows.select(pl.col("event_time").min() + (pl.col("event_time").max() - pl.col("event_time").min()) / 2)
    late = pl.col("event_time") > middle.item()
    patients = (
        rows.group_by("test_code", "site", "patient_id")
        .agg(
            pl.col("value").filter(late).mean().alias("after"),
            pl.col("value").filter(~late).mean().alias("before"),
            late.sum().alias("n_after"),
            (~late).sum().alias("n_before"),
        )
        .filter((pl.col("n_after") >= 3) & (pl.col("n_before") >= 3))
        .with_columns(figure=pl.col("after") - pl.col("before"))
    )

    def make(item: dict[str, Any]) -> Anomaly:
        text = (
            f"{item['test']} at {item['site']} changed by {item['observed']:+.4g} in the second half of the period, "
            f"by {item['expected']:+.4g} at the other sites"
        )
        return _anomaly("DQ-AN-03", "shift", table, item, "change within patients", text if item["large"] else "")

    return _site_comparison(patients, make, SHIFT_FLOOR, scaled=True)


def compare_repeats(table: str, rows: pl.DataFrame) -> list[Anomaly]:
    """Compare the share of readings that repeat the patient's reading before (DQ-AN-04)."""
    import polars as pl

    same = pl.col("value") == pl.col("value").shift(1)
    patients = (
        rows.group_by("test_code", "site", "patient_id", maintain_order=True)
        .agg(same.mean().alias("figure"), pl.len().alias("n"))
        .filter(pl.col("n") >= MIN_RUN)
    )

    def make(item: dict[str, Any]) -> Anomaly:
        text = (
            f"{item['observed']:.0%} of the {item['test']} readings at {item['site']} repeat the patient's reading "
            f"before, {item['expected']:.0%} at the other sites"
        )
        return _anomaly("DQ-AN-04", "repeats", table, item, "share of repeated readings", text if item["large"] else "")

    return _site_comparison(patients, make, REPEAT_FLOOR, scaled=False)


def _anomaly(rule: str, kind: str, table: str, item: dict[str, Any], unit: str, text: str) -> Anomaly:
    return Anomaly(
        rule, kind, table, item["site"], item["test"], item["observed"], item["expected"], unit, item["n"],
        item["p_value"], description=text,
    )  # fmt: skip


def compare_digits(table: str, rows: pl.DataFrame) -> list[Anomaly]:
    """Compare the last digits of the readings as written with those of the other sites (DQ-AN-05).

    Chi-square with 9 degrees of freedom, divided by the median over the sites of its ratio to its expectation: habits
    that differ everywhere are no finding, and neither is the resemblance of a patient's readings.
    """
    import numpy as np
    import polars as pl
    from scipy import stats

    digits = rows.with_columns(
        text=pl.col("original_value").str.strip_chars()
    ).filter(pl.col("text").str.contains(r"^[0-9]+(\.[0-9]+)?$"))  # fmt: skip
    digits = digits.with_columns(
        # JSON writes 37.0 and 37 for the same reading: one place for a whole test
        places=pl.col("text").str.extract(r"\.([0-9]+)$").str.len_chars().fill_null(0).mode().first().over("test_code")
    )
    digits = digits.with_columns(
        digit=(pl.col("text").cast(pl.Float64) * pl.lit(10.0).pow(pl.col("places"))).round(0).cast(pl.Int64) % 10,
        width=pl.col("value").quantile(0.95).over("test_code") - pl.col("value").quantile(0.05).over("test_code"),
    )
    # the last digit is free only where readings spread over several tens of it
    digits = digits.filter(pl.col("width") * pl.lit(10.0).pow(pl.col("places")) >= 20)
    found = []
    for (test,), part in digits.sort("test_code").group_by("test_code", maintain_order=True):
        table_of = {
            str(site): np.bincount(np.asarray(values, dtype=int), minlength=10).astype(float)
            for site, values in part.group_by("site", maintain_order=True).agg(pl.col("digit")).iter_rows()
        }
        counts = {site: row for site, row in sorted(table_of.items()) if row.sum() >= DIGIT_READINGS}
        if len(counts) < MIN_SITES:
            continue
        total = np.sum(list(counts.values()), axis=0)
        figures = {}
        for site, row in counts.items():
            others = total - row + 0.5
            expected = others / others.sum() * row.sum()
            figures[site] = (
                float(((row - expected) ** 2 / expected).sum()),
                float(np.abs(row / row.sum() - others / others.sum()).sum() / 2),
            )
        inflation = max(1.0, float(np.median([chi for chi, _ in figures.values()])) / 8.34)
        for site, (chi, distance) in figures.items():
            n = int(counts[site].sum())
            others = (total - counts[site]) / (total - counts[site]).sum()
            odd = int(np.argmax(np.abs(counts[site] / n - others)))
            text = (
                f"The last digits of {test} at {site} differ from those of the other sites: "
                f"{counts[site][odd] / n:.0%} end in {odd}, {others[odd]:.0%} elsewhere"
            )
            found.append(
                Anomaly(
                    "DQ-AN-05", "digits", table, site, str(test), distance, 0.0, "distance between last digits", n,
                    float(stats.chi2.sf(chi / inflation, 9)), description=text if distance >= DIGIT_FLOOR else "",
                )
            )  # fmt: skip
    return found


def compare_outliers(table: str, rows: pl.DataFrame) -> list[Anomaly]:
    """Compare the share of readings far from their patient's median between sites (DQ-AN-06)."""
    import polars as pl

    far = (pl.col("residual") / pl.col("scale")).abs() > OUTLIER_Z
    counts = rows.group_by("test_code", "site").agg(far.sum().alias("hits"), pl.len().alias("n"))
    found = []
    for row in _rates(counts, ["test_code"]):
        text = (
            f"{row['hits']} of {row['n']} {row['test_code']} readings at {row['site']} are more than {OUTLIER_Z:.0f} "
            f"standard deviations from their patient's median ({row['rate']:.2%} at the other sites)"
        )
        found.append(
            Anomaly(
                "DQ-AN-06", "outliers", table, row["site"], row["test_code"], row["hits"] / row["n"], row["rate"],
                "share of readings", row["n"], row["p_value"], description=text if row["hits"] >= 3 else "",
            )
        )  # fmt: skip
    return found


def outlier_counts(rows: pl.DataFrame) -> pl.DataFrame:
    """Return ``test_code, readings, outliers, modified_z``: readings far from their patient's median, by test."""
    import polars as pl

    z = (pl.col("residual") / pl.col("scale")).abs()
    return (
        rows.group_by("test_code")
        .agg(pl.len().alias("readings"), (z > OUTLIER_Z).sum().alias("outliers"), z.max().alias("largest_z"))
        .sort("outliers", "test_code", descending=[True, False])
    )


def compare_rejections(rejections: pl.DataFrame, accepted: pl.DataFrame) -> list[Anomaly]:
    """Compare the share of rejected records, by reason and field, between sites and with the site's past (DQ-AN-07/08).

    A site whose thermometer reads Fahrenheit has few accepted temperatures and a normal mean: its fault is only here.
    """
    import polars as pl

    if rejections.is_empty() or accepted.is_empty():
        return []
    what = pl.concat_str(pl.col("rule"), pl.col("field").fill_null(""), separator=" ").str.strip_chars()
    known = rejections.filter(pl.col("site").is_not_null()).with_columns(what=what)
    records = known.unique(["table", "source_position", "what"])
    taken = accepted.filter(pl.col("site").is_not_null())
    hits = records.group_by("table", "what", "site").agg(pl.len().alias("hits"))
    totals = (
        pl.concat([
            taken.select("table", "site"),
            known.unique(["table", "source_position"]).select("table", "site"),
        ])
        .group_by("table", "site")
        .agg(pl.len().alias("n"))
    )  # fmt: skip
    grid = totals.join(hits.select("table", "what").unique(), on="table")
    counts = grid.join(hits, on=["table", "what", "site"], how="left").with_columns(pl.col("hits").fill_null(0))
    found = []
    for row in _rates(counts, ["table", "what"]):
        share = row["hits"] / row["n"]
        text = (
            f"{share:.1%} of the records of {row['site']} in {row['table']} are rejected as {row['what']}, "
            f"{row['rate']:.1%} at the other sites"
        )
        found.append(
            Anomaly(
                "DQ-AN-07", "rejected", row["table"], row["site"], row["what"], share, row["rate"],
                "share of records", row["n"], row["p_value"], severity="error" if share >= 0.1 else "warning",
                description=text if row["hits"] >= 5 else "",
            )
        )  # fmt: skip
    return found + _rejection_jumps(records, taken, known)


def _rejection_jumps(records: pl.DataFrame, accepted: pl.DataFrame, known: pl.DataFrame) -> list[Anomaly]:
    """Compare each site's last quarter of the period with its time before."""
    import polars as pl

    times = (
        pl.concat([accepted.select("event_time"), records.select("event_time")]).drop_nulls().get_column("event_time")
    )
    if times.is_empty():
        return []
    micros = times.dt.epoch("us")
    first, last = float(micros.quantile(0.001) or 0), float(micros.quantile(0.999) or 0)
    since = pl.lit(round(first + (last - first) * 0.75)).cast(pl.Datetime("us", "UTC"))
    late = (pl.col("event_time") > since).alias("late")
    every = pl.concat([
        accepted.select("table", "site", late),
        known.unique(["table", "source_position"]).select("table", "site", late),
    ])  # fmt: skip
    totals = every.drop_nulls().group_by("table", "site", "late").agg(pl.len().alias("n"))
    hits = records.with_columns(late).group_by("table", "what", "site", "late").agg(pl.len().alias("hits"))
    grid = totals.join(hits.select("table", "what").unique(), on="table")
    counts = grid.join(hits, on=["table", "what", "site", "late"], how="left").with_columns(pl.col("hits").fill_null(0))
    before = counts.filter(~pl.col("late")).drop("late")
    after = counts.filter("late").drop("late")
    found = []
    for row in after.join(before, on=["table", "what", "site"], suffix="_before").iter_rows(named=True):
        rate = (row["hits_before"] + 0.5) / (row["n_before"] + 1)
        p_value = _binomial_tail(row["hits"], row["n"], rate)
        share = row["hits"] / row["n"]
        text = (
            f"The share of records of {row['site']} in {row['table']} rejected as {row['what']} rose to {share:.1%} "
            f"in the last quarter of the period, from {rate:.1%} before"
        )
        found.append(
            Anomaly(
                "DQ-AN-08", "rejected", row["table"], row["site"], row["what"], share, rate, "share of records",
                row["n"], p_value, severity="error" if share >= 0.1 else "warning",
                description=text if row["hits"] >= 5 else "",
            )
        )  # fmt: skip
    return found


def _rates(counts: pl.DataFrame, keys: list[str]) -> list[dict[str, Any]]:
    """Return each site's ``hits`` of ``n`` with the rate of the other sites and the binomial p-value."""
    import polars as pl

    hits, n = pl.col("hits").sum().over(keys) - pl.col("hits"), pl.col("n").sum().over(keys) - pl.col("n")
    rows = counts.with_columns(rate=(hits + 0.5) / (n + 1.0), sites=pl.len().over(keys)).filter(pl.col("sites") > 1)
    return [
        {**row, "p_value": _binomial_tail(row["hits"], row["n"], row["rate"])}
        for row in rows.sort(*keys, "site").iter_rows(named=True)
    ]


def _binomial_tail(hits: int, n: int, rate: float) -> float:
    """Return the chance of at least `hits` in `n` at a rate that is already :data:`RATE_FACTOR` times as high."""
    from scipy import stats

    return float(stats.binom.sf(hits - 1, n, min(1.0, RATE_FACTOR * rate + RATE_OFFSET)))


def stuck_series(table: str, rows: pl.DataFrame) -> list[Anomaly]:
    """Find runs of equal readings that are too long for chance: a device that is stuck, or copied entries (DQ-AN-09).

    The chance that a reading repeats the one before is that of the patients who repeat most (95 % quantile); tests
    whose readings nearly always repeat cannot be judged.
    """
    import math

    import polars as pl

    key = ["test_code", "site", "patient_id"]
    changed = (pl.col("value") != pl.col("value").shift(1)).fill_null(True).over(key)
    runs = (
        rows.with_columns(run=changed.cast(pl.Int64).cum_sum().over(key))
        .group_by(*key, "run")
        .agg(pl.len().alias("length"), pl.col("event_time").min().alias("since"))
    )
    repeat = (
        rows.group_by(key, maintain_order=True)
        .agg((pl.col("value") == pl.col("value").shift(1)).mean().alias("share"), pl.len().alias("n"))
        .filter(pl.col("n") >= MIN_RUN)
        .group_by("test_code")
        .agg(pl.col("share").quantile(0.95).alias("chance"), pl.col("n").sum().alias("readings"))
    )
    found = []
    for test, chance, readings in repeat.sort("test_code").iter_rows():
        if chance is None or chance > 0.85:
            continue
        chance = max(chance, 0.05)
        limit = max(MIN_RUN, 1 + math.ceil(math.log(STUCK_CHANCE / readings) / math.log(chance)))
        long = runs.filter((pl.col("test_code") == test) & (pl.col("length") >= limit))
        for site, series, longest in (
            long.group_by("site").agg(pl.col("patient_id").n_unique(), pl.col("length").max()).sort("site").iter_rows()
        ):
            found.append(
                Anomaly(
                    "DQ-AN-09", "stuck", table, site, test, float(longest), float(limit), "equal readings in a row",
                    series, STUCK_CHANCE, STUCK_CHANCE, "warning",
                    f"{test} at {site} stays the same for up to {longest} readings in a row in {series} patients "
                    f"(at most {limit} by chance)",
                )
            )  # fmt: skip
    return found
