"""The masking zoo: defences that fool an attack are named as such, and the attack that is named breaks them."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

from rdx import attacks, data, goals, losses
from rdx.attacks import Loop, adaptive
from rdx.balls import Ball
from rdx.evaluate import attack_checks, checks, diagnose
from rdx.evaluate.inspection import inspect

KEY, BALL, NUM = jax.random.key(1), Ball("linf", 0.2), 60
APGD = functools.partial(attacks.apgd, num_steps=20)


def _mlp(parameters, x):
    first, second = parameters
    return jax.nn.relu((x.reshape(len(x), -1) - 0.3) @ first) @ second


@functools.cache
def _net():
    """Trains on the digits by 200 full steps with momentum."""
    source = data.load("digits", "train")
    x, labels = jnp.asarray(source.images, jnp.float32) / 255, jnp.asarray(source.labels)

    def step(state, _):
        parameters, speed = state
        slope = jax.grad(lambda p: losses.cross_entropy(_mlp(p, x), labels).mean())(parameters)
        speed = jax.tree.map(lambda v, g: 0.9 * v - 0.1 * g, speed, slope)
        return (jax.tree.map(jnp.add, parameters, speed), speed), None

    first, second = jax.random.split(jax.random.key(0))
    start = (0.15 * jax.random.normal(first, (64, 64)), 0.1 * jax.random.normal(second, (64, 10)))
    (parameters, _), _ = jax.jit(lambda s: jax.lax.scan(step, s, None, length=200))(
        (start, jax.tree.map(jnp.zeros_like, start))
    )
    return Partial(_mlp, parameters)


@functools.cache
def _data():
    source = data.load("digits", "test")
    return jnp.asarray(source.images[:NUM], jnp.float32) / 255, jnp.asarray(source.labels[:NUM])


def _accuracy(model, x):
    return float((model(x).argmax(axis=1) == _data()[1]).mean())


@functools.cache
def _undefended():
    x, labels = _data()
    assert _accuracy(_net(), x) > 0.9
    return _accuracy(_net(), APGD(KEY, _net(), x, labels, ball=BALL).x_adv)


def _saturating(net, x):
    logits = net(x)
    middle = jax.lax.top_k(logits, 2)[0].mean(axis=1, keepdims=True)
    return jnp.clip(1e4 * (logits - middle), -5.0, 5.0)


def _quantise(x):
    return jnp.round(4.0 * x) / 4.0


def _quantised(net, x):
    return net(_quantise(x))


def _through_the_quantiser(net, x):
    return net(adaptive.straight_through(_quantise)(x))


def _huge(net, x):
    return 1e4 * net(x)


def _stopped(net, x):
    return net(jax.lax.stop_gradient(x))


ZOO = {
    "saturating": (_saturating, "gradients", "attacks.transfer", lambda model, *args: attacks.transfer(APGD, _net())(
        KEY, model, *args, ball=BALL
    )),
    "quantised": (_quantised, "code", "straight_through", lambda model, *args: APGD(
        KEY, Partial(_through_the_quantiser, _net()), *args, ball=BALL
    )),
    "huge": (_huge, "loss", "losses.dlr", lambda model, *args: APGD(
        KEY, model, *args, ball=BALL, goal=goals.misclassify(losses.dlr)
    )),
    "stopped": (_stopped, "code", "adaptive.bpda", lambda model, *args: APGD(
        KEY, adaptive.bpda(model, _net()), *args, ball=BALL
    )),
}


@pytest.mark.parametrize("name", ZOO)
def test_masked_gradients_are_named_and_the_cure_works(name):
    wrapper, culprit, cure, attack = ZOO[name]
    x, labels = _data()
    model = Partial(wrapper, _net())
    assert _accuracy(model, APGD(KEY, model, x, labels, ball=BALL).x_adv) > 0.75
    diagnosis = diagnose(KEY, model, x, labels, ball=BALL)
    assert diagnosis.status == "fail"
    assert diagnosis[culprit].status == "fail"
    assert cure in diagnosis[culprit].try_next
    assert diagnosis["determinism"].status == diagnosis["batch"].status == diagnosis["validity"].status == "ok"
    assert _accuracy(model, attack(model, x, labels).x_adv) <= _undefended() + 0.02


def _noisy(net, keys, x):
    logits = net(x)
    return logits + 4.0 * jax.vmap(lambda key: jax.random.normal(key, logits.shape[1:]))(keys)


def _resized(net, keys, x):
    def change(key, image):
        size_key, place_key = jax.random.split(key)
        scale = jax.random.uniform(size_key, (2,), minval=0.86, maxval=1.14)
        shift = jax.random.uniform(place_key, (2,), minval=-0.7, maxval=0.7) + 4.0 * (1.0 - scale)
        return jax.image.scale_and_translate(image, image.shape, (0, 1), scale, shift, "linear", antialias=False)

    return net(jax.vmap(change)(keys, x))


def _one_draw(random_fn, x):
    return adaptive.eot(KEY, random_fn, 1)(x)[:, 0]


@pytest.mark.parametrize("wrapper", [_noisy, _resized])
def test_random_defences_are_named_and_expectation_breaks_them(wrapper):
    x, labels = _data()
    random_fn = Partial(wrapper, _net())

    def accuracy(x):
        rate = adaptive.stochastic_success(jax.random.key(9), random_fn, x, labels, num_draws=50)
        return float((rate <= 0.5).mean())

    assert accuracy(x) > 0.9
    # What stops at its first success, as suites of attacks do, stops by luck.
    lucky = APGD(KEY, Partial(_one_draw, random_fn), x, labels, ball=BALL, loop=Loop(stop=True))
    assert lucky.success.mean() > 0.95
    fooled = accuracy(lucky.x_adv)
    assert fooled > 0.25
    diagnosis = diagnose(KEY, random_fn, x, labels, ball=BALL, is_random=True)
    assert diagnosis.status == diagnosis["luck"].status == "fail"
    assert "adaptive.eot" in diagnosis["luck"].try_next
    assert diagnosis["randomness"].status == "warn"
    assert "num_samples" in diagnosis["randomness"].try_next
    goal = goals.expected(goals.misclassify(losses.margin))
    found = APGD(KEY, adaptive.eot(KEY, random_fn, 8), x, labels, ball=BALL, goal=goal)
    assert accuracy(found.x_adv) <= _undefended() + 0.02


def test_nothing_is_held_against_an_honest_net():
    x, labels = _data()
    certified = np.zeros(NUM, bool)
    diagnosis = diagnose(KEY, _net(), x, labels, ball=Ball("linf", 0.1), certified=certified)
    wrong = [(one.name, one.evidence) for one in diagnosis.checks if one.status == "fail"]
    assert not wrong
    # Comparisons of short attacks may be off by an example or two; what looks at the model may not.
    assert all(diagnosis[name].status == "ok" for name in (
        "code", "logits", "finite", "accuracy", "determinism", "batch", "gradients", "differences", "radius",
        "black box", "unbounded", "validity", "certificates",
    ))
    summary = json.loads(json.dumps(diagnosis.summary(), allow_nan=False))
    assert summary["num_examples"] == 32
    assert summary["status"] == diagnosis.status != "fail"
    assert len(summary["checks"]) == len(diagnosis.checks) == 16
    again = diagnose(KEY, _net(), x, labels, ball=Ball("linf", 0.1), certified=certified)
    assert again == diagnosis


@pytest.mark.parametrize("norm", ["l2", "l1"])
def test_other_norms_and_no_box(norm):
    x, labels = _data()
    ball = Ball(norm, {"l2": 0.7, "l1": 3.0}[norm], -np.inf, np.inf)
    diagnosis = diagnose(KEY, _net(), x, labels, ball=ball, num_examples=16, num_steps=12, num_queries=20)
    assert diagnosis["differences"].status == diagnosis["unbounded"].status == diagnosis["radius"].status == "ok"


def test_no_radius_masks_and_inputs_of_many_axes():
    x, labels = _data()
    options = {"num_examples": 8, "num_steps": 12, "num_queries": 2}
    still = diagnose(KEY, _net(), x, labels, ball=Ball("linf", 0.0), **options)
    assert still["unbounded"].status == still["differences"].status == still["validity"].status == "ok"
    assert still["radius"].numbers["double"] == 0.0
    # Square knows no such inputs, and the mask holds a half of them still.
    boxes, mask = x.reshape(NUM, 4, 2, 4, 2), jnp.zeros((1, 4, 2, 4, 2)).at[:, 2:].set(0.1)
    masked = diagnose(KEY, _net(), boxes, labels, ball=Ball("linf", mask), **options)
    assert masked["validity"].numbers["outside"] == masked["black box"].numbers["square"] == 0.0


def test_a_model_outside_jax_is_diagnosed_without_gradients():
    weights = np.asarray(_net().args[0][0] @ _net().args[0][1])

    def on_host(x):
        shape = jax.ShapeDtypeStruct((len(x), 10), x.dtype)
        return jax.pure_callback(lambda x: np.asarray(x).reshape(len(x), -1) @ weights, shape, x)

    x, labels = _data()
    diagnosis = diagnose(KEY, on_host, x, labels, ball=BALL, num_examples=8, num_steps=2, num_queries=5)
    assert diagnosis["code"].status == "fail"
    assert "pure_callback" in diagnosis["code"].evidence
    assert diagnosis["gradients"].status == "fail"
    assert "cannot be differentiated" in diagnosis["gradients"].evidence


def test_outputs():
    x, labels = _data()
    net = _net()
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
    x, _ = _data()
    net, rng = _net(), np.random.default_rng(0)
    by_name = lambda model: {one.name: one.status for one in checks.repeats(Partial(model), x)}

    def restless(x):
        shape = jax.ShapeDtypeStruct((len(x), 10), x.dtype)
        return net(x) + jax.pure_callback(lambda: rng.normal(size=shape.shape).astype(np.float32), shape)

    assert by_name(net) == {"determinism": "ok", "batch": "ok"}
    assert by_name(lambda x: net(x - x.mean(axis=0, keepdims=True))) == {"determinism": "ok", "batch": "fail"}
    assert by_name(lambda x: net(x) + jax.random.normal(KEY, (len(x), 10))) == {"determinism": "ok", "batch": "fail"}
    assert by_name(restless)["determinism"] == "fail"


def test_differences_tell_derivatives_of_something_else():
    x, labels = _data()
    error = lambda model: checks.differences(KEY, Partial(model), x, labels, BALL).numbers["error"]
    assert error(_net()) < 0.05
    assert error(Partial(_through_the_quantiser, _net())) > 0.25
    assert error(adaptive.bpda(_net(), lambda x: -_net()(x))) > 0.9
    assert error(lambda x: jnp.zeros((len(x), 10))) == 0.0


def _optimising(net, x):
    def step(point, i):
        slope = jax.grad(lambda v: jax.nn.logsumexp(net(v), axis=1).sum())(point)
        return jnp.clip(point + 0.01 * jnp.sign(slope), 0.0, 1.0)

    return net(adaptive.unrolled(step, x, 3))


def _directions():
    return jnp.eye(64).reshape(64, 1, 8, 8, 1)[:9]


def _descending(net, x):
    # Zeroth order: slopes from differences of the loss, one direction a turn.
    loss = lambda v: jax.nn.logsumexp(net(v), axis=1)[:, None, None, None]

    def step(point, direction):
        slope = loss(point + 0.1 * direction) - loss(point - 0.1 * direction)
        return point - 0.1 * slope * direction, None

    return net(jax.lax.scan(step, x, _directions())[0])


def _rejecting(net, x):
    is_unsure = lambda point: net(point).max() < 1.0
    return net(jax.lax.while_loop(is_unsure, lambda point: 0.9 * point, x.reshape(len(x), 64)))


def _along_itself(net, x):
    return x + jax.jvp(net, (x,), (x,))[1].mean(axis=1)[:, None, None, None]


def _forward_mode_in_a_loop(net, x):
    return net(jax.lax.scan(lambda point, _: (_along_itself(net, point), None), x, None, 2)[0])


def _recurrent(net, x):
    # As many hidden units as an input has elements.
    first, second = net.args[0]
    cell = lambda hidden, row: (jnp.tanh(hidden @ first + row[..., 0] @ first[:8]), None)
    return jax.lax.scan(cell, jnp.zeros((len(x), 64)), jnp.moveaxis(x, 1, 0))[0] @ second


def _layers_in_a_loop(net, x):
    first, second = net.args[0]
    layers = jnp.broadcast_to(first[:32, :32], (3, 32, 32))
    hidden = x.reshape(len(x), 64) @ first[:, :32]
    return jax.lax.scan(lambda h, w: (jax.nn.relu(h @ w), None), hidden, layers)[0] @ second[:32]


def _attending(net, x):
    # Keys in chunks, a sum shaped as the inputs.
    tokens = x[..., 0]

    def chunk(total, keys):
        weights = jnp.exp(jnp.einsum("btd,bsd->bts", tokens, keys))
        return total + jnp.einsum("bts,bsd->btd", weights, keys)[..., None], None

    return net(jax.lax.scan(chunk, jnp.zeros_like(x), jnp.moveaxis(tokens.reshape(len(x), 4, 2, 8), 1, 0))[0])


INSPECTED = {
    "plain": (lambda net, x: jax.jit(net)(x), True, ()),
    "log_softmax": (lambda net, x: jax.nn.log_softmax(net(x)), True, ()),
    "logsumexp": (lambda net, x: net(x) - jax.nn.logsumexp(net(x), axis=1, keepdims=True), True, ()),
    "unused": (lambda net, x: (jnp.round(x), net(x))[1], True, ()),
    "round": (_quantised, False, ("blocked",)),
    "in a jit": (lambda net, x: jax.jit(_quantised)(net, x), False, ("blocked",)),
    "in part": (lambda net, x: net(x) + net(jnp.floor(x)), True, ("blocked",)),
    "in a scan": (lambda net, x: net(jax.lax.scan(lambda c, _: (jnp.sign(c), c), x, None, 2)[0]), False, ("blocked",)),
    "in a branch": (lambda net, x: net(jax.lax.cond(x.sum() > 0, jnp.ceil, jnp.sin, x)), True, ("blocked",)),
    "in a while": (lambda net, x: net(jax.lax.while_loop(lambda c: c.sum() < 1, jnp.round, x)), False, ("blocked",)),
    "comparison": (lambda net, x: net((x > 0.5).astype(x.dtype)), False, ()),
    "threshold": (lambda net, x: net(jnp.where(x > 0.5, x, 0.0)), True, ()),
    "argmax": (lambda net, x: jax.nn.one_hot(net(x).argmax(axis=1), 10), False, ()),
    "random": (lambda net, x: net(x) + jax.random.normal(KEY, (1, 10)), True, ("random",)),
    "custom": (lambda net, x: net(attacks.translation_invariant(lambda v: v, jnp.ones((3, 3)))(x)), True, ("custom",)),
    "a scope's name": (lambda net, x: jax.named_scope("transpose_block")(net)(x), True, ()),
    "recurrent": (_recurrent, True, ()),
    "layers in a loop": (_layers_in_a_loop, True, ()),
    "attention in chunks": (_attending, True, ()),
    "dynamic": (_optimising, True, ("blocked", "dynamic", "search")),
    "in a map": (lambda net, x: net(x - jax.vmap(jax.grad(lambda v: net(v[None]).max()))(x)), True, ("dynamic",)),
    "forward mode": (lambda net, x: net(_along_itself(net, x)), True, ("dynamic",)),
    "forward mode in a loop": (_forward_mode_in_a_loop, True, ("dynamic", "search")),
    "zeroth order": (_descending, True, ("search",)),
    "a search in a condition": (_rejecting, True, ("search",)),
}


@pytest.mark.parametrize("name", INSPECTED)
def test_inspection(name):
    model, has_path, kinds = INSPECTED[name]
    net = _net()
    found = inspect(lambda x: model(net, x), _data()[0])
    assert found.has_path == has_path
    assert tuple(kind for kind in found._fields[1:] if getattr(found, kind)) == kinds
    assert checks.code(found).status == ("fail" if not has_path else "warn" if kinds else "ok")
    if kinds == ("blocked",):
        assert "test_diagnostics.py" in found.blocked[0]


def test_validity_and_certificates():
    x, labels = _data()
    found = APGD(KEY, _net(), x, labels, ball=BALL)
    judge = lambda x_adv, success: attack_checks.validity(_net(), x, labels, x_adv, success, BALL)
    assert judge(found.x_adv, found.success).status == "ok"
    assert judge(x, found.success).numbers["false"] > 0.9
    assert judge(found.x_adv.at[0, 0, 0].add(0.3), found.success).numbers["outside"] == pytest.approx(1 / NUM)
    assert judge(found.x_adv.at[0, 0, 0].set(jnp.nan), found.success).status == "fail"
    # Perturbations below half a grey level vanish as images.
    odd = lambda x: jnp.abs(255.0 * x - jnp.round(255.0 * x)).sum(axis=(1, 2, 3))
    tiny = Partial(lambda x: jnp.stack([-odd(x), jnp.full(len(x), -1.0)], axis=1))
    inside = jnp.clip(x + 0.001, 0.0, 1.0)
    undone = attack_checks.validity(tiny, x, jnp.zeros(NUM, int), inside, jnp.ones(NUM, bool), BALL)
    assert undone.status == "warn"
    assert undone.numbers["undone"] == 1.0
    broken = np.array([True, False, True])
    assert attack_checks.certified_versus_attacked(jnp.array([False, True, False]), broken).status == "ok"
    assert attack_checks.certified_versus_attacked(jnp.array([False, True, True]), broken).status == "fail"
