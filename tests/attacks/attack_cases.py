"""Every public attack with settings for the small net of the battery: one line each."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from rdx import attacks

ALL = ("linf", "l2", "l1")


class Case(NamedTuple):
    """An attack as the battery runs it.

    Attributes:
        attack: the attack, with few steps.
        norms: the norms that it handles.
        is_random: whether it takes a key.
        has_restarts: whether it takes `num_restarts`.
        breaks: how many of the seven correct examples of the battery it has to break at least, with those few steps.
        rtol: how far losses may differ between ways of running it: sums in another order, amplified by the steps.
    """

    attack: Callable[..., Any]
    norms: tuple[str, ...] = ALL
    is_random: bool = True
    has_restarts: bool = False
    breaks: int = 1
    rtol: float = 1e-4


CASES = {
    "fgsm": Case(attacks.fgsm, is_random=False),
    "pgd": Case(partial(attacks.pgd, num_steps=6), has_restarts=True),
    "apgd": Case(partial(attacks.apgd, num_steps=12), ("linf", "l2"), has_restarts=True),
    "deepfool": Case(partial(attacks.deepfool, num_steps=8), is_random=False),
    "fab": Case(partial(attacks.fab, num_steps=6, num_restarts=2)),
    "fab_targeted": Case(partial(attacks.fab_targeted, num_steps=6, num_restarts=2, num_targets=2)),
    "ddn": Case(partial(attacks.ddn, num_steps=20, initial_norm=0.3), ("l2",), is_random=False),
    "fmn": Case(partial(attacks.fmn, num_steps=20), is_random=False),
    "square": Case(partial(attacks.square, num_steps=20), has_restarts=True),
    "nes": Case(partial(attacks.nes, num_steps=8, num_samples=20), rtol=1e-3),
    "spsa": Case(partial(attacks.spsa, num_steps=8, num_samples=20), rtol=1e-3),
    "nattack": Case(partial(attacks.nattack, num_steps=8, num_samples=20)),
    "prgf": Case(partial(attacks.prgf, num_steps=8, num_samples=20, sigma=1e-3), rtol=1e-2),
    "genattack": Case(partial(attacks.genattack, num_steps=20, population_size=6)),
    "zoo": Case(
        partial(attacks.zoo, num_steps=15, num_searches=2, num_coordinates=18, initial_c=1.0), ("l2",), rtol=1e-2,
    ),
}
