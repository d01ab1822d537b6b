"""Checks of outputs, passes and gradients, each one both ways."""

import jax
import jax.numpy as jnp
import masked
import numpy as np
from jax.tree_util import Partial
from masked import BALL, KEY, NUM

from rdx import losses, norms
from rdx.attacks import adaptive
from rdx.balls import Ball
from rdx.evaluate import checks, diagnose


def test_outputs():
    x, labels = masked.images()
    net = masked.net()
    by_name = lambda model: {one.name: one for one in checks.outputs(Partial(model), x, labels, x)}
    assert all(one.status == "ok" for one in by_name(net).values())
    assert by_name(lambda x: jax.nn.softmax(net(x)))["logits"].status == "fail"
    assert by_name(lambda x: jax.nn.log_softmax(net(x)))["logits"].status == "ok"
    assert by_name(lambda x: -net(x))["accuracy"].status == "warn"
    broken = lambda x: net(x) + jnp.log(-1.0 - x[:, 0, 0])
    diagnosis = diagnose(KEY, broken, x, labels, ball=BALL)
    assert diagnosis["finite"].status == "fail"
    assert len(diagnosis.checks) == 4


def test_repeats():
    x, _ = masked.images()
    net, rng = masked.net(), np.random.default_rng(0)
    by_name = lambda model: {one.name: one.status for one in checks.repeats(Partial(model), x)}

    def restless(x):
        shape = jax.ShapeDtypeStruct((len(x), 10), x.dtype)
        return net(x) + jax.pure_callback(lambda: rng.normal(size=shape.shape).astype(np.float32), shape)

    assert by_name(net) == {"determinism": "ok", "batch": "ok"}
    assert by_name(lambda x: net(x - x.mean(axis=0, keepdims=True))) == {"determinism": "ok", "batch": "fail"}
    assert by_name(lambda x: net(x) + jax.random.normal(KEY, (len(x), 10))) == {"determinism": "ok", "batch": "fail"}
    assert by_name(restless)["determinism"] == "fail"


def test_differences_tell_derivatives_of_something_else():
    x, labels = masked.images()
    error = lambda model: checks.differences(KEY, Partial(model), x, labels, BALL).numbers["error"]
    assert error(masked.net()) < 0.05
    assert error(Partial(masked.through_the_quantiser, masked.net())) > 0.25
    assert error(adaptive.bpda(masked.net(), lambda x: -masked.net()(x))) > 0.9
    assert error(lambda x: jnp.zeros((len(x), 10))) == 0.0


def _drawn_afresh(x):
    noise = jax.vmap(lambda key: jax.random.normal(key, (10,)))(adaptive.point_keys(KEY, x))
    return masked.net()(x) + 4.0 * noise


def _shrunk_off(x, points, rest):
    return jnp.where((points == x).all(axis=(1, 2, 3)), 1.0, rest)[:, None]


def test_a_landscape_of_jumps():
    x, labels = masked.images()
    found = lambda model, eps: checks.landscape(KEY, Partial(model), x, labels, Ball("linf", eps))
    assert found(masked.net(), 0.2).status == "ok"
    assert found(_drawn_afresh, 0.02).status == "fail"
    for rest, status in ((0.6, "ok"), (0.35, "warn"), (0.1, "fail")):
        told = found(lambda v, rest=rest: _shrunk_off(x, v, rest) * jax.nn.one_hot(labels, 10), 0.2)
        assert (told.status, bool(told.try_next)) == (status, status != "ok")
        np.testing.assert_allclose(told.numbers["margin"], 1.0 - rest, rtol=1e-5)


def test_gradients_are_counted_and_measured():
    x, labels = masked.images()
    net = masked.net()
    found = checks.gradients(net, x, labels)
    assert found.status == "ok"
    slopes = jax.grad(lambda x: losses.margin(net(x), labels).sum())(x)
    expected = np.quantile(norms.l2(slopes), [0.05, 0.5, 0.95])
    np.testing.assert_allclose([found.numbers[f"q{q}_margin"] for q in ("05", "50", "95")], expected, rtol=1e-5)
    for number, status in ((3, "warn"), (30, "fail")):
        stopped = (jnp.arange(NUM) < number)[:, None, None, None]
        halved = Partial(lambda x, stopped=stopped: net(jnp.where(stopped, jax.lax.stop_gradient(x), x)))
        assert checks.gradients(halved, x, labels).status == status
