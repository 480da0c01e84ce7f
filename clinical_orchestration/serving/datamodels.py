"""Bodies of requests and answers. Request bodies forbid unknown fields."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, model_validator

MAX_INSTANCES = 1_000
"""Most instances in one batch."""

MAX_BODY_BYTES = 16 * 2**20
"""Largest request body."""

_Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]
_Name = Annotated[str, Field(min_length=1, max_length=128)]


class InstanceBody(BaseModel):
    """One patient, or one set of features, to predict for: exactly one of `patient_id` and `features`."""

    model_config = ConfigDict(extra="forbid", title="Instance")

    patient_id: Annotated[str, Field(min_length=1, max_length=256)] | None = Field(
        None, description="Predict from this patient's online features."
    )
    features: dict[_Name, _Number | None] | None = Field(
        None,
        description="Predict from these values. Left out or null: the feature is missing. GET /models has the names.",
    )
    trial: _Name | None = Field(
        None, description="Trial profile. Default: the patient's own; for `features`, the server's default trial."
    )
    feature_time: AwareDatetime | None = Field(
        None, description="When `features` hold (ISO 8601 with offset); gives the answer an age. Not with `patient_id`."
    )

    @model_validator(mode="after")
    def _one_of(self) -> InstanceBody:
        if (self.patient_id is None) == (self.features is None):
            raise ValueError("give exactly one of patient_id and features")
        if self.patient_id is not None and self.feature_time is not None:
            raise ValueError("feature_time belongs to features; a patient's online features have their own")
        return self


class BatchBody(BaseModel):
    """Several instances; each is answered, or refused, by itself."""

    model_config = ConfigDict(extra="forbid", title="Batch")

    instances: list[InstanceBody] = Field(min_length=1, max_length=MAX_INSTANCES)


class PredictionAnswer(BaseModel):
    """One prediction. It is logged to `gold/predictions` under `prediction_id`."""

    model_config = ConfigDict(title="Prediction", protected_namespaces=())

    prediction_id: str
    patient_id: str | None = Field(description="As asked; null where features were sent.")
    trial: str
    model_name: str
    model_version: str
    probability: float = Field(description="Of the trial's target within its horizon after feature_time.", ge=0, le=1)
    risk_band: Literal["low", "medium", "high"] = Field(description="By the bounds of the trial's profile.")
    predicted_at: datetime
    feature_time: datetime | None = Field(description="When the features hold; null where the caller did not say.")
    feature_age_seconds: float | None = Field(description="Age of the features when predicted, by the clock.")
    stale: bool = Field(description="The features are older than the trial allows; `warning` explains.")
    warning: str | None
    missing_features: int = Field(description="Features of the model that had no value.")
    feature_count: int = Field(description="Features of the model.")


class ErrorAnswer(BaseModel):
    """Every error."""

    model_config = ConfigDict(title="Error")

    error: str = Field(description="Code that stays the same between releases.")
    detail: str
    what_to_do: str


class InstanceError(ErrorAnswer):
    """The error of one instance of a batch."""

    model_config = ConfigDict(title="InstanceError")

    status: int = Field(description="HTTP status that this instance would have got alone.")


class BatchAnswer(BaseModel):
    """Answers in the order of the instances."""

    model_config = ConfigDict(title="Predictions")

    predictions: list[PredictionAnswer | InstanceError]
    succeeded: int
    failed: int


class ModelAnswer(BaseModel):
    """A champion that serves."""

    model_config = ConfigDict(title="ServedModel", protected_namespaces=())

    trial: str
    model_name: str
    model_version: str
    loaded_at: datetime
    target: str
    horizon_seconds: float
    risk_bands: dict[str, float] = Field(description="Lower bounds of medium and high.")
    feature_names: list[str]


class ModelsAnswer(BaseModel):
    """All champions that serve."""

    model_config = ConfigDict(title="ServedModels")

    models: list[ModelAnswer]
    default_trial: str


class TrialHealth(BaseModel):
    """The model of one trial."""

    model_config = ConfigDict(protected_namespaces=())

    state: Literal["serving", "loading", "no_model", "failing"] = Field(
        description="failing: a newer champion cannot be loaded; `model_version`, where given, keeps serving."
    )
    model_name: str
    model_version: str | None
    loaded_at: datetime | None
    error: str | None


class HealthAnswer(BaseModel):
    """How the server is doing. The status code is 200 as long as the process serves."""

    model_config = ConfigDict(title="Health")

    status: Literal["healthy", "degraded", "no_model"] = Field(
        description="no_model: nothing to predict with yet. degraded: something in `problems`."
    )
    problems: list[str]
    models: dict[str, TrialHealth]
    default_trial: str
    registry: dict[str, Any]
    online_store: dict[str, Any]
    prediction_log: dict[str, Any]
    started_at: datetime
