"""Every public attack with settings for the small net of the battery: one line each."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

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
        varies: the share of results that another key changes, at least; small where the first restart is the same.
        rtol: how far losses may differ between ways of running it: sums in another order, amplified by the steps.
    """

    attack: Callable[..., Any]
    norms: tuple[str, ...] = ALL
    is_random: bool = True
    has_restarts: bool = False
    breaks: int = 1
    varies: float = 0.5
    rtol: float = 1e-4


def _mlp(parameters, x):
    first, second = parameters
    return jnp.tanh(3.0 * (x.reshape(x.shape[0], -1) - 0.5) @ first) @ second


def model():
    """Builds the small net of the battery."""
    first, second = jax.random.split(jax.random.key(7))
    return Partial(_mlp, (jax.random.normal(first, (18, 12)), jax.random.normal(second, (12, 4))))


def _blind_prior(x, labels, *data):
    return jnp.cos(7.0 * x)


def _autoattack(key, logits_fn, x, labels, *, ball, version, **options):
    """Runs AutoAttack as it is, but with a goal."""
    suite = attacks.suite(ball.norm, version=version, num_steps=6, num_queries=10)
    return attacks.cascade(key, suite, logits_fn, x, labels, ball=ball, **options).result


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
    "apgd": Case(partial(attacks.apgd, num_steps=12), has_restarts=True),
    "apgd_targeted": Case(partial(attacks.apgd_targeted, num_steps=8), has_restarts=True),
    "deepfool": Case(partial(attacks.deepfool, num_steps=8), is_random=False),
    "fab": Case(partial(attacks.fab, num_steps=3, num_restarts=4), varies=0.2),
    "fab_targeted": Case(partial(attacks.fab_targeted, num_steps=3, num_restarts=3, num_targets=2), varies=0.2),
    "ddn": Case(partial(attacks.ddn, num_steps=20, initial_norm=0.3), ("l2",), is_random=False),
    "fmn": Case(partial(attacks.fmn, num_steps=10), is_random=False),
    "square": Case(partial(attacks.square, num_steps=20), has_restarts=True),
    "nes": Case(partial(attacks.nes, num_steps=8, num_samples=20), rtol=1e-3),
    "spsa": Case(partial(attacks.spsa, num_steps=8, num_samples=20), rtol=1e-3),
    "nattack": Case(partial(attacks.nattack, num_steps=8, num_samples=20)),
    "prgf": Case(partial(attacks.prgf, num_steps=8, num_samples=20, sigma=1e-3), rtol=1e-2),
    "prgf_guided": Case(
        partial(attacks.prgf, num_steps=8, num_samples=20, sigma=1e-3, prior_fn=Partial(_blind_prior)), rtol=1e-2,
    ),
    "genattack": Case(partial(attacks.genattack, num_steps=20, population_size=6)),
    "zoo": Case(
        partial(attacks.zoo, num_steps=30, num_searches=2, num_coordinates=9, initial_c=1.0), ("l2",), rtol=1e-2,
    ),
    "boundary": Case(partial(attacks.boundary, num_queries=400, spherical_step=0.1, source_step=0.03), ("l2",)),
    "evolutionary": Case(partial(attacks.evolutionary, num_queries=400), ("l2",), rtol=1e-3),
    "hopskipjump": Case(partial(attacks.hopskipjump, num_queries=400), ("l2", "linf")),
    "opt": Case(partial(attacks.opt, num_queries=400, num_directions=20), ("l2",)),
    "transfer": Case(attacks.transfer(partial(attacks.pgd, num_steps=6), model())),
    "autoattack": Case(partial(_autoattack, version="standard"), varies=0.2),
    "autoattack_plus": Case(partial(_autoattack, version="plus"), varies=0.2),
}
# Public attacks that have no case of their own.
WITHOUT = {
    "cascade": "the cases of AutoAttack run it",
    "cascade_rand": "of random models, whose loss is a share of draws: tests/attacks/test_autoattack.py",
    "autoattack_rand": "as cascade_rand",
    "transfer": "of another attack, it has no arguments of its own for the examples",
}
