"""Ramps against a transcription of the published formula in Python integers and doubles."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rdx.train import schedules


def _published(step, eps, start, length, share, per_epoch, beta):
    init = (start - 1) * per_epoch
    final = (start + length - 1) * per_epoch
    mid = int((final - init) * share) + init
    t = (mid - init) ** (beta - 1)
    alpha = eps / ((final - mid) * beta * t + (mid - init) * t)
    if step <= init:
        return 0.0
    if step < mid:
        return alpha * (step - init) ** beta
    at_mid = alpha * (mid - init) ** beta
    return at_mid + (eps - at_mid) * (min(step, final) - mid) / (final - mid)


@pytest.mark.parametrize(("start", "length", "share", "per_epoch", "beta"), [
    (3, 18, 0.3, 600, 4), (1, 5, 0.25, 7, 4), (2, 60, 0.25, 5000, 4), (2, 3, 0.5, 10, 2),
])
def test_smoothed_is_the_published_formula(start, length, share, per_epoch, beta):
    ramp = schedules.smoothed(0.3, start, length, share, per_epoch, beta=beta)
    total = (start + length + 1) * per_epoch
    steps = np.unique(np.concatenate([
        np.linspace(0, total, 400).astype(int), [ramp.start, ramp.start + 1, ramp.middle, ramp.end - 1, ramp.end]
    ]))
    values = np.asarray(jax.jit(jax.vmap(ramp))(jnp.asarray(steps, jnp.int32)))
    expected = [_published(int(step), 0.3, start, length, share, per_epoch, beta) for step in steps]
    np.testing.assert_allclose(values, expected, rtol=2e-5, atol=1e-7)
    assert (np.diff(values) >= 0).all()
    assert (values[steps <= ramp.start] == 0.0).all()
    assert (values[steps >= ramp.end] == np.float32(0.3)).all()
    assert (values[(steps > ramp.start) & (steps < ramp.end)] < np.float32(0.3)).all()


def test_smoothed_is_continuous_and_smooth_at_the_middle():
    ramp = schedules.smoothed(1.0, 1, 10, 0.3, 1000)
    slope = jax.grad(ramp)
    below, above = jnp.float32(ramp.middle - 1), jnp.float32(ramp.middle + 1)
    np.testing.assert_allclose(ramp(below), ramp(jnp.float32(ramp.middle)), atol=2e-4)
    np.testing.assert_allclose(slope(below), slope(above), rtol=2e-3)


@pytest.mark.parametrize("mid", [0.0, 1.0])
def test_smoothed_without_a_bent_or_a_straight_part(mid):
    ramp = schedules.smoothed(0.2, 1, 4, mid, 10)
    values = [float(ramp(step)) for step in (0, 20, 40)]
    np.testing.assert_allclose(values, [0.0, 0.1 if mid == 0.0 else 0.2 / 16, 0.2], rtol=1e-6)


def test_linear_ramp():
    ramp = schedules.linear_ramp(0.4, 10, 20)
    values = [float(ramp(step)) for step in (0, 10, 15, 20, 30, 31)]
    np.testing.assert_allclose(values, [0.0, 0.0, 0.1, 0.2, 0.4, 0.4], rtol=1e-6)
    assert values[-2] == values[-1] == np.float32(0.4)


def test_parameters_are_leaves_and_do_not_recompile():
    traces = []

    @jax.jit
    def value(ramp, step):
        traces.append(None)
        return ramp(step)

    for eps, start in itertools.product((0.1, 0.2), (1, 2)):
        value(schedules.smoothed(eps, start, 3, 0.3, 10), 5)
    assert len(traces) == 1


@pytest.mark.parametrize("arguments", [(0.1, 0, 3, 0.3, 10), (0.1, 1, 0, 0.3, 10), (0.1, 1, 3, 1.5, 10)])
def test_unusable_ramps_are_refused(arguments):
    with pytest.raises(ValueError, match="got"):
        schedules.smoothed(*arguments)
    with pytest.raises(ValueError, match="at least 1"):
        schedules.linear_ramp(0.1, 0, 0)
