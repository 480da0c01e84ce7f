"""A seeded clinical trial: subjects whose hidden state of health drives what is measured and what happens to them."""

from clinical_orchestration.simulation.messages import (
    GroundTruth,
    SimulatedMessage,
    simulate,
    simulation_id,
    subjects_for,
)

__all__ = ["GroundTruth", "SimulatedMessage", "simulate", "simulation_id", "subjects_for"]
