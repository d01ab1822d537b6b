"""Training: loss builders, schedules, and the one loop that runs them all."""

from rdx.train import (
    adversarial,
    averaging,
    certified,
    convex_outer,
    detectors,
    expressive,
    fast_ibp,
    linf_distance,
    penalties,
    phased,
    sabr,
    schedules,
    standard,
    taps,
)
from rdx.train.loop import Phase, TrainState, fit, init_state
from rdx.train.together import fit_together

__all__ = [
    "Phase", "TrainState", "adversarial", "averaging", "certified", "convex_outer", "detectors", "expressive",
    "fast_ibp", "fit", "fit_together", "init_state", "linf_distance", "penalties", "phased", "sabr", "schedules",
    "standard", "taps",
]
