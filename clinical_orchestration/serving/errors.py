"""The one shape of every error answer: what went wrong, and what to do about it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Problem:
    """An error as callers see it; it never repeats a patient's identifier.

    Attributes:
        status: HTTP status.
        error: a code that stays the same between releases.
        detail: what is wrong.
        what_to_do: what the caller, or the operator, can do about it.
    """

    status: int
    error: str
    detail: str
    what_to_do: str

    def body(self) -> dict[str, object]:
        """Return the JSON body; as part of a batch it also carries the status."""
        return {"error": self.error, "detail": self.detail, "what_to_do": self.what_to_do}


def unknown_patient() -> Problem:
    """No online features."""
    return Problem(
        404,
        "unknown_patient",
        "The online feature store holds no features for this patient.",
        "Check the identifier. Features are loaded by the job clinical_data_pipeline and expire 72 hours after the "
        "last load: run it, or send the features themselves.",
    )


def no_model(trial: str, model_name: str, reason: str | None) -> Problem:
    """Nothing serves the trial."""
    return Problem(
        503,
        "no_model",
        f"No model serves trial {trial}: " + (reason or f"model {model_name} has no version with the alias champion."),
        "Run the job clinical_data_pipeline, which trains, registers and promotes a model; serving picks the champion "
        "up by itself within seconds. GET /health shows the state.",
    )


def model_loading(trial: str) -> Problem:
    """The registry has not been asked yet."""
    return Problem(
        503,
        "model_loading",
        f"The server has just started and is still loading the model of trial {trial}.",
        "Try again in a few seconds.",
    )


def registry_unavailable(trial: str, reason: str) -> Problem:
    """Nothing serves the trial and the registry does not answer."""
    return Problem(
        503,
        "registry_unavailable",
        f"No model of trial {trial} is loaded and the model registry does not answer: {reason}",
        "Start MLflow (./pipeline-manager.sh --start --level 4) or check MLFLOW_TRACKING_URI; the model is loaded as "
        "soon as the registry answers.",
    )


def online_store_unavailable(reason: str) -> Problem:
    """Redis is out."""
    return Problem(
        503,
        "online_store_unavailable",
        f"The features of this patient cannot be read: {reason}",
        "Start Redis (./pipeline-manager.sh --start --level 0) or check REDIS_URL, and try again. Requests that send "
        "their features are answered meanwhile.",
    )


def online_features_unreadable() -> Problem:
    """The hash is there but is not as the loader writes it."""
    return Problem(
        503,
        "online_features_unreadable",
        "The stored features of this patient are not in the expected form.",
        "Load the features again: run the job clinical_data_pipeline.",
    )


def trial_not_served() -> Problem:
    """The hash names a trial that the server has no profile of."""
    return Problem(
        503,
        "trial_not_served",
        "This patient's features belong to a trial that this server has no profile of.",
        "Start the server with the profile: set CLINICAL_TRIAL to its name or to its YAML file.",
    )


def overloaded(limit: int) -> Problem:
    """Too much waits already."""
    return Problem(
        503,
        "overloaded",
        f"{limit} predictions wait already.",
        "Try again in a second, with fewer parallel requests or smaller batches.",
    )


def trial_mismatch(asked: str, stored: str) -> Problem:
    """The body names another trial than the patient's."""
    return Problem(
        422,
        "trial_mismatch",
        f"The request names trial {asked}, but this patient's features belong to trial {stored}.",
        "Leave `trial` out: a patient's own trial is used.",
    )


def unknown_trial(trials: list[str]) -> Problem:
    """The body names a trial that is not there."""
    return Problem(
        422, "unknown_trial", "There is no such trial.", f"Use one of: {', '.join(trials)}; or leave `trial` out."
    )


def unknown_features(names: list[str], trial: str) -> Problem:
    """The body names features that the model does not have."""
    shown = ", ".join(name[:60] for name in names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
    return Problem(
        422,
        "unknown_features",
        f"The model of trial {trial} has no feature called: {shown}",
        "GET /models lists the names of the model's features.",
    )


def no_values() -> Problem:
    """All features are missing."""
    return Problem(
        422,
        "no_feature_values",
        "Every feature of the model is missing.",
        "Send a value for at least one feature; features that are unknown may be null or left out.",
    )


def invalid(detail: str) -> Problem:
    """The body is not as documented."""
    return Problem(
        422,
        "invalid_request",
        detail,
        'Send {"patient_id": "..."} or {"features": {"name": number or null, ...}}, or several of these as '
        '{"instances": [...]}; /docs shows examples.',
    )


def model_failed() -> Problem:
    """The model raised, or answered no probability."""
    return Problem(
        500,
        "model_failed",
        "The model could not compute a probability for this input.",
        "If other inputs work, send this one to the owners of the model; else move the alias champion back to the "
        "version before. The server's log has the cause.",
    )
