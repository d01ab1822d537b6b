"""The relatives of FGSM and PGD: steps by hand, queries, and what is left of a zero gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

from rdx import attacks, goals, losses
from rdx.balls import Ball

NORMS = ("linf", "l2", "l1")
FREE = {"low": -jnp.inf, "high": jnp.inf}


def _bowl(parameters, x):
    # The margin is 1 minus a weighted squared distance to the center: its gradient is 2 * weights * (center - x).
    center, weights = parameters
    loss = 1.0 - (weights * jnp.square(x - center)).sum(axis=1)
    return jnp.stack([jnp.zeros_like(loss), loss], axis=1)


def _steepest(gradient, norm):
    if norm == "linf":
        return np.sign(gradient)
    if norm == "l2":
        return gradient / np.linalg.norm(gradient)
    unit = np.zeros_like(gradient)
    unit[np.abs(gradient).argmax()] = np.sign(gradient[np.abs(gradient).argmax()])
    return unit


# One step of mim leads the last element too far: without momentum it turns round.
CENTER, START = np.array([0.9, -0.4, 0.35]), np.array([0.2, 0.1, 0.3])


def _attack(attack, *arguments, weights=(1.0, 1.0, 1.0), **options):
    x, labels = jnp.asarray(START, jnp.float32)[None], jnp.array([0])
    model = Partial(_bowl, tuple(jnp.asarray(leaf, jnp.float32)[None] for leaf in (CENTER, weights)))
    return attack(*arguments, model, x, labels, goal=goals.misclassify(losses.margin), **options)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("decay", [0.0, 0.7])
def test_mim_makes_the_steps_of_the_paper(norm, decay):
    point, momentum, weights = START, 0.0, np.array([1.0, 4.0, 2.0])
    for _ in range(4):
        gradient = 2.0 * weights * (CENTER - point)
        momentum = decay * momentum + gradient / np.abs(gradient).sum()
        point = point + 0.06 * _steepest(momentum, norm)
    # A radius that no step reaches; the loss rises all along, so the last iterate is the strongest.
    ball = Ball(norm, 2.0, **FREE)
    found = _attack(attacks.mim, ball=ball, num_steps=4, step_size=0.06, decay=decay, weights=weights)
    np.testing.assert_allclose(found.x_adv[0], point, rtol=1e-5)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_bim_steps_by_three_halves_of_its_share(norm):
    point = START
    for _ in range(10):
        point = point + 0.15 * 0.2 * _steepest(CENTER - point, norm)
        delta = point - START
        # All l2 steps go along one ray: there, projecting is scaling.
        length = np.linalg.norm(delta)
        point = START + (np.clip(delta, -0.2, 0.2) if norm == "linf" else delta * min(1.0, 0.2 / length))
    found = _attack(attacks.bim, ball=Ball(norm, 0.2, **FREE))
    np.testing.assert_allclose(found.x_adv[0], point, rtol=1e-5)
    np.testing.assert_array_equal((found.forwards, found.gradients), ([2], [10]))


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_rfgsm_follows_its_formula(norm, key):
    eps, share = 0.3, 0.25
    noise = jax.random.normal(jax.random.fold_in(jax.random.fold_in(key, 5), 0), (3,))
    start = START + share * eps * _steepest(np.asarray(noise), norm)
    end = start + (1 - share) * eps * _steepest(CENTER - start, norm)
    ball = Ball(norm, eps, **FREE)
    found = _attack(attacks.rfgsm, key, ball=ball, random_share=share, index=jnp.array([5]))
    seen = max((START, start, end), key=lambda point: -np.square(point - CENTER).sum())
    np.testing.assert_allclose(found.x_adv[0], seen, rtol=1e-5)
    np.testing.assert_array_equal((found.forwards, found.gradients), ([2], [1]))


def test_rfgsm_without_a_random_step_is_fgsm(key):
    ball = Ball("linf", 0.2)
    plain = _attack(attacks.fgsm, ball=ball)
    found = _attack(attacks.rfgsm, key, ball=ball, random_share=0.0)
    np.testing.assert_array_equal(plain.x_adv, found.x_adv)
    with pytest.raises(ValueError, match="share"):
        _attack(attacks.rfgsm, key, ball=ball, random_share=1.5)


@pytest.mark.parametrize("norm", NORMS)
def test_a_zero_gradient_stays_finite(norm, key):
    x, labels = jnp.full((2, 5), 0.5), jnp.array([0, 0])

    def flat(x):
        return jnp.zeros((len(x), 2)).at[:, 0].set(1.0) + 0.0 * x.sum(axis=1, keepdims=True)

    for attack in (attacks.mim, attacks.bim, lambda *args, **kwargs: attacks.rfgsm(key, *args, **kwargs)):
        found = attack(flat, x, labels, ball=Ball(norm, 0.1))
        assert jnp.isfinite(found.x_adv).all()
        assert not found.success.any()


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_momentum_weighs_every_gradient_alike(scale):
    # After a gradient of any size along the first axis, an opposite one cancels it; so does the l1 norm of large ones.
    def model(x):
        loss = scale * x.sum(axis=1)
        return jnp.stack([jnp.zeros_like(loss), loss], axis=1)

    x, labels = jnp.full((1, 3000), 0.5), jnp.array([1])
    goal = goals.misclassify(losses.margin)
    found = attacks.mim(model, x, labels, ball=Ball("l2", 0.5), goal=goal, num_steps=4)
    np.testing.assert_allclose(found.x_adv - x, jnp.full_like(x, -0.5 / np.sqrt(3000.0)), rtol=1e-3)
