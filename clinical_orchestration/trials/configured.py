"""A trial's profile as this deployment runs it: with the variables that stand above the profile's own values."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from clinical_orchestration.settings import Variables
from clinical_orchestration.trials.profile import TrialProfile, load_trial


def configured_trial(name: str, variables: Variables | None = None) -> TrialProfile:
    """Return the profile called `name`, with the deployment's variables applied; see :func:`configured`.

    Raises:
        ValueError: no such profile; the message lists those there are.
    """
    return configured(load_trial(name), variables or Variables())


def configured(profile: TrialProfile, variables: Variables) -> TrialProfile:
    """Return the profile with the variables applied, or the profile itself where none differs from its default.

    ``model_name`` is the (beginning of the) registered model's name; ``feature_engineering_window_days`` the days of
    event history that features look back over.
    """
    changes: dict[str, Any] = {}
    model_name = variables.registered_model(profile.model_name)
    if model_name != profile.model_name:
        changes["model_name"] = model_name
    days = variables.feature_engineering_window_days
    lookback = timedelta(days=days)
    default = Variables.model_fields["feature_engineering_window_days"].default
    if days != default and lookback != profile.features.adverse_event_lookback:
        changes["features"] = profile.features.model_copy(update={"adverse_event_lookback": lookback})
    return profile.model_copy(update=changes) if changes else profile
