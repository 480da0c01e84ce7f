"""Trial profiles: where a trial's records come from, how they map, and what is predicted from them."""

from clinical_orchestration.trials.configured import configured_trial
from clinical_orchestration.trials.profile import TrialProfile, available_trials, load_trial

__all__ = ["TrialProfile", "available_trials", "configured_trial", "load_trial"]
