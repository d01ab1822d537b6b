"""Transfer: what is crafted where, what is judged where, and the two wrappers that make gradients transfer."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

from rdx import attacks, goals, losses
from rdx.attacks import Loop, adaptive
from rdx.attacks.transfer import diverse_inputs, smoothing_kernel, transfer, translation_invariant
from rdx.balls import Ball

KEY, BALL = jax.random.key(5), Ball("linf", 0.1)
PGD = partial(attacks.pgd, num_steps=4)


def _linear(weight, x):
    return x.reshape(len(x), -1) @ weight


def _net(seed, shape=(6, 5, 2)):
    return Partial(_linear, jax.random.normal(jax.random.key(seed), (int(np.prod(shape)), 3)))


def _batch(num=6, shape=(6, 5, 2)):
    x = jax.random.uniform(jax.random.key(2), (num, *shape))
    return x, _net(1, shape)(x).argmax(axis=1)


def test_what_is_crafted_on_the_substitute_is_judged_at_the_target():
    x, labels = _batch(24)
    target, substitute, goal = _net(1), _net(8), goals.misclassify(losses.margin)
    crafted = PGD(KEY, substitute, x, labels, ball=BALL, goal=goal)
    found = transfer(PGD, substitute)(KEY, target, x, labels, ball=BALL, goal=goal)
    at_target, clean = (losses.margin(target(point), labels) for point in (crafted.x_adv, x))
    np.testing.assert_allclose(found.loss, jnp.maximum(at_target, clean), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(found.success, found.loss > 0)
    gains = np.asarray(at_target > clean)
    assert gains.any()
    assert not gains.all()
    np.testing.assert_array_equal(found.x_adv[gains], crafted.x_adv[gains])
    np.testing.assert_array_equal(found.x_adv[~gains], x[~gains])
    assert (found.forwards == 2).all()
    assert (found.gradients == 0).all()


def test_from_itself_it_is_the_attack():
    x, labels = _batch()
    direct = PGD(KEY, _net(1), x, labels, ball=BALL)
    found = transfer(PGD, _net(1))(KEY, _net(1), x, labels, ball=BALL)
    np.testing.assert_array_equal(found.x_adv, direct.x_adv)
    np.testing.assert_array_equal(found.success, direct.success)


def test_deterministic_attacks_ensembles_targets_and_jit():
    x, labels = _batch()
    goal = goals.target((labels + 1) % 3)
    attack = transfer(attacks.fgsm, adaptive.ensemble(_net(1), _net(8)), lift=goals.expected)
    run = lambda x, labels: attack(_net(1), x, labels, ball=Ball("linf", 0.3), goal=goal)
    found, compiled = run(x, labels), jax.jit(run)(x, labels)
    np.testing.assert_array_equal(found.success, _net(1)(found.x_adv).argmax(axis=1) == (labels + 1) % 3)
    assert found.success.any()
    np.testing.assert_allclose(found.x_adv, compiled.x_adv, atol=1e-6)
    with pytest.raises(ValueError, match="trace"):
        transfer(PGD, _net(1))(KEY, _net(1), x, labels, ball=BALL, loop=Loop(trace=True))


def test_diverse_inputs_shrink_and_shift_each_image():
    x = 0.5 + 0.5 * jax.random.uniform(KEY, (200, 10, 10, 1))
    shown = diverse_inputs(KEY, lambda x: x, resize_rate=0.7, probability=0.5)(x)
    is_lit = np.asarray(shown[..., 0] > 0)
    rows, columns = is_lit.any(axis=2).sum(axis=1), is_lit.any(axis=1).sum(axis=1)
    np.testing.assert_array_equal(rows, columns)  # squares stay square
    np.testing.assert_array_equal(is_lit.sum(axis=(1, 2)), rows * columns)
    assert set(rows) == {7, 8, 9, 10}
    first = is_lit.any(axis=2).argmax(axis=1)
    assert set(first[rows == 7]) == {0, 1, 2, 3}
    # Half stay as they are, and a quarter of the others are resized to their own size.
    unchanged = np.asarray((shown == x).all(axis=(1, 2, 3)))
    assert 0.625 - 0.14 < unchanged.mean() < 0.625 + 0.14  # four standard errors
    # Bilinear interpolation of a plane is the plane.
    ramp = jnp.broadcast_to(jnp.arange(1.0, 11.0)[None, :, None, None], (50, 10, 10, 1))
    image = np.asarray(diverse_inputs(KEY, lambda x: x, resize_rate=0.5, probability=1.0)(ramp))[0, :, :, 0]
    lit = image[image.any(axis=1)][:, image.any(axis=0)][1:-1]
    np.testing.assert_allclose(np.diff(lit[:, 0]), 10.0 / len(image[image.any(axis=1)]), rtol=1e-4)
    alone = diverse_inputs(KEY, lambda x: x, resize_rate=0.7, probability=0.5)(x[3:4])
    np.testing.assert_allclose(alone[0], shown[3], atol=1e-6)


def test_fresh_draws_at_every_step_and_their_gradient():
    x, labels = _batch(4)
    fn = diverse_inputs(KEY, _net(1), probability=1.0, resize_rate=0.5)
    gradient = jax.grad(lambda x: losses.cross_entropy(fn(x), labels).sum())
    assert jnp.isfinite(gradient(x)).all()
    assert (jnp.abs(fn(x + 1e-6) - fn(x)) > 1e-3).any()
    none = diverse_inputs(KEY, _net(1), probability=0.0)
    np.testing.assert_array_equal(none(x), _net(1)(x))


def test_kernels():
    uniform = smoothing_kernel("uniform", 3)
    np.testing.assert_allclose(uniform, np.full((3, 3), 1 / 9), rtol=1e-6)
    linear = smoothing_kernel("linear", 3)
    np.testing.assert_allclose(linear, np.outer([1, 2, 1], [1, 2, 1]) / 16, rtol=1e-6)
    gaussian = smoothing_kernel("gaussian", 15)
    np.testing.assert_allclose(gaussian.sum(), 1.0, rtol=1e-6)
    # The released code's: normal densities at 15 points of [-3, 3].
    np.testing.assert_allclose(gaussian[7, 0] / gaussian[7, 7], np.exp(-4.5), rtol=1e-5)
    np.testing.assert_allclose(gaussian[7, 6] / gaussian[7, 7], np.exp(-0.5 * (3 / 7) ** 2), rtol=1e-5)
    np.testing.assert_array_equal(smoothing_kernel("linear", 1), [[1.0]])
    for arguments, reason in ((("gaussian", 4), "odd"), (("box", 3), "Unknown")):
        with pytest.raises(ValueError, match=reason):
            smoothing_kernel(*arguments)


def test_smoothed_gradients_are_the_convolution():
    x, labels = _batch(3)
    kernel = smoothing_kernel("linear", 3).at[0, 1].add(0.3)  # not symmetric
    fn = translation_invariant(_net(1), kernel)
    np.testing.assert_array_equal(fn(x), _net(1)(x))
    plain, smooth = (jax.grad(lambda x, f=f: losses.margin(f(x), labels).sum())(x) for f in (_net(1), fn))
    padded = np.pad(np.asarray(plain), ((0, 0), (1, 1), (1, 1), (0, 0)))
    by_hand = sum(float(kernel[i, j]) * padded[:, i:i + 6, j:j + 5] for i in range(3) for j in range(3))
    np.testing.assert_allclose(smooth, by_hand, rtol=1e-4, atol=1e-5)


def test_the_wrappers_compose_with_an_attack_under_jit():
    x, labels = _batch()
    source = translation_invariant(diverse_inputs(KEY, _net(8)), smoothing_kernel(size=3))
    momentum = transfer(partial(attacks.mim, num_steps=4), source)
    runs = [lambda x: transfer(PGD, source)(KEY, _net(1), x, labels, ball=BALL),
            lambda x: momentum(_net(1), x, labels, ball=BALL)]
    for found in (runs[0](x), jax.jit(runs[0])(x), runs[1](x)):
        assert BALL.contains(found.x_adv, x).all()
        assert (found.loss >= losses.cross_entropy(_net(1)(x), labels) - 1e-5).all()
