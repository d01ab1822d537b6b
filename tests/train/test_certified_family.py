"""Losses of certified training against closed forms, the ends of their weights, and each other."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rdx import attacks, bounds, losses, models, train
from rdx.balls import Ball
from rdx.bounds import Interval
from rdx.train import certified, convex_outer, expressive, fast_ibp, penalties, phased, sabr, schedules, standard, taps

BALL = Ball("linf", 0.0)
RAMP = schedules.linear_ramp(0.1, 10, 20)
QUARTER, END = jnp.int32(15), jnp.int32(30)
SHORT = functools.partial(attacks.pgd, num_steps=3)
LATENT = functools.partial(attacks.pgd, num_steps=4)
CONVS = (models.Conv(4, 3, 2), models.Conv(4, 3, 1))

# Every builder with its settings bound: (forward, ball, *, eps) -> loss.
BUILDERS = {
    "fused": certified.fused,
    "fast_ibp": fast_ibp.fast_ibp,
    "sabr": functools.partial(sabr.sabr, attack=SHORT),
    "mtl_ibp": functools.partial(expressive.mtl_ibp, attack=SHORT),
    "cc_ibp": functools.partial(expressive.cc_ibp, attack=SHORT),
    "exp_ibp": functools.partial(expressive.exp_ibp, attack=SHORT),
    "taps": functools.partial(taps.taps, cut=2, latent_attack=LATENT),
    "staps": functools.partial(taps.staps, cut=2, latent_attack=LATENT, attack=SHORT),
    "convex_outer": convex_outer.convex_outer,
}


def _net(name="plain"):
    model = models.ConvNet(CONVS, (8,), 3) if name == "plain" else models.BatchNormConvNet(CONVS, (8,), 3)
    labels = jnp.arange(6, dtype=jnp.int32) % 3
    pattern_key, noise_key = jax.random.split(jax.random.key(0))
    patterns = 0.25 + 0.5 * jax.random.bernoulli(pattern_key, shape=(3, 6, 6, 1)).astype(jnp.float32)
    x = patterns[labels] + 0.2 * jax.random.uniform(noise_key, (6, 6, 6, 1))
    variables = model.init(jax.random.key(1), x)
    state = {key: value for key, value in variables.items() if key != "params"}
    batch = {"x": x, "labels": labels, "index": jnp.arange(10, 16, dtype=jnp.int32)}
    return models.forward(model), variables["params"], state, batch


@jax.jit
def _value(loss, params, state, batch, step):
    return loss(params, state, jax.random.key(5), batch, step)


@jax.jit
def _gradient(loss, params, state, batch, step):
    return jax.grad(lambda p: loss(p, state, jax.random.key(5), batch, step)[0])(params)


@functools.cache
def _loss(name, net="plain"):
    return BUILDERS[name](_net(net)[0], BALL, eps=RAMP)


@pytest.mark.parametrize(("name", "net"), [
    *((name, "plain") for name in BUILDERS), *((name, "batch norm") for name in ("fast_ibp", "cc_ibp", "staps")),
])
def test_values_are_finite_and_gradients_reach_every_layer(name, net):
    _, params, state, batch = _net(net)
    loss, (next_state, metrics) = _value(_loss(name, net), params, state, batch, QUARTER)
    assert np.isfinite(loss)
    assert metrics["robust_loss"] > 0
    np.testing.assert_allclose(metrics["eps"], 0.025, rtol=1e-5)
    assert jax.tree.structure(next_state) == jax.tree.structure(state)
    gradient = _gradient(_loss(name, net), params, state, batch, QUARTER)
    kernels = {jax.tree_util.keystr(path): np.abs(leaf).max()
               for path, leaf in jax.tree_util.tree_leaves_with_path(gradient) if path[-1].key == "kernel"}
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
    assert min(kernels.values()) > 0, kernels


@pytest.mark.parametrize("name", ["fused", "fast_ibp", "mtl_ibp", "taps"])
def test_bounds_and_attacks_use_the_statistics_of_the_clean_batch(name):
    _, params, state, batch = _net("batch norm")
    other = jax.tree.map(lambda leaf: leaf + 5.0, state)  # wrong running statistics change nothing in training
    found, (next_state, _) = _value(_loss(name, "batch norm"), params, state, batch, QUARTER)
    np.testing.assert_allclose(found, _value(_loss(name, "batch norm"), params, other, batch, QUARTER)[0], rtol=1e-5)
    wanted = _value(standard.cross_entropy(_net("batch norm")[0]), params, state, batch, QUARTER)[1][0]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), next_state, wanted)


@pytest.mark.parametrize("name", BUILDERS)
def test_a_few_steps_lower_the_loss(name):
    forward, _, _, batch = _net()
    loss, start = BUILDERS[name](forward, BALL, eps=schedules.linear_ramp(0.02, -1, 1)), _cleanly_trained()
    _, history = train.fit(loss, start, OPTIMIZER, lambda step: batch, key=jax.random.key(2), num_steps=150,
                           log_every=10, progress=False)
    assert history[-1]["loss"] < 0.9 * history[0]["loss"]
    assert history[-1]["robust_loss"] < 0.9 * history[0]["robust_loss"]


OPTIMIZER = optax.chain(optax.clip_by_global_norm(10.0), optax.adam(0.01))


@functools.cache
def _cleanly_trained():
    # Nets that start at a radius, without a ramp, collapse to constant logits.
    forward, params, state, batch = _net()
    return train.fit(standard.cross_entropy(forward), train.init_state(params, state, OPTIMIZER), OPTIMIZER,
                     lambda step: batch, key=jax.random.key(2), num_steps=100, progress=False)[0]


@pytest.mark.parametrize("name", ["mtl_ibp", "exp_ibp", "taps"])
def test_masked_rows_do_not_count(name):
    _, params, state, batch = _net()
    part = {name: value[:4] for name, value in batch.items()}
    loss = _loss(name)
    wanted, (_, metrics) = _value(loss, params, state, part, QUARTER)
    found, (_, masked) = _value(loss, params, state, {**batch, "mask": jnp.arange(6) < 4}, QUARTER)
    np.testing.assert_allclose(found, wanted, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), masked, metrics)


def _interval_loss(params, batch, eps=0.1):
    logits_fn, region = _net()[0].logits_fn(params, {}), Ball("linf", eps).region(batch["x"])
    return float(jax.jit(bounds.worst_case)(logits_fn, region, batch["labels"]).loss.mean())


def _attacked_loss(params, batch, eps=0.1):
    logits_fn = _net()[0].logits_fn(params, {})
    found = SHORT(jax.random.key(5), logits_fn, batch["x"], batch["labels"], ball=Ball("linf", eps),
                  index=batch["index"])
    return float(losses.cross_entropy(logits_fn(found.x_adv), batch["labels"]).mean())


@pytest.mark.parametrize("build", [expressive.mtl_ibp, expressive.cc_ibp, expressive.exp_ibp])
def test_expressive_losses_lead_from_the_attacked_loss_to_that_of_intervals(build):
    forward, params, state, batch = _net()
    batch = jax.tree.map(lambda leaf: leaf[:1], batch)
    values = [float(_value(build(forward, BALL, eps=RAMP, alpha=alpha, attack=SHORT), params, state, batch, END)[0])
              for alpha in (0.0, 0.3, 0.7, 1.0)]
    assert values == sorted(values)
    np.testing.assert_allclose(values[0], _attacked_loss(params, batch), rtol=1e-4)
    np.testing.assert_allclose(values[-1], _interval_loss(params, batch), rtol=1e-4)
    assert values[-1] > 1.05 * values[0]


def test_expressive_losses_are_their_formulas():
    forward, params, state, batch = _net()
    mtl, cc, exp = (
        float(_value(build(forward, BALL, eps=RAMP, alpha=0.3, attack=SHORT), params, state,
                     jax.tree.map(lambda leaf: leaf[:1], batch), END)[0])
        for build in (expressive.mtl_ibp, expressive.cc_ibp, expressive.exp_ibp)
    )
    one = jax.tree.map(lambda leaf: leaf[:1], batch)
    low, high = _attacked_loss(params, one), _interval_loss(params, one)
    np.testing.assert_allclose(mtl, 0.7 * low + 0.3 * high, rtol=1e-4)
    np.testing.assert_allclose(exp, low**0.7 * high**0.3, rtol=1e-4)
    # The loss of a mean is at most the mean of losses: E is convex.
    assert cc <= mtl + 1e-6
    # Of a batch, Exp-IBP multiplies the means.
    loss = expressive.exp_ibp(forward, BALL, eps=RAMP, alpha=0.3, attack=SHORT)
    wanted = _attacked_loss(params, batch)**0.7 * _interval_loss(params, batch)**0.3
    np.testing.assert_allclose(_value(loss, params, state, batch, END)[0], wanted, rtol=1e-4)


def test_attacks_may_go_farther_than_bounds():
    forward, params, state, batch = _net()
    loss = expressive.mtl_ibp(forward, BALL, eps=RAMP, alpha=0.3, attack=SHORT, attack_scale=2.0)
    _, (_, metrics) = _value(loss, params, state, batch, END)
    np.testing.assert_allclose(metrics["adversarial_loss"], _attacked_loss(params, batch, eps=0.2), rtol=1e-4)
    np.testing.assert_allclose(metrics["certified_loss"], _interval_loss(params, batch), rtol=1e-4)


def test_sabr_leads_from_the_attacked_loss_to_that_of_intervals():
    forward, params, state, batch = _net()
    values = [float(_value(sabr.sabr(forward, BALL, eps=RAMP, subselection=share, attack=SHORT), params, state, batch,
                           END)[0]) for share in (0.0, 0.4, 1.0)]
    assert values == sorted(values)
    np.testing.assert_allclose(values[0], _attacked_loss(params, batch), rtol=1e-4)
    np.testing.assert_allclose(values[-1], _interval_loss(params, batch), rtol=1e-4)


def test_small_boxes_lie_in_the_large_one():
    forward, params, state, batch = _net()
    x = batch["x"].at[:, 0].set(0.0).at[:, 1].set(1.0)  # there the whole box is half as wide
    ball, batch = Ball("linf", 0.1), {**batch, "x": x}
    stage = phased.Stage(jax.random.key(0), forward, params, state, batch, ball, jnp.float32(1.0))
    large = ball.region(x)
    for share in (0.3, 0.8):
        small = sabr.small_box(SHORT, share, stage)
        assert (small.lower >= large.lower - 1e-6).all()  # one rounding of sums near 1
        assert (small.upper <= large.upper + 1e-6).all()
        widths = np.minimum(0.2 * share, large.upper - large.lower)
        np.testing.assert_allclose(small.upper - small.lower, widths, atol=1e-6)
        if share == 0.3:
            assert float(jnp.abs(small.center - x).max()) > 0.05
        # Penalties are of the bounds in the small box.
        layers = [layer for name, layer in stage.within(small).intervals.layers.items() if "relu" in name]
        wanted = penalties.tightness(widths.mean(), layers, tolerance=0.9)
        loss = sabr.sabr(forward, BALL, eps=schedules.linear_ramp(0.2, -10, 20), subselection=share, attack=SHORT,
                         penalties=(penalties.of_bounds(tolerance=0.9),))
        _, (_, metrics) = loss(params, state, jax.random.key(0), batch, jnp.int32(0))
        np.testing.assert_allclose(metrics["tightness"], wanted, rtol=1e-4)
        assert wanted > 0.01


def test_fused_training_ends_as_ibp_does():
    forward, params, state, batch = _net()
    found, wanted = (_value(build(forward, BALL, eps=RAMP), params, state, batch, END)
                     for build in (certified.fused, certified.ibp))
    np.testing.assert_allclose(found[0], wanted[0], rtol=1e-5)
    np.testing.assert_allclose(found[1][1]["certified_error"], wanted[1][1]["certified_error"])
    ends = [phase.until_step for phase in certified.phases(forward, BALL, eps=RAMP, loss=certified.fused)]
    assert ends == [11, 30, None]


def test_convex_outer_bounds_are_those_of_the_dual_network():
    # One hidden layer, no box: Theorem 1 of Wong & Kolter written out.
    keys = jax.random.split(jax.random.key(3), 4)
    first, second = jax.random.normal(keys[0], (5, 7)), jax.random.normal(keys[1], (7, 3))
    a, b, x = jax.random.normal(keys[2], (7,)), jnp.zeros(3), jax.random.uniform(keys[3], (2, 5))
    labels, eps = jnp.array([0, 2], jnp.int32), 0.3
    model = models.MLP((7,), 3)
    params = {"Dense_0": {"kernel": first, "bias": a}, "Dense_1": {"kernel": second, "bias": b}}
    ball = Ball("linf", 0.0, low=-jnp.inf, high=jnp.inf)
    loss = convex_outer.convex_outer(models.forward(model), ball, eps=schedules.linear_ramp(eps, -1, 1))
    found = _value(loss, params, {}, {"x": x, "labels": labels}, END)[0]
    wanted = []
    for point, label in zip(np.asarray(x), np.asarray(labels), strict=True):
        z, spread = point @ first + a, eps * np.abs(first).sum(axis=0)
        lower, upper = z - spread, z + spread
        slope = np.where(lower >= 0, 1.0, np.where(upper <= 0, 0.0, upper / (upper - lower)))
        exponents = []
        for other in {0, 1, 2} - {int(label)}:
            nu_hat = np.asarray(second[:, label] - second[:, other])
            nu = slope * nu_hat
            unstable = (lower < 0) & (upper > 0)
            value = nu @ a + point @ (first @ nu) - eps * np.abs(first @ nu).sum()
            # Rows below 0 meet the hull's upper face, u (z - l) / (u - l).
            value += np.where(unstable & (nu_hat < 0), -slope * lower * nu_hat, 0.0).sum()
            exponents.append(-value)
        wanted.append(np.log1p(np.exp(exponents).sum()))
    np.testing.assert_allclose(found, np.mean(wanted), rtol=1e-5)


def test_initial_kernels_have_the_variance_that_keeps_widths():
    model = models.MLP((400, 400), 10)
    params = model.init(jax.random.key(0), jnp.zeros((1, 300)))["params"]
    drawn = fast_ibp.init(jax.random.key(1), jax.tree.map(lambda leaf: leaf + 0.5, params))
    for name, fan_in in (("Dense_0", 300), ("Dense_1", 400)):
        spread = math.sqrt(2 * math.pi) / fan_in
        # 120,000 draws: the sample's deviation is within 0.6 percent, three of its standard errors.
        np.testing.assert_allclose(np.std(drawn[name]["kernel"]), spread, rtol=0.02)
        np.testing.assert_allclose(np.mean(drawn[name]["kernel"]), 0.0, atol=0.02 * spread)
        np.testing.assert_array_equal(drawn[name]["bias"], 0.5)
    conv = models.ConvNet((models.Conv(64, 3), models.Conv(256, 3)), (), 2)
    kernel = fast_ibp.init(jax.random.key(1), conv.init(jax.random.key(0), jnp.zeros((1, 4, 4, 1)))["params"])["Conv_1"]
    np.testing.assert_allclose(np.std(kernel["kernel"]), math.sqrt(2 * math.pi) / (9 * 64), rtol=0.02)
    # Around the input 0 with biases 0, every layer keeps the width.
    unbiased = fast_ibp.init(jax.random.key(1), params)
    layers = bounds.details(bounds.ibp, models.logits_fn(model, {"params": unbiased}),
                            Ball("linf", 0.01, low=-1.0).region(jnp.zeros((1, 300)))).layers
    widths = [float((layer.upper - layer.lower).mean()) for layer in layers.values()]
    np.testing.assert_allclose(widths[1] / widths[0], 1.0, atol=0.1)


def test_penalties_are_their_formulas_and_vanish_where_nothing_is_wrong():
    on, off = jnp.array([[1.0, 2.0]]), jnp.array([[-2.0, -1.0]])
    center = jnp.concatenate([on, off], axis=1)
    balanced = Interval(center - 0.1, center + 0.1)
    np.testing.assert_allclose(penalties.relu_balance([balanced]), 0.0, atol=1e-6)
    np.testing.assert_allclose(penalties.tightness(jnp.float32(0.2), [balanced]), 0.0, atol=1e-6)
    # Twice as wide is within the tolerance of 1/2, five times is not: (0.5 - 0.2) / 0.5.
    np.testing.assert_allclose(penalties.tightness(jnp.float32(0.1), [balanced]), 0.0, atol=1e-6)
    np.testing.assert_allclose(penalties.tightness(jnp.float32(0.04), [balanced]), 0.6, rtol=1e-4)
    # Only units that are on: both ratios are 0. None that is sure: nothing to balance.
    np.testing.assert_allclose(penalties.relu_balance([Interval(on - 0.1, on + 0.1)]), 2.0, rtol=1e-5)
    np.testing.assert_allclose(penalties.relu_balance([Interval(center - 5.0, center + 5.0)]), 0.0)
    # Sums in the ratio 1/4, squared distances from the mean alike: (0.5 - 0.25) / 0.5.
    uneven = jnp.array([[2.0, -0.5]])
    np.testing.assert_allclose(penalties.relu_balance([Interval(uneven - 0.1, uneven + 0.1)]), 0.5, rtol=1e-4)


def test_the_penalty_fades_as_the_radius_rises():
    forward, params, state, batch = _net()
    loss = fast_ibp.fast_ibp(forward, BALL, eps=RAMP, penalties=(penalties.of_bounds(tolerance=0.9),))
    value, (_, metrics) = _value(loss, params, state, batch, QUARTER)
    penalty = metrics["tightness"] + metrics["relu_balance"]
    assert penalty > 0.1
    np.testing.assert_allclose(value, metrics["robust_loss"] + 0.5 * 0.75 * penalty, rtol=1e-5)
    value, (_, metrics) = _value(loss, params, state, batch, END)
    np.testing.assert_allclose(value, _interval_loss(params, batch), rtol=1e-5)


@pytest.mark.parametrize("name", ["fast_ibp", "sabr", "taps", "staps", "mtl_ibp", "cc_ibp", "exp_ibp"])
def test_penalties_are_added_to_the_mean_loss(name):
    forward, params, state, batch = _net()
    without, (_, bare) = _value(BUILDERS[name](forward, BALL, eps=RAMP, penalties=()), params, state, batch, QUARTER)
    both = (penalties.of_bounds(tolerance=0.9, strength=2.0), penalties.l1(1e-3))
    found, (_, metrics) = _value(BUILDERS[name](forward, BALL, eps=RAMP, penalties=both), params, state, batch, QUARTER)
    kernels = [leaf["kernel"] for leaf in params.values()]
    np.testing.assert_allclose(metrics["l1"], sum(np.abs(kernel).sum() for kernel in kernels), rtol=1e-5)
    of_bounds = 2.0 * 0.75 * (metrics["tightness"] + metrics["relu_balance"])
    assert of_bounds > 0.1
    np.testing.assert_allclose(found, without + of_bounds + 1e-3 * metrics["l1"], rtol=1e-5)
    np.testing.assert_allclose(metrics["robust_loss"], bare["robust_loss"], rtol=1e-5)


def test_the_connector_hands_gradients_to_the_nearer_end():
    box = Interval(jnp.zeros((1, 5)), jnp.array([[1.0, 1.0, 1.0, 1.0, 0.0]]))
    point = jnp.array([[0.0, 0.25, 0.5, 1.0, 0.0]])
    value, pull = jax.vjp(lambda box: taps.connect(box, point), box)
    np.testing.assert_array_equal(value, point)
    (gradient,) = pull(jnp.ones_like(point))
    np.testing.assert_allclose(gradient.lower, [[1.0, 0.5, 0.0, 0.0, 0.5]])
    np.testing.assert_allclose(gradient.upper, [[0.0, 0.0, 0.0, 1.0, 0.5]])


def test_taps_is_exact_behind_the_cut_and_below_intervals():
    forward, params, state, batch = _net()
    _, (_, metrics) = _value(_loss("taps"), params, state, batch, END)
    np.testing.assert_allclose(metrics["ibp_loss"], _interval_loss(params, batch), rtol=1e-4)
    assert metrics["taps_loss"] <= metrics["ibp_loss"] * (1 + 1e-5)
    # A linear second part has its least margins in corners, which sign steps find; there both estimates are equal.
    loss = taps.taps(forward, BALL, eps=RAMP, cut=3, latent_attack=LATENT)
    _, (_, metrics) = _value(loss, params, state, batch, END)
    np.testing.assert_allclose(metrics["taps_loss"], metrics["ibp_loss"], rtol=1e-4)
    np.testing.assert_allclose(metrics["robust_loss"], _interval_loss(params, batch) ** 2, rtol=1e-3)
    _, (_, whole) = _value(taps.staps(forward, BALL, eps=RAMP, cut=2, latent_attack=LATENT, subselection=1.0,
                                      attack=SHORT), params, state, batch, END)
    np.testing.assert_allclose(whole["ibp_loss"], _interval_loss(params, batch), rtol=1e-4)


def test_the_gradient_of_taps_counts_as_often_as_asked():
    forward, params, state, batch = _net()
    one = jax.tree.map(lambda leaf: leaf[:1], batch)
    gradients = [
        _gradient(taps.taps(forward, BALL, eps=RAMP, cut=2, latent_attack=LATENT, gradient_scale=scale), params, state,
                  one, END) for scale in (0.0, 1.0, 5.0)
    ]
    none, once, five = (np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)]) for tree in gradients)
    np.testing.assert_allclose(five - none, 5 * (once - none), rtol=1e-3, atol=1e-5)
    assert np.abs(once - none).max() > 1e-3


@pytest.mark.parametrize("net", ["plain", "batch norm"])
@pytest.mark.parametrize("cut", [1, 2, 3])
def test_the_parts_of_a_net_compose_to_it(net, cut):
    forward, params, state, batch = _net(net)
    first, second = (forward.logits_fn(params, state, **part) for part in ({"stop": cut}, {"start": cut}))
    np.testing.assert_allclose(second(first(batch["x"])), forward.logits_fn(params, state)(batch["x"]), atol=1e-6)
    assert (first(batch["x"]) >= 0).all()


def test_schedules_are_those_of_optax():
    rate = optax.scale_by_schedule(schedules.linear_ramp(0.1, 0, 10))
    state = rate.init(jnp.zeros(2))
    for step in range(3):
        updates, state = rate.update(jnp.ones(2), state)
        np.testing.assert_allclose(updates, 0.01 * step, rtol=1e-5)
    ramp = schedules.GeometricRamp(8.0, 1000.0, 10, 20)
    np.testing.assert_allclose([ramp(step) for step in (0, 10, 15, 20, 99)],
                               [8.0, 8.0, math.sqrt(8000.0), 1000.0, 1000.0], rtol=1e-5)


def test_cnn7_is_the_network_of_the_papers():
    plain, norm = models.cnn7(), models.cnn7_batch_norm()
    assert plain == models.a5_classifier()
    shapes = jax.eval_shape(norm.init, jax.random.key(0), jnp.zeros((1, 28, 28, 1)))
    assert len(shapes["batch_stats"]) == 6
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes["params"])) == 13_257_290 + 2 * (512 + 512)
    small = jax.eval_shape(models.cnn7(width=8).init, jax.random.key(0), jnp.zeros((1, 28, 28, 1)))["params"]
    assert small["Conv_4"]["kernel"].shape == (3, 3, 16, 16)
    assert small["Dense_0"]["kernel"].shape == (14 * 14 * 16, 64)


def test_impossible_settings_are_refused():
    forward = _net()[0]
    for build, options, words in (
        (sabr.sabr, {"subselection": 1.5}, "subselection=1.5"), (expressive.mtl_ibp, {"alpha": -0.1}, "alpha=-0.1"),
        (taps.taps, {"cut": 0}, "cut=0"), (taps.taps, {"cut": 1, "connector": 0.0}, "connector=0.0"),
    ):
        with pytest.raises(ValueError, match=words):
            build(forward, BALL, eps=RAMP, **options)
    with pytest.raises(ValueError, match="norm linf, not l2"):
        sabr.sabr(forward, Ball("l2", 0.0), eps=RAMP)
    with pytest.raises(ValueError, match="without BatchNorm"):
        models.features_fn(models.cnn7_batch_norm(width=2), {})
