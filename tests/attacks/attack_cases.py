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


# Steps so long that few suffice, from a constant that is about right.
_FAST = {"step_size": 0.1, "initial_constant": 0.1}

CASES = {
    "fgsm": Case(attacks.fgsm, is_random=False),
    "rfgsm": Case(attacks.rfgsm, has_restarts=True),
    "bim": Case(partial(attacks.bim, num_steps=6), is_random=False),
    "mim": Case(partial(attacks.mim, num_steps=6), is_random=False),
    "cw": Case(partial(attacks.cw, num_search_steps=4, num_steps=40, **_FAST), ("l2",), is_random=False),
    "cw_linf": Case(partial(attacks.cw_linf, num_steps=100, patience=10, **_FAST), ("linf",), is_random=False),
    "ead": Case(partial(attacks.ead, num_search_steps=4, num_steps=40, **_FAST), ("l1", "l2"), is_random=False),
    "pgd": Case(partial(attacks.pgd, num_steps=6), has_restarts=True),
    "apgd": Case(partial(attacks.apgd, num_steps=12), ("linf", "l2"), has_restarts=True),
}
