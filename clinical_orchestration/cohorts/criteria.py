"""Inclusion and exclusion criteria as data: a model that YAML or JSON fills, and the hash of what it says.

A definition is a list of inclusion and of exclusion criteria. Each has a `kind` and may have an `id` and a `text` (the
protocol's wording); ``all``, ``any`` and ``not`` hold others. A `window` is counted from the patient's index time:
``{before: 30d}`` looks at the 30 days up to and with that time; without a window everything up to it counts.

The files in ``library/`` ship with the package.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime, timedelta
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    ValidationError,
    field_validator,
    model_validator,
)

from clinical_orchestration.transforms.units import LAB_UNITS, VITAL_UNITS, conversion
from clinical_orchestration.trials.profile import parse_duration

MATCHER_VERSION = 1
"""Part of every definition's hash: raised when the same definition would select other patients."""


class CriteriaError(ValueError):
    """The criteria cannot be read; the message says where and why."""


def _span_text(span: timedelta) -> str:
    seconds = int(span.total_seconds())
    for unit, size in (("d", 86_400), ("h", 3_600), ("m", 60)):
        if seconds % size == 0 and seconds:
            return f"{seconds // size}{unit}"
    return f"{seconds}s"


Span = Annotated[
    timedelta, BeforeValidator(parse_duration), PlainSerializer(_span_text, return_type=str, when_used="json")
]
"""A duration that is written and read as ``30m``, ``6h``, ``14d``."""


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Window(_Model):
    """The span of time that counts, seen from the index time; both ends belong to it."""

    before: Span | None = Field(None, description="from so long before the index; empty: from the first record")
    after: Span = Field(timedelta(0), description="until so long after the index")

    def describe(self) -> str:
        """Return the window in words."""
        start = "up to the index" if self.before is None else f"within {_days(self.before)} before the index"
        return start if not self.after else f"{start} and {_days(self.after)} after it"


class Bounds(_Model):
    """Limits of a number; at least one is given."""

    min: float | None = Field(None, description="at least")
    max: float | None = Field(None, description="at most")
    above: float | None = Field(None, description="more than")
    below: float | None = Field(None, description="less than")

    @model_validator(mode="after")
    def _some_limit(self) -> Bounds:
        if (self.min, self.max, self.above, self.below) == (None, None, None, None):
            raise ValueError("give at least one of min, max, above, below")
        if self.min is not None and self.above is not None:
            raise ValueError("give min or above, not both")
        if self.max is not None and self.below is not None:
            raise ValueError("give max or below, not both")
        lower, upper = self.lower, self.upper
        if lower is not None and upper is not None and lower > upper:
            raise ValueError(f"nothing is at least {lower:g} and at most {upper:g}")
        return self

    @property
    def lower(self) -> float | None:
        """The lower limit, whether or not it belongs to the range."""
        return self.above if self.min is None else self.min

    @property
    def upper(self) -> float | None:
        """The upper limit, whether or not it belongs to the range."""
        return self.below if self.max is None else self.max

    def limits(self) -> str:
        """Return the limits in words."""
        parts = (("at least", self.min), ("more than", self.above), ("at most", self.max), ("less than", self.below))
        return " and ".join(f"{word} {limit:g}" for word, limit in parts if limit is not None)


class _Criterion(_Model):
    id: str | None = Field(None, pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", description="names it in results")
    text: str = Field("", description="the protocol's wording")


class Age(_Criterion, Bounds):
    """Age in years, as the trial recorded it at enrolment."""

    kind: Literal["age"]


class Sex(_Criterion):
    """Sex, as recorded (``F``, ``M``)."""

    kind: Literal["sex"]
    values: tuple[str, ...] = Field(min_length=1)


class Arm(_Criterion):
    """Treatment arm."""

    kind: Literal["arm"]
    values: tuple[str, ...] = Field(min_length=1)
    actual: bool = Field(False, description="the arm that was given instead of the planned one")


class Site(_Criterion):
    """Trial site."""

    kind: Literal["site"]
    values: tuple[str, ...] = Field(min_length=1)


class Demographic(_Criterion):
    """Another recorded property of the subject."""

    kind: Literal["subject"]
    field: Literal["race", "ethnicity", "country"]
    values: tuple[str, ...] = Field(min_length=1)


class Treated(_Criterion):
    """The subject has received study treatment."""

    kind: Literal["treated"]


class _Measured(_Criterion, Bounds):
    test: str = Field(min_length=1, description="SDTM test code")
    unit: str | None = Field(None, description="unit of the limits; empty: the test's standard unit")
    select: Literal["latest", "first", "any", "all"] = Field(
        "latest", description="which values in the window must be within the limits"
    )
    window: Window = Window()

    @field_validator("test")
    @classmethod
    def _code(cls, value: str) -> str:
        return value.strip().upper()


class Lab(_Measured):
    """A laboratory value; with `relative_to` the limits are multiples of the record's own reference limit."""

    kind: Literal["lab"]
    relative_to: Literal["reference_low", "reference_high"] | None = None

    @model_validator(mode="after")
    def _known_unit(self) -> Lab:
        if self.relative_to and self.unit:
            raise ValueError("limits relative to a reference have no unit")
        _check_unit(self.test, self.unit, LAB_UNITS)
        return self


class Vital(_Measured):
    """A vital sign; `position` takes only those measured so (``SUPINE``, ``STANDING``)."""

    kind: Literal["vital"]
    position: str | None = None

    @model_validator(mode="after")
    def _known_unit(self) -> Vital:
        _check_unit(self.test, self.unit, VITAL_UNITS)
        return self


class AdverseEvent(_Criterion):
    """Adverse events that started within the window.

    Events are collected from everybody, so none recorded means that there was none; say ``absence: unknown`` for a
    span in which the trial did not collect them (before consent).
    """

    kind: Literal["adverse_event"]
    terms: tuple[str, ...] = Field((), description="parts of the term or of the body system, any case; empty: any")
    min_grade: int | None = Field(None, ge=1, le=5, description="CTCAE grade at least")
    serious: bool | None = None
    at_least: int = Field(1, ge=1, description="so many events")
    absence: Literal["not met", "unknown"] = "not met"
    window: Window = Window()


class Diagnosis(_Criterion):
    """A condition that the records mention: as an adverse event, or as the reason for a medication.

    Medical history is no table of the platform, so a condition that is mentioned nowhere is unknown unless
    ``absence: not met`` says that the trial would have recorded it.
    """

    kind: Literal["diagnosis"]
    terms: tuple[str, ...] = Field(min_length=1, description="parts of the condition's name, any case")
    absence: Literal["not met", "unknown"] = "unknown"
    window: Window = Window()


class Medication(_Criterion):
    """A medication taken at some time in the window; ``not`` says that none was.

    A record without a class can neither be nor not be of one of the `classes`.
    """

    kind: Literal["medication"]
    names: tuple[str, ...] = Field((), description="parts of the drug's name, any case")
    classes: tuple[str, ...] = Field((), description="parts of the drug class, any case")
    study_drug: bool = Field(False, description="study treatment instead of concomitant medication")
    window: Window = Window()

    @model_validator(mode="after")
    def _something(self) -> Medication:
        if not self.names and not self.classes and not self.study_drug:
            raise ValueError("give names or classes")
        return self


class All(_Criterion):
    """Every one of `of` is met."""

    kind: Literal["all"]
    of: tuple[Criterion, ...] = Field(min_length=1)


class AnyOf(_Criterion):
    """At least one of `of` is met."""

    kind: Literal["any"]
    of: tuple[Criterion, ...] = Field(min_length=1)


class Not(_Criterion):
    """`of` is not met."""

    kind: Literal["not"]
    of: Criterion


Criterion = Annotated[
    Age
    | Sex
    | Arm
    | Site
    | Demographic
    | Treated
    | Lab
    | Vital
    | AdverseEvent
    | Diagnosis
    | Medication
    | All
    | AnyOf
    | Not,
    Field(discriminator="kind"),
]
for _model in (All, AnyOf, Not):
    _model.model_rebuild()


def _utc(value: object) -> object:
    if isinstance(value, str):
        value = datetime.fromisoformat(value.strip().replace("Z", "+00:00"))
    if isinstance(value, datetime):
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)
    return value


class Index(_Model):
    """The time of each patient that windows are counted from."""

    at: Literal["treatment_start", "consent", "first_record", "last_record", "time"] = "treatment_start"
    time: Annotated[datetime | None, BeforeValidator(_utc)] = Field(None, description="with at: time; UTC")
    shift: Span = Field(timedelta(0), description="so long after it")

    @model_validator(mode="after")
    def _fixed_time(self) -> Index:
        if (self.at == "time") != (self.time is not None):
            raise ValueError("`time` belongs to `at: time`")
        return self


class CohortDefinition(_Model):
    """Who belongs to a cohort, and seen from when.

    Attributes:
        unknown: what happens to a patient whose data does not tell whether a criterion is met.
    """

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,79}$")
    title: str = ""
    source: str = Field("", description="where the criteria come from")
    trial: str | None = Field(None, description="trial profile that they are meant for; empty: any")
    index: Index = Index()
    unknown: Literal["exclude", "keep"] = "exclude"
    inclusion: tuple[Criterion, ...] = ()
    exclusion: tuple[Criterion, ...] = ()

    @model_validator(mode="after")
    def _named_once(self) -> CohortDefinition:
        if not self.inclusion and not self.exclusion:
            raise ValueError("give at least one criterion")
        ids = [name for _, name, _ in self.criteria()]
        twice = sorted({name for name in ids if ids.count(name) > 1})
        if twice:
            raise ValueError(f"the id {', '.join(twice)} names several criteria")
        return self

    def criteria(self) -> Iterator[tuple[Literal["inclusion", "exclusion"], str, Criterion]]:
        """Yield part, id and criterion in the order in which they are applied; ``I1``, ``E2`` where none has an id."""
        for number, criterion in enumerate(self.inclusion, 1):
            yield "inclusion", criterion.id or f"I{number}", criterion
        for number, criterion in enumerate(self.exclusion, 1):
            yield "exclusion", criterion.id or f"E{number}", criterion

    def tests(self) -> dict[str, set[str]]:
        """Return the test codes that the criteria look at, by domain."""
        found: dict[str, set[str]] = {"lab_results": set(), "patient_vitals": set()}
        for _, _, criterion in self.criteria():
            for part in walk(criterion):
                if isinstance(part, Lab):
                    found["lab_results"].add(part.test)
                elif isinstance(part, Vital):
                    found["patient_vitals"].add(part.test)
        return found

    def hash(self) -> str:
        """Return 16 hexadecimal digits that change with who would be selected, not with names and wording."""
        said = _essence(self.model_dump(mode="json", exclude={"name", "title", "source", "trial"}))
        text = json.dumps([MATCHER_VERSION, said], sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def walk(criterion: Criterion) -> Iterator[Criterion]:
    """Yield a criterion and all that are in it."""
    yield criterion
    if isinstance(criterion, (All, AnyOf)):
        for part in criterion.of:
            yield from walk(part)
    elif isinstance(criterion, Not):
        yield from walk(criterion.of)


def describe(criterion: Criterion) -> str:
    """Return what a criterion asks, in words: its text where it has one."""
    return criterion.text or _words(criterion)


def _words(criterion: Criterion) -> str:
    if isinstance(criterion, Age):
        return f"age {criterion.limits()} years"
    if isinstance(criterion, (Sex, Arm, Site, Demographic)):
        name = criterion.field if isinstance(criterion, Demographic) else criterion.kind
        return f"{name} is {' or '.join(criterion.values)}"
    if isinstance(criterion, Treated):
        return "received study treatment"
    if isinstance(criterion, (Lab, Vital)):
        unit = f" {criterion.unit}" if criterion.unit else ""
        if isinstance(criterion, Lab) and criterion.relative_to:
            unit = f" times the {'upper' if criterion.relative_to == 'reference_high' else 'lower'} reference limit"
        which = f"{criterion.select} {criterion.test} value{'s' if criterion.select == 'all' else ''}"
        return f"{which} {criterion.limits()}{unit} {criterion.window.describe()}"
    if isinstance(criterion, AdverseEvent):
        grade = f" of grade {criterion.min_grade} or more" if criterion.min_grade else ""
        kind = {True: "serious ", False: "non-serious ", None: ""}[criterion.serious]
        what = f" ({', '.join(criterion.terms)})" if criterion.terms else ""
        return f"{criterion.at_least} or more {kind}adverse events{what}{grade} {criterion.window.describe()}"
    if isinstance(criterion, Diagnosis):
        return f"{' or '.join(criterion.terms)} {criterion.window.describe()}"
    if isinstance(criterion, Medication):
        what = ", ".join((*criterion.names, *(f"class {name}" for name in criterion.classes))) or "study treatment"
        return f"{what} taken {criterion.window.describe()}"
    if isinstance(criterion, Not):
        return f"not ({describe(criterion.of)})"
    joint = " and " if isinstance(criterion, All) else " or "
    return joint.join(f"({describe(part)})" for part in criterion.of)


def available_definitions(trial: str | None = None) -> list[str]:
    """Return the names of the definitions that ship with the package, sorted; of one trial where `trial` is given."""
    names = sorted(path.stem for path in _library().glob("*.yaml"))
    return names if trial is None else [name for name in names if load_definition(name).trial in (None, trial)]


def load_definition(source: str | Path | Mapping[str, Any]) -> CohortDefinition:
    """Return a definition from a mapping, from a YAML or JSON file, or by the name of one that ships.

    Raises:
        CriteriaError: there is no such file or name, or what it says is not understood.
    """
    import yaml

    where = "the criteria"
    if isinstance(source, Mapping):
        content: Any = dict(source)
    else:
        text = str(source)
        path = Path(text) if text.endswith((".yaml", ".yml", ".json")) else _library() / f"{text}.yaml"
        where = str(source)
        if not path.is_file():
            shipped = ", ".join(available_definitions())
            raise CriteriaError(
                f"there are no criteria {text!r}; give a YAML file, or one of those that ship: {shipped}"
            )
        try:
            content = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise CriteriaError(f"{where} is no YAML: {_one_line(error)}") from None
    if not isinstance(content, dict):
        raise CriteriaError(f"{where} must be a mapping with `name`, `inclusion` and `exclusion`")
    try:
        return CohortDefinition.model_validate(content)
    except ValidationError as error:
        found = "; ".join(
            f"{'.'.join(str(part) for part in problem['loc']) or 'definition'}: {problem['msg']}"
            for problem in error.errors(include_url=False, include_input=False)[:5]
        )
        raise CriteriaError(f"{where}: {found}") from None


def _library() -> Path:
    return Path(str(resources.files(__package__))) / "library"


def _check_unit(test: str, unit: str | None, rules: Mapping[str, Any]) -> None:
    rule = rules.get(test)
    if unit is not None and rule is not None and conversion(rule, unit) is None:
        raise ValueError(f"{test} is not measured in {unit}; its standard unit is {rule.standard}")


def _essence(value: Any) -> Any:
    """Return what is said without names, wording and what is left empty."""
    if isinstance(value, dict):
        return {key: _essence(item) for key, item in value.items() if key not in ("id", "text") and item is not None}
    return [_essence(item) for item in value] if isinstance(value, list) else value


def _days(span: timedelta) -> str:
    days = span / timedelta(days=1)
    return f"{days:g} days" if days >= 1 else f"{span / timedelta(hours=1):g} hours"


def _one_line(error: Exception) -> str:
    return re.sub(r"\s+", " ", str(error))[:200]
