"""Training: loss builders, schedules, and the one loop that runs them all."""

from rdx.train import adversarial, certified, detectors, schedules, standard
from rdx.train.loop import Phase, TrainState, fit, init_state
from rdx.train.together import fit_together

__all__ = [
    "Phase", "TrainState", "adversarial", "certified", "detectors", "fit", "fit_together", "init_state", "schedules",
    "standard",
]
