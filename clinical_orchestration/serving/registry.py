"""The MLflow registry as a source of champions."""

from __future__ import annotations

from typing import TYPE_CHECKING

from clinical_orchestration.serving.ports import Champion, LoadedModel, ModelLoadError, RegistryUnavailableError
from clinical_orchestration.stores import registry as store

if TYPE_CHECKING:
    from clinical_orchestration.settings import ClientSettings


class RegistryChampions:
    """See :class:`clinical_orchestration.serving.ports.ChampionSource`."""

    def __init__(self, registry: store.ModelRegistry) -> None:
        self._registry = registry

    @classmethod
    def from_settings(cls, settings: ClientSettings) -> RegistryChampions:
        """Return the registry of the deployment that the settings describe."""
        return cls(store.ModelRegistry(settings.mlflow_tracking_uri))

    def champion(self, model_name: str) -> Champion | None:
        """Return where the alias points to."""
        try:
            found = self._registry.champion(model_name)
        except store.RegistryError as error:
            raise RegistryUnavailableError(str(error)) from None
        return None if found is None else Champion(found.name, found.version)

    def load(self, champion: Champion) -> LoadedModel:
        """Load a version in the form that serving asks."""
        from clinical_orchestration.serving.models import served_model

        try:
            loaded = self._registry.load_model(champion.model_name, champion.version)
        except store.RegistryUnavailableError as error:
            raise RegistryUnavailableError(str(error)) from None
        except store.RegistryError as error:
            raise ModelLoadError(str(error)) from None
        return served_model(
            loaded.estimator, loaded.feature_names, loaded.example, trial=loaded.trial, feature_set=loaded.feature_set
        )
