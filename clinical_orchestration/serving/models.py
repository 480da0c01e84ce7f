"""Fast single-row probabilities from scikit-learn and XGBoost estimators.

scikit-learn spends most of a single-row prediction on checking and wrapping: a forest of 200 trees takes some 14 ms for
a row, 1 ms of which is the trees. :func:`compiled` rebuilds what the known estimators compute from their fitted
parameters, without the wrapping. A rebuilt model is used only when it gives the same probabilities as the original on
probe rows, with and without missing values; every other model is asked through its own ``predict_proba``.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from clinical_orchestration.serving.ports import LoadedModel, ModelLoadError

_logger = logging.getLogger(__name__)

Matrix = NDArray[np.float64]
Predictor = Callable[[Matrix], Matrix]
"""Rows (n, features; NaN where missing) -> n probabilities of the event."""

TOLERANCE = 1e-6  # absolute; XGBoost and forests compute in single precision
_PROBES = 32
_FEW_ROWS = 8


class _NotKnownError(Exception):
    """There is no rebuilt form of this estimator."""


def served_model(
    estimator: Any,
    feature_names: Sequence[str],
    example: Matrix | None = None,
    *,
    trial: str = "",
    feature_set: str = "",
) -> LoadedModel:
    """Return an estimator in the form that serving asks.

    Args:
        estimator: a fitted classifier of two classes with ``predict_proba`` that takes a frame with `feature_names`.
        feature_names: the inputs in the order of the signature.
        example: rows of its input example.
        trial: the trial it was trained on, where known.
        feature_set: id of the feature set it was trained on, where known.

    Raises:
        ModelLoadError: it is no classifier of an event, or cannot answer its own example.
    """
    names = tuple(feature_names)
    if not hasattr(estimator, "predict_proba"):
        raise ModelLoadError(f"a {type(estimator).__name__} gives no probabilities")
    column = _event_column(estimator)
    if example is not None and example.shape[1:] != (len(names),):
        raise ModelLoadError("the input example does not fit the signature")
    _one_thread(estimator)
    probes = _probe_rows(example, len(names))
    by_frame = _through_frame(estimator, names, column)
    try:
        expected = by_frame(probes)
    except Exception as error:
        # perhaps it takes no missing values; then it must at least answer its example
        probes = np.zeros((1, len(names))) if example is None else example
        try:
            expected = by_frame(probes)
        except Exception:
            raise ModelLoadError(f"it does not answer its own input example ({type(error).__name__})") from error
    predict = by_frame
    for name, make in (("rebuilt", compiled), ("array", _through_array)):
        try:
            candidate = make(estimator, column)
            few = np.concatenate([candidate(probes[:1]), candidate(probes[1:8])])  # few rows may take another way
            if all(
                np.allclose(found, expected[: len(found)], rtol=0.0, atol=TOLERANCE, equal_nan=True)
                for found in (candidate(probes), few)
            ):
                predict = candidate
                break
            _logger.warning("the %s form of a %s answers otherwise and is not used", name, type(estimator).__name__)
        except _NotKnownError:
            continue
        except Exception as error:
            _logger.info("the %s form of a %s is not used: %s", name, type(estimator).__name__, type(error).__name__)
    return LoadedModel(names, predict, example, trial, feature_set)


def compiled(estimator: Any, column: int = 1) -> Predictor:
    """Return the rebuilt form of an estimator.

    Args:
        estimator: a fitted logistic regression (also after imputation and scaling), random forest, XGBoost
            classifier, or soft-voting ensemble of these.
        column: which column of ``predict_proba`` is the event.
    """
    kind = type(estimator).__name__
    if kind == "VotingClassifier" and estimator.voting == "soft":
        parts = [compiled(part, column) for part in estimator.estimators_]
        given = estimator._weights_not_none
        weights = np.full(len(parts), 1 / len(parts)) if given is None else np.asarray(given) / np.sum(given)

        def vote(rows: Matrix) -> Matrix:
            total = np.zeros(len(rows))
            for weight, part in zip(weights, parts, strict=True):
                total += weight * part(rows)
            return total

        return vote
    if kind == "Pipeline":
        steps = [_transform(step) for _, step in estimator.steps[:-1] if step not in (None, "passthrough")]
        last = compiled(estimator.steps[-1][1], column)

        def pipe(rows: Matrix) -> Matrix:
            for step in steps:
                rows = step(rows)
            return last(rows)

        return pipe
    if kind == "LogisticRegression":
        sign = 1.0 if column == 1 else -1.0
        weights, intercept = sign * estimator.coef_[0], sign * float(estimator.intercept_[0])

        def logistic(rows: Matrix) -> Matrix:
            with np.errstate(over="ignore"):
                answer: Matrix = 1.0 / (1.0 + np.exp(-(rows @ weights + intercept)))
            return answer

        return logistic
    if kind == "RandomForestClassifier":
        return _forest([tree.tree_ for tree in estimator.estimators_], column)
    if kind == "XGBClassifier" and len(estimator.classes_) == 2 and estimator.objective == "binary:logistic":
        booster = estimator.get_booster()
        limit = _iterations(estimator)

        def boosted(rows: Matrix) -> Matrix:
            event = booster.inplace_predict(rows, iteration_range=limit, validate_features=False).astype(np.float64)
            answer: Matrix = event if column == 1 else 1.0 - event
            return answer

        return boosted
    raise _NotKnownError(kind)


def _forest(trees: list[Any], column: int) -> Predictor:
    """Return the mean of scikit-learn's trees.

    For a few rows all trees are walked at once, level by level, in arrays that hold the nodes of all trees: a step of
    a few array operations replaces a call a tree. For many rows the trees' own loop in C is faster.
    """
    sizes = [tree.node_count for tree in trees]
    roots = np.concatenate([[0], np.cumsum(sizes)[:-1]]).astype(np.intp)
    leaf = np.concatenate([tree.children_left == -1 for tree in trees])
    own = np.arange(len(leaf), dtype=np.intp)
    left, right = (
        np.where(
            leaf, own, np.concatenate([getattr(tree, side) + root for tree, root in zip(trees, roots, strict=True)])
        )
        for side in ("children_left", "children_right")
    )
    children = np.stack([right, left], axis=1).ravel()  # at 2 * node + goes left
    threshold = np.concatenate([tree.threshold for tree in trees])
    missing_left = np.concatenate([tree.__getstate__()["nodes"]["missing_go_to_left"] for tree in trees]).astype(bool)
    # every row is laid out twice, with missing values as -inf, which goes left, and as NaN, which goes right
    width = trees[0].n_features
    feature = np.where(leaf, 0, np.concatenate([tree.feature for tree in trees]))
    feature = np.where(missing_left, feature, feature + width).astype(np.intp)
    value = np.concatenate([tree.value[:, 0, column] for tree in trees])
    levels = max(tree.max_depth for tree in trees)

    def forest(rows: Matrix) -> Matrix:
        single = np.ascontiguousarray(rows, dtype=np.float32)
        if len(rows) > _FEW_ROWS:
            total = np.zeros(len(rows))
            for tree in trees:
                total += tree.predict(single)[:, column]
            return total / len(trees)
        laid_out = np.concatenate([np.where(np.isnan(single), -np.inf, single), single], axis=1).ravel()
        node = np.tile(roots, (len(rows), 1))
        start = np.arange(0, len(laid_out), 2 * width, dtype=np.intp)[:, None]
        for _ in range(levels):
            goes_left = laid_out.take(feature.take(node) + start) <= threshold.take(node)
            node = children.take(2 * node + goes_left)
        answer: Matrix = value.take(node).mean(axis=1)
        return answer

    return forest


def _iterations(estimator: Any) -> tuple[int, int]:
    """Return the trees that the estimator itself would use: those up to the best, after early stopping."""
    best = getattr(estimator, "best_iteration", None) if estimator.early_stopping_rounds else None
    return (0, 0) if best is None else (0, int(best) + 1)


def _transform(step: Any) -> Predictor:
    kind = type(step).__name__
    if kind == "StandardScaler":
        mean = 0.0 if step.mean_ is None else step.mean_
        scale = 1.0 if step.scale_ is None else step.scale_
        return lambda rows: (rows - mean) / scale
    if kind == "SimpleImputer" and np.isscalar(step.missing_values) and np.isnan(step.missing_values):
        statistics = np.asarray(step.statistics_, dtype=np.float64)
        kept = np.ones(len(statistics), dtype=bool) if step.keep_empty_features else ~np.isnan(statistics)
        # an empty column that is kept is filled with zeros
        fill = np.where(np.isnan(statistics), 0.0, statistics)
        flagged = step.indicator_.features_ if step.add_indicator else None

        def impute(rows: Matrix) -> Matrix:
            missing = np.isnan(rows)
            filled = np.where(missing, fill, rows)[:, kept]
            return filled if flagged is None else np.hstack([filled, missing[:, flagged].astype(np.float64)])

        return impute
    raise _NotKnownError(kind)


def _through_frame(estimator: Any, names: tuple[str, ...], column: int) -> Predictor:
    import pandas as pd
    from sklearn import config_context

    def predict(rows: Matrix) -> Matrix:
        with config_context(assume_finite=True, skip_parameter_validation=True):
            answers = estimator.predict_proba(pd.DataFrame(rows, columns=list(names), copy=False))
        return np.asarray(answers, dtype=np.float64)[:, column]

    return predict


def _through_array(estimator: Any, column: int) -> Predictor:
    from sklearn import config_context

    # fitted on a frame and asked with an array in the same order: scikit-learn would warn once for each estimator
    warnings.filterwarnings("ignore", message="X does not have valid feature names", category=UserWarning)

    def predict(rows: Matrix) -> Matrix:
        with config_context(assume_finite=True, skip_parameter_validation=True):
            return np.asarray(estimator.predict_proba(rows), dtype=np.float64)[:, column]

    return predict


def _event_column(estimator: Any) -> int:
    classes = [str(name) for name in getattr(estimator, "classes_", [])]
    if len(classes) != 2:
        raise ModelLoadError(f"it tells {len(classes)} classes apart; an event model has two")
    for name in ("1", "1.0", "True"):
        if name in classes:
            return classes.index(name)
    raise ModelLoadError("none of its classes is 1, the event")


def _one_thread(estimator: Any, depth: int = 4) -> None:
    """Set ``n_jobs`` to 1 in an estimator and its fitted parts: starting threads for a row costs more than the row."""
    if getattr(estimator, "n_jobs", None) not in (None, 1):
        estimator.n_jobs = 1
        if hasattr(estimator, "get_booster"):
            estimator.get_booster().set_param({"nthread": 1})
    if depth == 0:
        return
    parts = list(getattr(estimator, "estimators_", []))
    parts += [part for _, part in getattr(estimator, "steps", [])]
    parts += [part for part in (getattr(estimator, "estimator", None),) if part is not None]
    parts += list(getattr(estimator, "calibrated_classifiers_", []))
    for part in parts[:50]:
        if not isinstance(part, str):
            _one_thread(part, depth - 1)


def _probe_rows(example: Matrix | None, width: int) -> Matrix:
    """Return rows around the example: as it is, varied, and with values missing; the same every time."""
    base = np.zeros(width) if example is None or not len(example) else np.nan_to_num(example[0])
    rng = np.random.default_rng(0)
    probes = base + rng.normal(size=(_PROBES, width)) * np.maximum(1.0, np.abs(base) * 0.3)
    probes[rng.random(probes.shape) < 0.2] = np.nan
    probes[0], probes[1] = base, np.nan
    return probes
