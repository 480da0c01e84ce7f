"""Features of any range of days, computed again."""

from clinical_orchestration.defs.backfill.assets import (
    engineer_features,
    extract_historical_data,
    generate_backfill_report,
    load_to_feature_store,
    validate_features,
    validate_historical_data,
    verify_feature_store,
)

ASSETS = [
    extract_historical_data,
    validate_historical_data,
    engineer_features,
    validate_features,
    load_to_feature_store,
    verify_feature_store,
    generate_backfill_report,
]

__all__ = ["ASSETS"]
