"""Auto-PGD: the checkpoints, and the search against a plain transcription of the paper's Algorithm 1."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

from rdx import attacks, losses, norms
from rdx.attacks.apgd import checkpoints
from rdx.balls import Ball
from rdx.goals import Goal


def test_checkpoints():
    assert checkpoints(100) == [21, 40, 56, 69, 79, 86, 92, 98]
    assert checkpoints(50) == [10, 20, 29, 37, 44]
    assert checkpoints(20)[:4] == [3, 6, 8, 9]
    assert checkpoints(20)[-1] == 19
    assert checkpoints(1) == [0]


def _mlp(parameters, x):
    first, second = parameters
    return jnp.tanh(x @ first) @ second


def _wavy(parameters, x):
    first, second = parameters
    return jnp.sin(3.0 * x @ first) @ second


def _setting(num, network=_mlp):
    keys = jax.random.split(jax.random.key(2), 3)
    model = Partial(network, (2.0 * jax.random.normal(keys[0], (8, 16)), jax.random.normal(keys[1], (16, 5))))
    x = jax.random.uniform(keys[2], (num, 8))
    return model, x, model(x).argmax(axis=1)


def _first_point(norm, eps, key, x):
    """Draws the start as the attack does for example 0 and restart 0."""
    key = jax.random.fold_in(jax.random.fold_in(key, 0), 0)
    draw = jax.random.uniform(key, x.shape, minval=-1.0) if norm == "linf" else jax.random.normal(key, x.shape)
    return x + eps * draw / norms.norm(draw[None], norm)


def _algorithm_1(loss_and_gradient, project, direction, start, eps, num_steps, rho=0.75, alpha=0.75):
    """Runs one example as the paper writes it; returns the losses of all iterates."""
    windows = {c: c - b for b, c in zip([-1, *checkpoints(num_steps)], checkpoints(num_steps), strict=False)}
    point = previous = project(start)
    loss, gradient = loss_and_gradient(point)
    best, best_loss, best_gradient = point, loss, gradient
    size, was_halved, loss_at_check, rises = 2.0 * eps, True, loss, 0
    trail = [loss]
    for i in range(num_steps):
        towards = project(point + size * direction(gradient))
        a = alpha if i else 1.0
        moved = project(point + a * (towards - point) + (1 - a) * (point - previous))
        previous, point = point, moved
        new_loss, gradient = loss_and_gradient(point)
        rises, loss = rises + int(new_loss > loss), new_loss
        trail.append(loss)
        if loss > best_loss:
            best, best_loss, best_gradient = point, loss, gradient
        if i in windows:
            halve = rises <= rho * windows[i] or (not was_halved and loss_at_check >= best_loss)
            was_halved, loss_at_check, rises = halve, best_loss, 0
            if halve:
                size, point, gradient = 0.5 * size, best, best_gradient
    return trail


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize(("num_steps", "rho"), [(1, 0.75), (20, 0.75), (20, 0.5), (40, 0.1), (40, 0.3)])
def test_equals_algorithm_1(norm, num_steps, rho, key):
    model, x, labels = _setting(12, _wavy)
    eps = {"linf": 0.1, "l2": 0.3}[norm]
    value = jax.jit(jax.value_and_grad(lambda v, y: losses.cross_entropy(model(v[None]), y[None])[0]))
    project, direct = jax.jit(Ball.project), jax.jit(Ball.ascent_direction)
    # Loss alone decides, so that the result is the peak of the search.
    goal = Goal(Partial(losses.cross_entropy), Partial(lambda z, y: jnp.zeros(len(y), bool)))
    for i in range(len(x)):
        center, label, ball = x[i:i + 1], labels[i], Ball(norm, eps)
        trail = _algorithm_1(
            lambda v, label=label: value(v, label),
            lambda v, center=center, ball=ball: project(ball, v[None], center)[0],
            lambda g, ball=ball: direct(ball, g[None])[0],
            _first_point(norm, eps, key, x[i]), eps, num_steps, rho,
        )
        found = attacks.apgd(
            key, model, center, labels[i:i + 1], ball=ball, goal=goal, num_steps=num_steps, rho=rho,
        )
        np.testing.assert_allclose(found.loss[0], max(trail), rtol=2e-5)


def test_halving_wins_where_fixed_steps_oscillate(key):
    # -|x - 0.5| per element: steps of fixed length jump across the ridge for ever.
    target = jnp.array([[0.513, 0.487, 0.5021]])
    model = Partial(lambda c, v: jnp.stack([jnp.zeros(1), -jnp.abs(v - c).sum(axis=1)], axis=1), target)
    x, labels, ball = jnp.full((1, 3), 0.5), jnp.array([0]), Ball("linf", 0.3)
    auto = attacks.apgd(key, model, x, labels, ball=ball, num_steps=100)
    fixed = attacks.pgd(key, model, x, labels, ball=ball, num_steps=100, step_size=0.6)
    assert np.abs(auto.x_adv - target).max() < 0.02
    assert np.abs(fixed.x_adv - target).max() > 2 * np.abs(auto.x_adv - target).max()


def test_beats_pgd_on_average(key):
    model, x, labels = _setting(64)
    auto = attacks.apgd(key, model, x, labels, ball=Ball("linf", 0.08), num_steps=40)
    plain = attacks.pgd(key, model, x, labels, ball=Ball("linf", 0.08), num_steps=40)
    assert auto.loss.mean() >= plain.loss.mean() - 0.02
