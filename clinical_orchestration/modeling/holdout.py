"""Which subjects are held out for comparing models: the same ones at every retraining."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable


def is_held_out(trial: str, patient_id: str, *, share: float, seed: int) -> bool:
    """Return whether a subject belongs to the held-out set.

    The answer depends on the subject alone (a hash), so that new subjects and new visits never move another one from
    one side to the other, and every retraining compares on the same subjects.

    Args:
        trial: name of the trial profile.
        patient_id: the subject.
        share: expected share of subjects held out, 0 to 1.
        seed: another seed gives another set.
    """
    digest = hashlib.sha256(f"{seed}|{trial}|{patient_id}".encode()).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


def held_out_subjects(trial: str, patient_ids: Iterable[str], *, share: float, seed: int) -> set[str]:
    """Return those of `patient_ids` that :func:`is_held_out` holds out."""
    return {patient_id for patient_id in set(patient_ids) if is_held_out(trial, patient_id, share=share, seed=seed)}
