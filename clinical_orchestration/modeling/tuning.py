"""Search for hyper-parameters: seeded, on folds of whole subjects, pruned, and bounded in trials and time.

Each member is searched by itself with Optuna's TPE sampler (Bergstra et al. 2011) on the log loss of out-of-fold
probabilities: a proper score, so that what wins is well calibrated too. A trial that is worse than the median of the
earlier ones after the same number of folds is pruned. The defaults are the first trial, so that a search never ends
with something worse on these folds.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from clinical_orchestration.modeling.train import (
    HYPER_PARAMETERS,
    MEMBERS,
    Floats,
    TrainingData,
    _one_thread_each,
    assign_folds,
    candidates,
)
from clinical_orchestration.transforms.plotting import BLUE, GREY, ORANGE, png

if TYPE_CHECKING:
    import optuna
    from numpy.typing import NDArray

Value = float | int | str
_CLIP = 1e-6

# member -> hyper-parameter -> (kind, low, high): ranges around the defaults that rows of this size support
SEARCHED: dict[str, dict[str, tuple[str, float, float]]] = {
    "logistic_regression": {"log_odds_variance": ("log", 0.02, 8.0)},
    "random_forest": {
        "n_estimators": ("int", 100, 300),
        "min_samples_leaf": ("int", 3, 40),
        "sampled_share": ("float", 0.4, 0.95),
    },
    "xgboost": {
        "n_estimators": ("int", 60, 400),
        "max_depth": ("int", 1, 5),
        "learning_rate": ("log", 0.01, 0.2),
        "subsample": ("float", 0.5, 1.0),
        "colsample_bytree": ("float", 0.15, 0.9),
        "min_child_weight": ("int", 1, 30),
        "reg_lambda": ("log", 0.5, 50.0),
    },
}


@dataclass(frozen=True)
class Trial:
    """One set of hyper-parameters: its out-of-fold log loss, or the last one before it was pruned."""

    member: str
    number: int
    state: str
    loss: float | None
    parameters: dict[str, Value]
    seconds: float


@dataclass(frozen=True)
class Search:
    """What a search found.

    Attributes:
        parameters: member -> the best hyper-parameters, complete.
        trials: in the order in which they ran.
        best: member -> lowest loss.
        default: member -> loss of the defaults.
        stopped_by_time: whether the time ran out before the trials did.
    """

    seed: int
    folds: int
    parameters: dict[str, dict[str, Value]]
    trials: tuple[Trial, ...]
    best: dict[str, float]
    default: dict[str, float]
    stopped_by_time: bool
    seconds: float

    def metrics(self) -> dict[str, float]:
        """Return counts and losses as ``hpo/...``."""
        pruned = sum(trial.state == "pruned" for trial in self.trials)
        return {
            "hpo/trials": float(len(self.trials)),
            "hpo/pruned": float(pruned),
            "hpo/seconds": self.seconds,
            **{f"hpo/{member}/log_loss": value for member, value in self.best.items()},
            **{f"hpo/{member}/log_loss_default": value for member, value in self.default.items()},
        }

    def to_dict(self) -> dict[str, Any]:
        """Return the search as JSON-ready values."""
        return asdict(self)


def tune(data: TrainingData, *, trials: int, seed: int, folds: int = 5, timeout_seconds: float = 600.0) -> Search:
    """Search hyper-parameters of each member.

    The same data, seed and number of trials give the same result, unless the time runs out.

    Args:
        data: training rows; held-out subjects must not be among them.
        trials: of each member, the defaults included; at least 1.
        seed: of folds, models and sampler.
        folds: subjects are split into so many.
        timeout_seconds: of the whole search; each member gets an equal part of what is left.

    Raises:
        TrainingDataError: the rows cannot be split into folds.
        ValueError: fewer than one trial.
    """
    import optuna

    if trials < 1:
        raise ValueError(f"{trials} trials; at least 1 is needed")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    fold = assign_folds(data, seed, folds)
    began = time.monotonic()
    found: list[Trial] = []
    parameters = {member: dict(values) for member, values in HYPER_PARAMETERS.items()}
    best: dict[str, float] = {}
    default: dict[str, float] = {}
    out_of_time = False
    with _one_thread_each():
        for position, member in enumerate(MEMBERS):
            left = timeout_seconds - (time.monotonic() - began)
            study = optuna.create_study(
                direction="minimize",
                sampler=optuna.samplers.TPESampler(seed=seed, n_startup_trials=max(2, min(8, trials // 3))),
                pruner=optuna.pruners.MedianPruner(n_startup_trials=3, n_warmup_steps=1),
            )
            study.enqueue_trial({name: HYPER_PARAMETERS[member][name] for name in SEARCHED[member]})
            study.optimize(
                _objective(data, fold, member, seed),
                n_trials=trials,
                timeout=max(0.01, left / (len(MEMBERS) - position)),
                catch=(),
            )
            found += [_trial(member, item) for item in study.trials]
            out_of_time = out_of_time or len(study.trials) < trials
            complete = [item for item in study.trials if item.state == optuna.trial.TrialState.COMPLETE]
            if complete:
                parameters[member].update(study.best_trial.params)
                best[member] = float(study.best_value)
            if study.trials and study.trials[0].state == optuna.trial.TrialState.COMPLETE:
                default[member] = float(study.trials[0].value or 0.0)
    return Search(
        seed=seed,
        folds=folds,
        parameters=parameters,
        trials=tuple(found),
        best=best,
        default=default,
        stopped_by_time=out_of_time,
        seconds=round(time.monotonic() - began, 3),
    )


def _objective(data: TrainingData, fold: NDArray[np.int8], member: str, seed: int) -> Any:
    def loss(trial: optuna.Trial) -> float:
        import optuna

        chosen: dict[str, Value] = {}
        for name, (kind, low, high) in SEARCHED[member].items():
            if kind == "int":
                chosen[name] = trial.suggest_int(name, int(low), int(high))
            else:
                chosen[name] = trial.suggest_float(name, low, high, log=kind == "log")
        factory = candidates(seed, len(data.feature_names), data.rows, {member: chosen})[member]
        losses: list[Floats] = []
        for number in np.unique(fold):
            inside, outside = fold != number, fold == number
            model = factory().fit(data.features[inside], data.labels[inside])
            losses.append(_log_losses(data.labels[outside], model.predict_proba(data.features[outside])[:, 1]))
            trial.report(float(np.concatenate(losses).mean()), int(number))
            if trial.should_prune():
                raise optuna.TrialPruned
        return float(np.concatenate(losses).mean())

    return loss


def _log_losses(labels: NDArray[np.int8], probabilities: Floats) -> Floats:
    p = np.clip(probabilities.astype(np.float64), _CLIP, 1 - _CLIP)
    return np.asarray(-np.where(labels == 1, np.log(p), np.log(1 - p)), dtype=np.float64)


def _trial(member: str, item: optuna.trial.FrozenTrial) -> Trial:
    values = item.intermediate_values
    loss = item.value if item.value is not None else (values[max(values)] if values else None)
    seconds = item.duration.total_seconds() if item.duration else 0.0
    return Trial(
        member, item.number, item.state.name.lower(), None if loss is None else float(loss), dict(item.params),
        round(seconds, 3),
    )  # fmt: skip


def search_plot(search: Search) -> bytes:
    """Return the loss of each trial and the best so far, a panel a member, as PNG."""

    def draw(axes: Any) -> None:
        for ax, member in zip(axes, MEMBERS, strict=True):
            own = [trial for trial in search.trials if trial.member == member and trial.loss is not None]
            done = [trial for trial in own if trial.state == "complete"]
            pruned = [trial for trial in own if trial.state != "complete"]
            ax.scatter([t.number for t in done], [t.loss for t in done], s=16, color=BLUE, label="complete")
            ax.scatter(
                [t.number for t in pruned], [t.loss for t in pruned], s=16, color=GREY, marker="x", label="pruned"
            )
            if done:
                best = np.minimum.accumulate([float(t.loss or 0.0) for t in done])
                ax.step([t.number for t in done], best, where="post", color=ORANGE, lw=1.5, label="best so far")
            ax.set(title=member.replace("_", " "), xlabel="trial", ylabel="out-of-fold log loss")
        axes[0].legend(loc="upper right")

    return png(draw, (3.6 * len(MEMBERS), 3.2), columns=len(MEMBERS))
