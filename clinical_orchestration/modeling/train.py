"""Candidate models, subject-grouped cross-validation, the choice between candidates and the final fit.

Pure: frames in, results out; nothing is stored here. No subject identifier leaves :class:`TrainingData`: the results
know subjects only as numbers, which is what folds and bootstrap need.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from clinical_orchestration.modeling.evaluate import Scores, score

if TYPE_CHECKING:
    import pandas as pd
    import polars as pl

Floats = NDArray[np.float64]
EstimatorFactory = Callable[[], Any]

TRAINING_CODE_VERSION = "1"
"""Changed whenever the same training set would give another model; part of the fingerprint."""

MEMBERS = ("logistic_regression", "random_forest", "xgboost")
ENSEMBLE = "ensemble"
GROUP_ATTRIBUTES = ("site", "sex", "arm")

MIN_ROWS = 60
MIN_EVENT_SUBJECTS_A_FOLD = 2
TIE = 0.005
"""Candidates whose AUROC is this close to the best are called equal, and AUPRC decides."""

# Regularised for about 2,000 rows, 200 correlated features and 8 rows a subject: strong ridge, large leaves, shallow
# and slow boosting. No class weights: they would shift every probability, and the promotion rule bounds the calibration
# error.
HYPER_PARAMETERS: dict[str, dict[str, float | int | str]] = {
    "logistic_regression": {"log_odds_variance": 0.4, "max_iter": 1000},
    "random_forest": {
        "n_estimators": 200, "min_samples_leaf": 12, "max_features": "sqrt", "sampled_share": 0.7, "sampled_rows": 6000,
    },
    "xgboost": {
        "n_estimators": 150, "max_depth": 2, "learning_rate": 0.05, "subsample": 0.7, "colsample_bytree": 0.3,
        "min_child_weight": 10, "reg_lambda": 10.0,
    },
}  # fmt: skip


Parameters = Mapping[str, Mapping[str, float | int | str]]
"""Hyper-parameters by member; those that are absent keep their default of :data:`HYPER_PARAMETERS`."""

_IMPORTANCE_ROWS = 2000  # held-out rows a fold that measure importance
_CELLS = 5_000_000  # of a matrix that is built on the way: 40 MB


class TrainingDataError(ValueError):
    """The rows cannot be trained on; the message says what is missing, in counts."""


def with_defaults(parameters: Parameters | None = None) -> dict[str, dict[str, float | int | str]]:
    """Return the hyper-parameters of every member: those given, else the default.

    Raises:
        ValueError: a member or a hyper-parameter is unknown.
    """
    merged = {member: dict(values) for member, values in HYPER_PARAMETERS.items()}
    for member, values in (parameters or {}).items():
        unknown = [name for name in values if name not in merged.get(member, {})]
        if member not in merged or unknown:
            raise ValueError(f"there is no hyper-parameter {member}.{unknown[0] if unknown else '*'}")
        merged[member].update(values)
    return merged


def hyper_parameters(parameters: Parameters | None = None) -> dict[str, str]:
    """Return every hyper-parameter as ``member.name`` -> text, for the experiment tracker and the fingerprint."""
    return {
        f"{member}.{name}": str(value)
        for member, values in with_defaults(parameters).items()
        for name, value in values.items()
    }


def parse_hyper_parameters(texts: Mapping[str, str]) -> dict[str, dict[str, float | int | str]]:
    """Return what :func:`hyper_parameters` wrote, as numbers where it were numbers; other entries are left out."""
    found: dict[str, dict[str, float | int | str]] = {}
    for key, text in texts.items():
        member, _, name = key.partition(".")
        default = HYPER_PARAMETERS.get(member, {}).get(name)
        if default is not None:
            found.setdefault(member, {})[name] = type(default)(text)
    return found


def candidates(
    seed: int, features: int = 200, rows: int = 2000, parameters: Parameters | None = None
) -> dict[str, EstimatorFactory]:
    """Return the candidate models by name; calling a value gives a new, unfitted scikit-learn estimator.

    All take missing values: the logistic regression imputes the median and adds an indicator a feature with gaps, the
    trees learn a side for them. The ensemble averages the probabilities of the three others (soft voting).

    Args:
        seed: Of everything random in the models.
        features: Number of features. The ridge of the logistic regression grows with it, so that the log odds have the
            same variance beforehand whether a trial has ten features or three hundred.
        rows: Number of rows. Each tree of the forest draws 70 % of them, at most 6,000, so that its time stays bounded.
        parameters: Hyper-parameters other than the defaults.

    Raises:
        ValueError: a hyper-parameter is unknown.
    """
    chosen = with_defaults(parameters)

    def logistic_regression() -> Any:
        from sklearn.impute import SimpleImputer
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import Pipeline
        from sklearn.preprocessing import StandardScaler

        own = chosen["logistic_regression"]
        ridge = float(own["log_odds_variance"]) / max(1, features)
        return Pipeline(
            [
                # a feature that is empty in a fold stays a column (of zeros), so that folds and final model agree
                ("impute", SimpleImputer(strategy="median", add_indicator=True, keep_empty_features=True)),
                ("scale", StandardScaler()),
                ("model", LogisticRegression(C=ridge, max_iter=int(own["max_iter"]), random_state=seed)),
            ]
        )

    def random_forest() -> Any:
        from sklearn.ensemble import RandomForestClassifier

        own: dict[str, Any] = dict(chosen["random_forest"])
        share = min(float(own.pop("sampled_share")), float(own.pop("sampled_rows")) / max(1, rows))
        return RandomForestClassifier(random_state=seed, n_jobs=_cores(), max_samples=share, **own)

    def xgboost() -> Any:
        from xgboost import XGBClassifier

        # one thread: at this size faster than two, and the sums do not depend on the machine's core count
        return XGBClassifier(
            random_state=seed, n_jobs=1, tree_method="hist", objective="binary:logistic",
            **chosen["xgboost"],
        )  # fmt: skip

    def ensemble() -> Any:
        from sklearn.ensemble import VotingClassifier

        return VotingClassifier(
            [
                ("logistic_regression", logistic_regression()),
                ("random_forest", random_forest()),
                ("xgboost", xgboost()),
            ],
            voting="soft",
        )

    return {
        "logistic_regression": logistic_regression,
        "random_forest": random_forest,
        "xgboost": xgboost,
        ENSEMBLE: ensemble,
    }


def _cores() -> int:
    return min(4, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1))


@dataclass(frozen=True)
class TrainingData:
    """Training rows as arrays, in one order whatever the order of the frame (by subject, then feature time).

    Attributes:
        features: Rows x features, NaN where missing.
        labels: 0 or 1 a row.
        subjects: Number of the subject of each row, 0 to n - 1.
        groups: Values of site, sex and arm, "" where unknown; only the columns the frame has.
    """

    feature_names: tuple[str, ...]
    features: Floats
    labels: NDArray[np.int8]
    subjects: NDArray[np.int64]
    groups: dict[str, NDArray[np.str_]]

    @classmethod
    def from_frame(cls, frame: pl.DataFrame, feature_names: Sequence[str]) -> TrainingData:
        """Take the rows of `frame`: columns patient_id, feature_time, label (0/1), the features, and site, sex, arm if
        there.

        Raises:
            TrainingDataError: columns are missing, a label is neither 0 nor 1, or a feature is infinite.
        """
        import polars as pl

        if not feature_names:
            raise TrainingDataError("no features are named")
        wanted = ["patient_id", "feature_time", "label", *feature_names]
        missing = [name for name in wanted if name not in frame.columns]
        if missing:
            raise TrainingDataError(f"the training rows lack {len(missing)} columns, such as {', '.join(missing[:5])}")
        ordered = frame.sort("patient_id", "feature_time")
        matrix = ordered.select(pl.col(list(feature_names)).cast(pl.Float64)).fill_null(float("nan")).to_numpy()
        infinite = np.isinf(matrix).any(axis=0)
        if infinite.any():
            names = [name for name, bad in zip(feature_names, infinite, strict=True) if bad]
            raise TrainingDataError(f"{len(names)} features have infinite values, such as {', '.join(names[:5])}")
        if ordered["label"].null_count() or not ordered["label"].is_in([0, 1]).all():
            raise TrainingDataError("every label must be 0 or 1")
        subjects = np.unique(ordered["patient_id"].cast(pl.String).to_numpy(), return_inverse=True)[1]
        return cls(
            feature_names=tuple(feature_names),
            features=np.ascontiguousarray(matrix, dtype=np.float64),
            labels=ordered["label"].cast(pl.Int8).to_numpy().astype(np.int8),
            subjects=subjects.reshape(-1).astype(np.int64),
            groups={
                name: ordered[name].cast(pl.String).fill_null("").to_numpy().astype(np.str_)
                for name in GROUP_ATTRIBUTES
                if name in ordered.columns
            },
        )

    @property
    def rows(self) -> int:
        """Number of training rows."""
        return len(self.labels)

    def frame(self, rows: NDArray[Any] | slice = slice(None)) -> pd.DataFrame:
        """Return features of some rows with their names, the shape in which models are fitted and asked."""
        import pandas as pd

        return pd.DataFrame(self.features[rows], columns=list(self.feature_names), copy=True)

    def digest(self) -> str:
        """Return a SHA-256 over names, values, labels and subject numbering: equal rows, equal digest.

        Values count in single precision: an engine that adds up in parallel may give another last digit next time,
        which is no other training set.
        """
        sha = hashlib.sha256(json.dumps(self.feature_names).encode())
        with np.errstate(over="ignore"):
            values = self.features.astype(np.float32) + np.float32(0)  # -0 becomes 0
        values[np.isnan(values)] = np.nan
        for array in (values, self.labels, self.subjects):
            sha.update(np.ascontiguousarray(array).tobytes())
        return sha.hexdigest()

    def typical_row(self) -> pd.DataFrame:
        """Return one row of medians, an input example that is nobody's data (0 where a feature is always missing)."""
        import pandas as pd

        seen = ~np.isnan(self.features).all(axis=0)
        medians = np.zeros(len(self.feature_names))
        medians[seen] = np.nanmedian(self.features[:, seen], axis=0)
        return pd.DataFrame([np.round(medians, 4)], columns=list(self.feature_names))


def fingerprint(
    data: TrainingData, *, trial: str, seed: int, folds: int, extra: Mapping[str, Any] | None = None
) -> str:
    """Return a SHA-256 of everything that determines a model: equal fingerprints, equal models.

    Made of the training rows, the trial, features, hyper-parameters, seed, folds, the code version and the versions of
    the libraries that fit the models, and of `extra`: JSON-ready values of whatever else decides, such as a search.
    """
    from importlib.metadata import version

    libraries = {"scikit-learn": version("scikit-learn"), "xgboost": _xgboost_version()}
    parts: dict[str, Any] = {
        "rows": data.digest(), "trial": trial, "seed": seed, "folds": folds, "code": TRAINING_CODE_VERSION,
        "parameters": hyper_parameters(), "libraries": libraries,
    }  # fmt: skip
    if extra:
        parts["extra"] = dict(extra)
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _xgboost_version() -> str:
    """Return XGBoost's version, whichever of its two distributions is installed."""
    from importlib.metadata import PackageNotFoundError, version

    for name in ("xgboost-cpu", "xgboost"):
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return "missing"


@dataclass(frozen=True)
class FeatureImportance:
    """Drop in AUROC when a feature is shuffled among held-out rows: mean and standard deviation over folds."""

    feature: str
    drop: float
    deviation: float


@dataclass(frozen=True)
class CrossValidation:
    """Out-of-fold probabilities of every candidate, and what follows from them.

    Attributes:
        labels, subjects, groups: Of each row, as in :class:`TrainingData`.
        fold: The fold (0 to folds - 1) in which a row was held out; all rows of a subject share one.
        probabilities: Candidate -> probability of the event a row, from models that never saw the row's subject.
        scores: Candidate -> metrics of those probabilities over all rows.
        chosen: The candidate that :func:`choose` picks.
        auroc_without_choice: AUROC when, for each fold, the candidate is chosen on the other folds: what remains once
            the optimism of picking the best of several on the same rows is taken away.
        importance: Of the chosen candidate, strongest first.
    """

    seed: int
    folds: int
    feature_names: tuple[str, ...]
    labels: NDArray[np.int8]
    subjects: NDArray[np.int64]
    groups: dict[str, NDArray[np.str_]]
    fold: NDArray[np.int8]
    probabilities: dict[str, Floats]
    scores: dict[str, Scores]
    chosen: str
    auroc_without_choice: float | None
    importance: tuple[FeatureImportance, ...] = field(repr=False)

    @property
    def chosen_probabilities(self) -> Floats:
        """Out-of-fold probabilities of the chosen candidate."""
        return self.probabilities[self.chosen]

    def metrics(self) -> dict[str, float]:
        """Return each candidate's metrics as ``candidate/<name>/<metric>``, and the AUROC without choice."""
        flat = {
            f"candidate/{name}/{metric}": float(getattr(scores, metric))
            for name, scores in self.scores.items()
            for metric in ("auroc", "auprc", "brier", "ece")
        }
        if self.auroc_without_choice is not None:
            flat["auroc_without_choice"] = self.auroc_without_choice
        return flat

    def to_bytes(self) -> bytes:
        """Return the result as a compressed ``.npz``, without subject identifiers, for another step to evaluate."""
        buffer = io.BytesIO()
        arrays: dict[str, Any] = {f"group:{name}": values for name, values in self.groups.items()}
        arrays |= {f"probability:{name}": values for name, values in self.probabilities.items()}
        head = {
            "seed": self.seed, "folds": self.folds, "feature_names": self.feature_names, "chosen": self.chosen,
            "auroc_without_choice": self.auroc_without_choice,
            "scores": {name: vars(scores) for name, scores in self.scores.items()},
            "importance": [vars(item) for item in self.importance],
        }  # fmt: skip
        np.savez_compressed(
            buffer,
            head=np.frombuffer(json.dumps(head).encode(), dtype=np.uint8),
            labels=self.labels,
            subjects=self.subjects,
            fold=self.fold,
            **arrays,
        )
        return buffer.getvalue()

    @classmethod
    def from_bytes(cls, data: bytes) -> CrossValidation:
        """Read what :meth:`to_bytes` wrote.

        Raises:
            ValueError: the bytes are something else.
        """
        try:
            with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
                head = json.loads(arrays["head"].tobytes())
                return cls(
                    seed=head["seed"],
                    folds=head["folds"],
                    feature_names=tuple(head["feature_names"]),
                    labels=arrays["labels"],
                    subjects=arrays["subjects"],
                    groups={name[6:]: arrays[name] for name in arrays.files if name.startswith("group:")},
                    fold=arrays["fold"],
                    probabilities={name[12:]: arrays[name] for name in arrays.files if name.startswith("probability:")},
                    scores={name: Scores(**values) for name, values in head["scores"].items()},
                    chosen=head["chosen"],
                    auroc_without_choice=head["auroc_without_choice"],
                    importance=tuple(FeatureImportance(**item) for item in head["importance"]),
                )
        except (KeyError, TypeError, ValueError, OSError, EOFError) as error:
            raise ValueError(f"no stored cross-validation: {type(error).__name__}") from None


def choose(scores: Mapping[str, Scores]) -> str:
    """Return the candidate to use.

    Rule: highest AUROC wins; those within 0.005 of it are equal, and among them the highest AUPRC wins, then the lowest
    Brier score, then the name.

    Raises:
        ValueError: there is no candidate.
    """
    if not scores:
        raise ValueError("there is no candidate to choose from")
    best = max(item.auroc for item in scores.values())
    equal = [name for name, item in scores.items() if item.auroc >= best - TIE]
    return min(equal, key=lambda name: (-scores[name].auprc, scores[name].brier, name))


def assign_folds(data: TrainingData, seed: int, folds: int) -> NDArray[np.int8]:
    """Return the fold of each row: stratified by label, all rows of a subject in one fold, the same for the same seed.

    Raises:
        TrainingDataError: too few rows, one class only, fewer subjects than folds, or too few subjects with the event.
    """
    from sklearn.model_selection import StratifiedGroupKFold

    if folds < 2:
        raise TrainingDataError(f"{folds} folds; at least 2 are needed")
    if data.rows < MIN_ROWS:
        raise TrainingDataError(f"{data.rows} training rows; at least {MIN_ROWS} are needed")
    events = int(data.labels.sum())
    if events in (0, data.rows):
        raise TrainingDataError(f"{events} of {data.rows} rows have the event: both outcomes are needed")
    subjects = len(np.unique(data.subjects))
    if subjects < folds:
        raise TrainingDataError(f"{subjects} subjects for {folds} folds; each fold needs its own")
    for outcome, name in ((1, "with the event"), (0, "without the event")):
        having = len(np.unique(data.subjects[data.labels == outcome]))
        if having < folds * MIN_EVENT_SUBJECTS_A_FOLD:
            raise TrainingDataError(
                f"{having} subjects have rows {name}; {folds} folds need {folds * MIN_EVENT_SUBJECTS_A_FOLD}"
            )
    fold = np.zeros(data.rows, dtype=np.int8)
    splitter = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
    for number, (_, held_out) in enumerate(splitter.split(data.features, data.labels, data.subjects)):
        fold[held_out] = number
    for number in range(folds):
        outcomes = np.unique(data.labels[fold != number])
        if len(outcomes) < 2 or not (fold == number).any():
            raise TrainingDataError("the subjects cannot be split into folds that each hold both outcomes")
    return fold


def cross_validate(
    data: TrainingData | pl.DataFrame,
    feature_names: Sequence[str] | None = None,
    seed: int = 0,
    folds: int = 5,
    *,
    importances: int = 25,
    parameters: Parameters | None = None,
) -> CrossValidation:
    """Fit every candidate on each set of training folds and keep its probabilities for the held-out subjects.

    The members are fitted once a fold; the ensemble is the mean of their probabilities, which is what soft voting
    computes.

    Args:
        data: Training rows; a frame is taken in by :meth:`TrainingData.from_frame`.
        feature_names: Features to use; only with a frame.
        seed: Of folds and models. The same data and seed give the same result.
        folds: Number of folds.
        importances: How many features get a permutation importance (those the members rank highest on training folds).
        parameters: Hyper-parameters other than the defaults.

    Raises:
        TrainingDataError: the rows do not allow it.
    """
    if not isinstance(data, TrainingData):
        data = TrainingData.from_frame(data, feature_names or ())
    fold = assign_folds(data, seed, folds)
    factories = candidates(seed, len(data.feature_names), data.rows, parameters)
    probabilities = {name: np.zeros(data.rows) for name in MEMBERS}
    fitted: list[dict[str, Any]] = []
    with _one_thread_each():
        for number in range(folds):
            inside, outside = fold != number, fold == number
            models = {}
            for name in MEMBERS:
                model = _single_threaded(factories[name]().fit(data.features[inside], data.labels[inside]))
                probabilities[name][outside] = model.predict_proba(data.features[outside])[:, 1]
                models[name] = model
            fitted.append(models)
    probabilities[ENSEMBLE] = np.mean([probabilities[name] for name in MEMBERS], axis=0)
    probabilities = {name: np.clip(values, 0.0, 1.0) for name, values in probabilities.items()}
    scores = {name: score(data.labels, values) for name, values in probabilities.items()}
    chosen = choose(scores)
    return CrossValidation(
        seed=seed,
        folds=folds,
        feature_names=data.feature_names,
        labels=data.labels,
        subjects=data.subjects,
        groups=data.groups,
        fold=fold,
        probabilities=probabilities,
        scores=scores,
        chosen=chosen,
        auroc_without_choice=_without_choice(data.labels, probabilities, fold),
        importance=_importance(data, fold, fitted, MEMBERS if chosen == ENSEMBLE else (chosen,), seed, importances),
    )


def _without_choice(
    labels: NDArray[np.int8], probabilities: Mapping[str, Floats], fold: NDArray[np.int8]
) -> float | None:
    """Return the AUROC of probabilities whose candidate is, fold by fold, chosen on the other folds."""
    mixed = np.zeros(len(labels))
    for number in np.unique(fold):
        others = fold != number
        if len(np.unique(labels[others])) < 2:
            return None
        chosen = choose({name: score(labels[others], values[others]) for name, values in probabilities.items()})
        mixed[~others] = probabilities[chosen][~others]
    return score(labels, mixed).auroc


def _importance(
    data: TrainingData, fold: NDArray[np.int8], fitted: list[dict[str, Any]], members: Sequence[str], seed: int,
    top: int,
) -> tuple[FeatureImportance, ...]:  # fmt: skip
    """Return permutation importances on held-out rows.

    Which features are looked at is decided by what the members weigh on their training folds, so that the held-out rows
    only measure. Rows are shuffled within a fold, with models that never saw the fold's subjects.
    """
    width = data.features.shape[1]
    weight = np.zeros(width)
    for models in fitted:
        for name in members:
            own = _model_weights(models[name], width)
            weight += own / max(own.sum(), 1e-12)
    looked_at = np.argsort(-weight, kind="stable")[: min(top, width)]
    rng = np.random.default_rng(seed)
    drops: list[Floats] = []
    for number, models in enumerate(fitted):
        rows, labels = data.features[fold == number], data.labels[fold == number]
        if len(rows) > _IMPORTANCE_ROWS:
            drawn = np.sort(rng.choice(len(rows), _IMPORTANCE_ROWS, replace=False))
            rows, labels = rows[drawn], labels[drawn]
        if len(np.unique(labels)) < 2:
            continue
        ask = _asker([models[name] for name in members])
        base = score(labels, ask(rows)).auroc
        block = max(1, _CELLS // (len(rows) * width))  # many features in one call, within bounded memory
        areas: list[float] = []
        for start in range(0, len(looked_at), block):
            columns = looked_at[start : start + block]
            shuffled = np.repeat(rows[None], len(columns), axis=0)
            for position, column in enumerate(columns):
                shuffled[position, :, column] = rows[rng.permutation(len(rows)), column]
            answers = ask(shuffled.reshape(-1, width)).reshape(len(columns), len(rows))
            areas += [score(labels, answer).auroc for answer in answers]
        drops.append(base - np.array(areas))
    if not drops:
        return ()
    mean_drop, deviation = np.mean(drops, axis=0), np.std(drops, axis=0)
    found = [
        FeatureImportance(data.feature_names[column], float(mean_drop[i]), float(deviation[i]))
        for i, column in enumerate(looked_at)
    ]
    return tuple(sorted(found, key=lambda item: (-item.drop, item.feature)))


def _asker(models: Sequence[Any]) -> Callable[[Floats], Floats]:
    """Return what gives the mean probability of several models."""

    def ask(rows: Floats) -> Floats:
        mean: Floats = np.mean([model.predict_proba(rows)[:, 1] for model in models], axis=0, dtype=np.float64)
        return np.asarray(np.clip(mean, 0.0, 1.0), dtype=np.float64)

    return ask


def _model_weights(model: Any, width: int) -> Floats:
    """Return how much a fitted member uses each feature: impurity or gain for trees, absolute coefficients else."""
    if hasattr(model, "feature_importances_"):
        return np.nan_to_num(np.asarray(model.feature_importances_, dtype=np.float64))
    return np.asarray(np.abs(model[-1].coef_[0][:width]), dtype=np.float64)


@contextmanager
def _one_thread_each() -> Iterator[None]:
    """Keep linear algebra and OpenMP to one thread.

    At this size their threads wait for each other more than they compute, and a sum then depends on their number. The
    forest is not affected: it grows its trees in threads of its own.
    """
    import sklearn.linear_model  # noqa: F401 - only libraries that are loaded can be limited
    import xgboost  # noqa: F401
    from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

    with threadpool_limits(limits=1):
        yield


def _single_threaded(estimator: Any) -> Any:
    """Let a fitted model answer in one thread.

    A forest adds up its trees in the order in which threads finish, which changes the last digit from call to call.
    """
    for part in [estimator, *getattr(estimator, "named_estimators_", {}).values()]:
        if isinstance(getattr(part, "n_jobs", None), int):
            part.set_params(n_jobs=1)
    return estimator


@dataclass(frozen=True)
class FittedModel:
    """A model fitted on all rows; `estimator` takes a frame with the feature names as columns, in this order."""

    name: str
    estimator: Any
    feature_names: tuple[str, ...]
    rows: int
    subjects: int

    def probabilities(self, rows: pd.DataFrame) -> Floats:
        """Return the probability of the event for each row."""
        return np.asarray(self.estimator.predict_proba(rows[list(self.feature_names)])[:, 1], dtype=np.float64)


def fit_final(
    data: TrainingData | pl.DataFrame,
    feature_names: Sequence[str] | None = None,
    name: str = ENSEMBLE,
    seed: int = 0,
    *,
    parameters: Parameters | None = None,
) -> FittedModel:
    """Fit the candidate `name` on all rows.

    The returned estimator uses one thread: for the single rows that serving asks about, starting threads costs more.

    Raises:
        TrainingDataError: one outcome only, or too few rows.
        ValueError: there is no such candidate.
    """
    if not isinstance(data, TrainingData):
        data = TrainingData.from_frame(data, feature_names or ())
    factories = candidates(seed, len(data.feature_names), data.rows, parameters)
    if name not in factories:
        raise ValueError(f"there is no candidate {name!r}; there are {', '.join(factories)}")
    if data.rows < MIN_ROWS:
        raise TrainingDataError(f"{data.rows} training rows; at least {MIN_ROWS} are needed")
    if not 0 < int(data.labels.sum()) < data.rows:
        raise TrainingDataError("both outcomes are needed; one is absent")
    with _one_thread_each():
        estimator = factories[name]().fit(data.frame(), data.labels.astype(np.int64))
    return FittedModel(name, _single_threaded(estimator), data.feature_names, data.rows, len(np.unique(data.subjects)))
