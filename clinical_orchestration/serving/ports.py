"""What the model server needs from the outside, as Protocols: the stores implement them, tests use fakes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from clinical_orchestration.stores.online import OnlineFeatures

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


class RegistryUnavailableError(RuntimeError):
    """The model registry does not answer; the message names what was asked, never a credential."""


class ModelLoadError(RuntimeError):
    """A model version cannot be served; the message says why."""


@dataclass(frozen=True)
class Champion:
    """The version that a registered model's alias ``champion`` points to."""

    model_name: str
    version: str


@dataclass(frozen=True)
class LoadedModel:
    """A model in memory.

    Attributes:
        feature_names: the model's inputs in the order of its signature.
        predict_proba: turns rows (n, number of features; NaN where a feature is missing) into n probabilities.
        example: rows of the input example, used to warm the model; None where it was logged without one.
        trial: the trial it was trained on; empty where the registry does not say.
        feature_set: id of the feature set it was trained on; empty where the registry does not say.
    """

    feature_names: tuple[str, ...]
    predict_proba: Callable[[NDArray[np.float64]], NDArray[np.float64]]
    example: NDArray[np.float64] | None = None
    trial: str = ""
    feature_set: str = ""


class ChampionSource(Protocol):
    """The model registry, as far as serving reads it. Called from one background thread only."""

    def champion(self, model_name: str) -> Champion | None:
        """Return the version that the alias points to; None where there is no such model or alias.

        Raises:
            RegistryUnavailableError: the registry does not answer.
        """
        ...

    def load(self, champion: Champion) -> LoadedModel:
        """Load a version.

        Raises:
            RegistryUnavailableError: the registry or its artifact store does not answer.
            ModelLoadError: the version is there but cannot be used.
        """
        ...


class FeatureReader(Protocol):
    """The online store, as far as serving reads it."""

    def get_many(self, patient_ids: Sequence[str]) -> Mapping[str, OnlineFeatures]:
        """Return the features of those patients that have any.

        Raises:
            OnlineStoreError: the store does not answer.
        """
        ...

    def ping(self) -> None:
        """Return when the store answers.

        Raises:
            OnlineStoreError: it does not.
        """
        ...


class PredictionSink(Protocol):
    """Where logged predictions go in the end: the table ``gold/predictions``. Called from one thread only."""

    def last_sequence(self, log_id: str) -> int:
        """Return the highest sequence number of this log that the table holds; 0 for none."""
        ...

    def append(self, rows: Sequence[Mapping[str, Any]], log_id: str, after: int, last_sequence: int) -> None:
        """Append the rows after `after`; record in the same commit that the log is stored up to `last_sequence`."""
        ...

    def compact(self) -> None:
        """Merge small files where there are many; called now and then."""
        ...
