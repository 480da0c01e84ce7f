"""Names and columns of the lakehouse tables: the contract between ingestion, features, models and readers.

A column type is one of ``string``, ``double``, ``long``, ``int``, ``boolean``, ``timestamp`` (UTC, microseconds),
``date`` and ``array<string>``; :func:`arrow_schema` turns a table's columns into Arrow, :func:`spark_ddl` into Spark
DDL.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pyarrow as pa

DOMAINS = ("patient_vitals", "lab_results", "medications", "adverse_events", "subjects")

QUARANTINE = "quarantine/records"
DUPLICATES = "quarantine/duplicates"
FEATURES = "gold/patient_features"
FEATURE_STAGING = "staging/patient_features"
TRAINING_SET = "gold/training_set"
PREDICTIONS = "gold/predictions"
PREDICTION_OUTCOMES = "gold/prediction_outcomes"
QUALITY_SCORES = "monitoring/quality_scores"
CLEANING_LOG = "quality/cleaning_log"
COHORT_MEMBERS = "gold/cohort_members"
COHORT_ATTRITION = "gold/cohort_attrition"
COHORT_DEFINITIONS = "gold/cohort_definitions"
MODEL_PERFORMANCE = "monitoring/model_performance"
DATA_DRIFT = "monitoring/data_drift"


def bronze(domain: str) -> str:
    """Return the path of a domain's raw table."""
    return f"bronze/{domain}"


def silver(domain: str) -> str:
    """Return the path of a domain's typed table."""
    return f"silver/{domain}"


BRONZE_COLUMNS: dict[str, str] = {
    "source": "string",  # "kafka:<topic>" or "file:<name>"
    "source_position": "string",  # "<topic>-<partition>-<offset>", or "<file>@<sha256, 12 hex>#<row>", 0-based
    "ingested_at": "timestamp",
    "received_at": "timestamp",  # Kafka record time; null for files, where the record itself says when it was collected
    "trial": "string",  # name of the trial profile
    "record_format": "string",  # "message" (contract JSON) or "sdtm:<DOMAIN>" (one SDTM row as JSON)
    "payload": "string",  # as received; bytes that are no UTF-8 are kept as base64 and flagged by payload_encoding
    "payload_encoding": "string",  # "utf-8" or "base64"
}

_COMMON: dict[str, str] = {
    "trial": "string",
    "patient_id": "string",
    "event_time": "timestamp",
    "received_at": "timestamp",  # when the platform could first know the record (Kafka time, SDTM collection date)
    "source": "string",
    "source_position": "string",
    "ingested_at": "timestamp",
    "record_key": "string",  # natural key of the record, hashed: equal keys describe the same observation
    "content_hash": "string",  # hash of what the record says: equal key and content is a duplicate
}

SILVER_COLUMNS: dict[str, dict[str, str]] = {
    "patient_vitals": {
        **_COMMON,
        "test_code": "string",  # SDTM VSTESTCD: SYSBP, DIABP, PULSE, HR, TEMP, OXYSAT, RESP, WEIGHT, HEIGHT
        "value": "double",  # in `unit`
        "unit": "string",  # standard unit: mmHg, beats/min, C, %, kg, cm
        "original_value": "string",
        "original_unit": "string",
        "visit": "string",
        "body_position": "string",  # VSPOS
        "time_point": "string",  # VSTPT
        "baseline_flag": "boolean",  # VSBLFL
        "site": "string",
        "arm": "string",
    },
    "lab_results": {
        **_COMMON,
        "test_code": "string",
        "value": "double",  # null for text results
        "unit": "string",
        "original_value": "string",
        "original_unit": "string",
        "text_value": "string",  # LBSTRESC where the result is no number ("<3.42", "YELLOW")
        "test_name": "string",
        "category": "string",
        "reference_low": "double",
        "reference_high": "double",
        "reference_indicator": "string",  # LOW, NORMAL, HIGH, ABNORMAL
        "visit": "string",
        "baseline_flag": "boolean",
        "lab_id": "string",
    },
    "medications": {
        **_COMMON,  # event_time: start of the medication, or its collection where the start is unknown
        "drug_name": "string",
        "standardized_name": "string",
        "drug_class": "string",
        "dose": "double",
        "dose_unit": "string",
        "route": "string",
        "frequency": "string",
        "indication": "string",
        "start_time": "timestamp",  # earliest time the (possibly partial) start date allows
        "start_precision": "string",  # year, month, day, minute, second, missing
        "end_time": "timestamp",  # latest time the end date allows; null while ongoing
        "study_drug": "boolean",  # true for EX records
    },
    "adverse_events": {
        **_COMMON,  # event_time: onset
        "event_type": "string",
        "body_system": "string",
        "severity": "string",  # CTCAE grade_1 .. grade_5
        "serious": "boolean",
        "event_id": "string",
        "causality": "string",
        "outcome": "string",
        "onset_precision": "string",
        "end_time": "timestamp",
        "reported_by": "string",
    },
    "subjects": {
        **_COMMON,  # event_time: informed consent or first collection of demographics
        "study_id": "string",
        "site": "string",
        "arm": "string",  # planned
        "actual_arm": "string",
        "age_years": "double",
        "sex": "string",
        "race": "string",
        "ethnicity": "string",
        "country": "string",
        "treatment_start": "timestamp",  # RFSTDTC; null for screen failures
        "treatment_end": "timestamp",  # RFENDTC
        "death_time": "timestamp",
        "screen_failure": "boolean",
    },
}

QUARANTINE_COLUMNS: dict[str, str] = {
    "table": "string",  # bronze domain
    "trial": "string",
    "source": "string",
    "source_position": "string",
    "reasons": "array<string>",  # "<rule>: <what is wrong>", never a patient identifier
    "payload": "string",
    "quarantined_at": "timestamp",
}

DUPLICATES_COLUMNS: dict[str, str] = {
    "table": "string",
    "trial": "string",
    "source": "string",
    "source_position": "string",
    "duplicate_of": "string",  # source_position of the accepted record
    "detected_at": "timestamp",
}

# monitoring/quality_scores: one row a silver table and quality run
QUALITY_SCORES_COLUMNS: dict[str, str] = {
    "trial": "string",
    "table": "string",
    "scored_at": "timestamp",
    "as_of": "timestamp",  # the trial's present
    "run_id": "string",
    "rows": "long",
    "score": "double",  # completeness x validity x acceptance, 0 to 1
    "completeness": "double",  # mean share of filled cells in the columns that should have one
    "validity": "double",  # mean over the table's rules of the share of rows that hold them
    "acceptance": "double",  # share of received records that are not quarantined
    "coverage": "double",  # share of expected measurements that arrived; null where nothing can be expected
    "delta_version": "long",  # of the silver table
}

# quality/cleaning_log: append-only; what was proposed, begun, applied and reverted, record by record
CLEANING_LOG_COLUMNS: dict[str, str] = {
    "trial": "string",
    "batch_id": "string",  # null for proposals
    "event": "string",  # proposed, kept (given up), begun, applied, revert_begun, reverted
    "rule": "string",
    "table": "string",
    "source_position": "string",
    "action": "string",  # accept (quarantine to silver), duplicate (quarantine to duplicates), change (in silver)
    "column": "string",
    "old_value": "string",
    "new_value": "string",
    "reason": "string",
    "safe": "boolean",
    "before": "string",  # JSON of the rows as they were; of begun only
    "after": "string",  # JSON of the rows as they are then; of begun only
    "logged_at": "timestamp",
    "run_id": "string",
}

# gold/patient_features: these, then one nullable double a feature of the trial's profile
FEATURE_KEY_COLUMNS: dict[str, str] = {
    "trial": "string",
    "patient_id": "string",
    "feature_time": "timestamp",
    "feature_date": "date",  # UTC date of feature_time; the partition column
}

# staging/patient_features: rows of a backfill between their computation and their checks; these, then the features
FEATURE_STAGING_COLUMNS: dict[str, str] = {
    "request": "string",  # trial, range of days, set of features and silver versions, hashed
    **FEATURE_KEY_COLUMNS,
}

PREDICTIONS_COLUMNS: dict[str, str] = {
    "prediction_id": "string",
    "predicted_at": "timestamp",
    "prediction_date": "date",
    "trial": "string",
    "patient_id": "string",  # null where the caller sent features only
    "model_name": "string",
    "model_version": "string",
    "probability": "double",
    "risk_band": "string",
    "feature_time": "timestamp",
    "feature_age_seconds": "double",
    "stale": "boolean",
    "features": "string",  # JSON object, as given to the model
}

# at most one row a prediction, written once its horizon has passed and was observed
PREDICTION_OUTCOMES_COLUMNS: dict[str, str] = {
    "prediction_id": "string",
    "trial": "string",
    "patient_id": "string",
    "model_name": "string",
    "model_version": "string",
    "predicted_at": "timestamp",
    "index_time": "timestamp",  # the features' time, else when the prediction was made
    "horizon_end": "timestamp",
    "probability": "double",
    "risk_band": "string",
    "outcome": "int",  # 1: an adverse event started in (index_time, horizon_end]
    "event_time": "timestamp",  # the first such onset
    "site": "string",
    "sex": "string",
    "arm": "string",  # as treated where known, else as planned
    "recorded_at": "timestamp",
}

# one row a run, window and segment; a metric is null where the rows do not determine it
MODEL_PERFORMANCE_COLUMNS: dict[str, str] = {
    "trial": "string",
    "model_name": "string",
    "model_version": "string",
    "run_id": "string",
    "computed_at": "timestamp",
    "as_of": "timestamp",  # the trial's present
    "span": "string",  # "current": the window that decides; "all": every outcome of the version; "window": one of a row
    "window_start": "timestamp",  # of index times, exclusive
    "window_end": "timestamp",
    "attribute": "string",  # "all", "site", "sex" or "arm"
    "value": "string",
    "rows": "long",  # null, as the other figures, where fewer than five subjects would be shown
    "subjects": "long",
    "events": "long",
    "mean_probability": "double",
    "auroc": "double",
    "auroc_lower": "double",
    "auroc_upper": "double",
    "auprc": "double",
    "auprc_lower": "double",
    "auprc_upper": "double",
    "brier": "double",
    "brier_lower": "double",
    "brier_upper": "double",
    "ece": "double",
    "ece_lower": "double",
    "ece_upper": "double",
    "baseline_auroc": "double",  # of the version's own evaluation
    "status": "string",
    "note": "string",
}

# one row a run, source and feature
DATA_DRIFT_COLUMNS: dict[str, str] = {
    "trial": "string",
    "model_name": "string",
    "model_version": "string",
    "run_id": "string",
    "computed_at": "timestamp",
    "as_of": "timestamp",
    "source": "string",  # "features": gold/patient_features; "predictions": what the model was asked about
    "feature": "string",
    "test": "string",  # "ks" or "chi2"
    "statistic": "double",
    "p_value": "double",
    "q_value": "double",  # adjusted for the number of features
    "psi": "double",
    "jensen_shannon": "double",  # bits
    "missing_reference": "double",
    "missing_current": "double",
    "mean_reference": "double",
    "mean_current": "double",
    "ageing": "boolean",  # moves with time in the trial: reported, raises nothing
    "drifted": "boolean",
    "reference_rows": "long",
    "current_rows": "long",
}

# gold/cohort_*: one cohort of one trial each time it is built; the newest build replaces the one before
COHORT_MEMBERS_COLUMNS: dict[str, str] = {
    "cohort": "string",
    "trial": "string",
    "definition_hash": "string",
    "patient_id": "string",  # everybody who was screened
    "index_time": "timestamp",  # what windows are counted from; null where the patient has no such time
    "status": "string",  # eligible, ineligible, undetermined, no index: by all criteria
    "member": "boolean",
    "removed_by": "string",  # id of the first criterion that took the patient out; null for members
    "reasons": "array<string>",  # "<criterion>: <met, not met, unknown>, <by which value, or what is missing>"
    "built_at": "timestamp",
}

COHORT_ATTRITION_COLUMNS: dict[str, str] = {
    "cohort": "string",
    "trial": "string",
    "definition_hash": "string",
    "step": "int",  # 0-based
    "part": "string",  # screened, index, inclusion, exclusion, cohort
    "criterion": "string",
    "description": "string",
    "entered": "long",
    "removed": "long",
    "removed_unknown": "long",  # the data does not tell, and the definition excludes such patients
    "remaining": "long",
    "kept_unknown": "long",  # the data does not tell, and the definition keeps such patients
    "built_at": "timestamp",
}

COHORT_DEFINITIONS_COLUMNS: dict[str, str] = {
    "cohort": "string",
    "trial": "string",
    "definition_hash": "string",
    "title": "string",
    "definition": "string",  # JSON object
    "silver_versions": "string",  # JSON object: silver table -> Delta version that the cohort follows from
    "screened": "long",
    "members": "long",
    "built_at": "timestamp",
}

_ARROW_TYPES = {
    "string": "string", "double": "float64", "long": "int64", "int": "int32", "boolean": "bool_", "date": "date32",
}  # fmt: skip


def arrow_schema(columns: dict[str, str]) -> pa.Schema:
    """Return the Arrow schema of a column mapping of this module."""
    import pyarrow as pa

    def arrow_type(name: str) -> pa.DataType:
        if name == "timestamp":
            return pa.timestamp("us", tz="UTC")
        if name == "array<string>":
            return pa.list_(pa.string())
        return getattr(pa, _ARROW_TYPES[name])()

    return pa.schema([pa.field(column, arrow_type(kind)) for column, kind in columns.items()])


def spark_ddl(columns: dict[str, str]) -> str:
    """Return the Spark DDL string of a column mapping of this module."""
    return ", ".join(f"`{column}` {kind}" for column, kind in columns.items())
