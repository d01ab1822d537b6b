"""Complete verification against mixed-integer programs, brute force and sampling."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from bounds_helpers import mlp, mlp_params
from branch_nets import CERTIFIED, FALSIFIED, KINDS, UNKNOWN, check, draw
from jax.tree_util import Partial

from rdx import bounds, margins
from rdx.balls import Ball, Region
from rdx.bounds import branch, exact, splits, subdomains
from rdx.bounds.interval import Interval


@pytest.mark.parametrize("kind", KINDS)
def test_equals_mixed_integer_programs(kind):
    for seed in range(6):
        fn, region, expected = draw(kind, seed)
        check(bounds.verify(fn, region), fn, region, expected)


@pytest.mark.parametrize("kind", ["mlp", "leaky"])
def test_bisection_of_inputs_comes_to_the_same_verdicts(kind):
    for seed in range(6):
        fn, region, expected = draw(kind, seed)
        check(bounds.verify(fn, region, split="input"), fn, region, expected)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_equals_mixed_integer_programs_on_200_nets(kind):
    verdicts = []
    for seed in range(34):  # 204 nets
        fn, region, expected = draw(kind, seed)
        check(bounds.verify(fn, region), fn, region, expected)
        verdicts.append(expected)
    assert 0.3 < np.mean([verdict is CERTIFIED for verdict in verdicts]) < 0.7


def problem_of(seed=0, *, eps=0.4, norm="linf", sizes=(3, 8, 8, 2)):
    params = mlp_params(*sizes, seed=seed)
    region = Ball(norm, eps).region(jnp.full((1, sizes[0]), 0.5))
    return subdomains.Problem(Partial(mlp, params), region, ())


def hidden(problem, x):
    """Computes all pre-activations, in order, and the outputs."""
    values, layers = [], problem.fn.args[0]
    for kernel, bias in layers[:-1]:
        values.append(x @ np.asarray(kernel) + np.asarray(bias))
        x = np.maximum(values[-1], 0.0)
    return np.concatenate(values, axis=1), x @ np.asarray(layers[-1][0]) + np.asarray(layers[-1][1])


def sample(region, num=4000, seed=0):
    """Draws points of a region of one example, a third of them at corners of its box."""
    random = np.random.default_rng(seed)
    share = random.uniform(size=(num, *region.center.shape[1:]))
    share[::3] = np.round(share[::3])
    lower, upper, center, radius = (
        np.asarray(part, float) for part in (region.lower, region.upper, region.center, region.radius)
    )
    delta = lower + share * (upper - lower) - center
    if region.norm != "linf":
        size = np.linalg.norm(delta / radius, ord={"l2": 2, "l1": 1}[region.norm], axis=1, keepdims=True)
        delta = delta / np.maximum(size, 1.0)
    return center + delta


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_bounds_of_split_subdomains_hold_for_any_multipliers(norm):
    # Wrong signs of the multipliers would add s z >= 0 to the function, and the bound would exceed it.
    problem, random = problem_of(seed=3, norm=norm), np.random.default_rng(0)
    z, outputs = hidden(problem, sample(problem.region))
    num, (size, neurons) = 32, z.shape
    whole = jax.jit(subdomains.root)(problem)
    fixed = random.uniform(size=(num, neurons)) < np.linspace(0.0, 1.0, num)[:, None]
    signs = np.where(fixed, np.sign(z[random.integers(size, size=num)]), 0).astype(np.int8)
    boxes = [Interval(problem.region.lower, problem.region.upper)]
    batch = subdomains.Subdomains(boxes, jnp.asarray(signs), jnp.tile(jnp.arange(2), (num, 1)))
    relaxed = jax.jit(partial(subdomains.relax, split="relu"))(problem, whole, batch)
    assert not relaxed.is_empty.any()
    multipliers = splits.Multipliers(*(
        jnp.asarray(scale * random.uniform(size=(num, 2, neurons)), jnp.float32) for scale in (1.0, 0.3)
    ))
    state = splits.begin(batch, multipliers)
    at_random = jax.jit(partial(splits.finish, split="relu"))(problem, whole, batch, relaxed, state)
    ascend = jax.jit(partial(splits.ascend, split="relu"))
    for _ in range(20):
        state = ascend(problem, batch, relaxed, state)
    met = 0
    for i in range(num):
        is_inside = (signs[i] * z >= 0.0).all(axis=1)
        met += is_inside.sum()
        for lower in (at_random.lower[i], state.lower[i]):
            assert (outputs[is_inside] >= np.asarray(lower) - 1e-5).all()
    assert met > size
    assert (state.lower > at_random.lower + 0.1).mean() > 0.8
    is_split = (signs != 0).any(axis=1)
    assert (np.asarray(state.best.beta)[is_split] > 0.0).any()


def test_multipliers_reach_the_linear_program():
    # On a piece without free neurons the best multipliers give its exact minimum.
    problem = problem_of(seed=3)
    z, _ = hidden(problem, sample(problem.region, 20))
    signs = np.sign(z).astype(np.int8)
    batch = subdomains.Subdomains(
        [Interval(problem.region.lower, problem.region.upper)], jnp.asarray(signs), jnp.zeros((20, 1), int)
    )
    whole = jax.jit(subdomains.root)(problem)
    relaxed = jax.jit(partial(subdomains.relax, split="relu"))(problem, whole, batch)
    state = splits.begin(batch, splits.Multipliers(*(jnp.zeros((20, 1, signs.shape[1]))[None].repeat(2, axis=0))))
    ascend = jax.jit(partial(splits.ascend, split="relu"))
    for _ in range(300):
        state = ascend(problem, batch, relaxed, state)
    exact_lower = [
        exact.minimum(problem, row, np.asarray(active), np.array([0])).lower
        for row, active in zip(signs, relaxed.is_active, strict=True)
    ]
    assert (np.asarray(state.lower)[:, 0] <= np.array(exact_lower) + 1e-5).all()
    # 300 steps of Adam: most arrive, all come near.
    np.testing.assert_allclose(np.median(exact_lower - np.asarray(state.lower)[:, 0]), 0.0, atol=5e-3)


class Recording(branch._Tree):
    """A tree that remembers which subdomains are no longer open."""

    def __init__(self, *args):
        super().__init__(*args)
        self.closed = []

    def file(self, domain, *args):
        num_open = len(self.open)
        super().file(domain, *args)
        if len(self.open) == num_open:
            self.closed.append(domain)


@pytest.mark.parametrize("split", ["relu", "input"])
def test_settled_and_open_subdomains_cover_the_region(split):
    problem = problem_of(seed=3)
    points = sample(problem.region)
    z, outputs = hidden(problem, points)
    # The minima are about 0: where the outputs are large subdomains settle, and some stay open for long.
    *layers, (kernel, bias) = problem.fn.args[0]
    shifted = Partial(mlp, [*layers, (kernel, bias - jnp.asarray(outputs.min(axis=0), jnp.float32))])
    problem = problem._replace(fn=shifted)
    tree = Recording(problem, exact.Refuter(problem, [[0], [1]]), split, 4, 1)
    while len(tree.closed) < 3 or len(tree.open) < 3:
        tree.step()
    leaves = [domain for _, _, domain in tree.open] + tree.closed
    for clause in (0, 1):
        count = np.zeros(len(points), int)
        for leaf in leaves:
            if leaf.clause == clause and split == "relu":
                count += (leaf.signs * z >= 0.0).all(axis=1)
            elif leaf.clause == clause:
                is_inside = (points >= leaf.boxes[0].lower) & (points <= leaf.boxes[0].upper)
                count += is_inside.all(axis=1)
        # Random points are on no border; corners of the box may be, of a part that ends there.
        assert (count == 1).all()


def net_of_two_inputs(seed):
    return Partial(mlp, mlp_params(2, 6, 6, 3, seed=seed))


def lowest_of_clauses(fn, region, clauses, num=301):
    axes = [np.linspace(low, high, num) for low, high in zip(region.lower[0], region.upper[0], strict=True)]
    points = np.stack(np.meshgrid(*axes), axis=-1).reshape(-1, 2)
    outputs = np.asarray(jax.jit(fn)(jnp.asarray(points, jnp.float32)))
    return min(outputs[:, clause].max(axis=1).min() for clause in clauses)


@pytest.mark.parametrize("split", ["relu", "input"])
@pytest.mark.parametrize("clauses", [[(0, 1)], [(0, 1, 2)], [(0,), (1, 2)]])
def test_clauses_against_a_grid(clauses, split):
    region = Ball("linf", 0.4).region(jnp.array([[0.5, 0.5]]))
    for seed in range(4):
        fn = net_of_two_inputs(200 + 10 * seed)
        # Steps of 0.0027 and slopes of order 1: the grid misses the minimum by less than the gap of 0.02.
        lowest = lowest_of_clauses(fn, region, [list(clause) for clause in clauses])
        for gap, expected in ((0.02, CERTIFIED), (-0.005, FALSIFIED)):
            *layers, (kernel, bias) = fn.args[0]
            shifted = Partial(mlp, [*layers, (kernel, bias - lowest + gap)])
            result = bounds.verify(shifted, region, clauses=clauses, split=split)
            assert result.verdict is expected
            if expected is FALSIFIED:
                assert any((result.outputs[0, list(clause)] <= 0.0).all() for clause in clauses)


def test_a_piece_may_need_several_outputs():
    # max(x, 0.1 - x) > 0 on [-1, 1], but neither output is positive everywhere and no neuron can be split.
    fn = lambda x: jnp.concatenate([x, 0.1 - x], axis=1)
    region = Ball("linf", 1.0, -1.0, 1.0).region(jnp.zeros((1, 1)))
    assert bounds.verify(fn, region, clauses=[(0, 1)]).verdict is CERTIFIED
    assert bounds.verify(fn, region).verdict is FALSIFIED
    assert bounds.verify(lambda x: fn(x) - 0.06, region, clauses=[(0, 1)]).verdict is FALSIFIED


@pytest.mark.parametrize("norm", ["l2", "l1"])
def test_balls_by_splits_of_neurons(norm):
    problem = problem_of(seed=5, norm=norm, eps=0.6, sizes=(2, 6, 6, 2))
    _, outputs = hidden(problem, sample(problem.region, 100_000))
    *layers, (kernel, bias) = problem.fn.args[0]
    # Sampled minima are within 0.01 of the true ones in two dimensions.
    for gap, expected in ((0.05, CERTIFIED), (-0.01, FALSIFIED)):
        shift = jnp.asarray(gap - outputs.min(axis=0), jnp.float32)
        result = bounds.verify(Partial(mlp, [*layers, (kernel, bias + shift)]), problem.region)
        assert result.verdict is expected
        if expected is FALSIFIED:
            center, radius = (np.asarray(part, float) for part in (problem.region.center, problem.region.radius))
            delta = (np.asarray(result.counterexample, float) - center) / radius
            assert np.linalg.norm(delta, ord={"l2": 2, "l1": 1}[norm], axis=1) <= 1.0


def test_smooth_functions_by_bisection():
    fn = lambda shift, x: jnp.tanh(2.0 * x[:, :1]) * x[:, 1:] + shift
    region = Ball("linf", 0.5, -jnp.inf, jnp.inf).region(jnp.zeros((1, 2)))
    # The minimum is the shift minus 0.5 tanh 1 = 0.3808.
    assert bounds.verify(Partial(fn, 0.39), region, split="input").verdict is CERTIFIED
    assert bounds.verify(Partial(fn, 0.37), region, split="input").verdict is FALSIFIED
    undecided = bounds.verify(Partial(fn, 0.39), region)
    assert undecided.verdict is UNKNOWN
    assert "cannot be split" in undecided.reason


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf, -jnp.inf])
@pytest.mark.parametrize("split", ["relu", "input"])
def test_what_is_not_finite_is_never_certified(bad, split):
    fn, region, _ = draw("mlp", 1)
    for layer in (0, 2):
        params = list(fn.args[0])
        kernel, bias = params[layer]
        params[layer] = (kernel, bias.at[0].set(bad))
        assert bounds.verify(Partial(mlp, params), region, split=split).verdict is not CERTIFIED
    infinite = jnp.full((1, 3), jnp.inf)
    wide = Region(region.center, infinite, -infinite, infinite, "linf")
    constant = Partial(mlp, [*fn.args[0][:-1], (0.0 * fn.args[0][-1][0], jnp.ones(2))])
    assert bounds.verify(constant, wide, split=split).verdict is UNKNOWN


def test_regions_that_are_none_are_refused():
    fn, region, _ = draw("mlp", 1)
    for lower in (region.upper + 0.1, jnp.full((1, 3), jnp.nan)):
        broken = Region(region.center, region.radius, lower, region.upper, "linf")
        with pytest.raises(ValueError, match="empty or not a number"):
            bounds.verify(fn, broken)
    with pytest.raises(ValueError, match="batch of one"):
        bounds.verify(fn, Ball("linf", 0.1).region(jnp.full((2, 3), 0.5)))
    with pytest.raises(ValueError, match="cuts boxes"):
        bounds.verify(fn, Ball("l2", 0.1).region(jnp.full((1, 3), 0.5)), split="input")
    for clauses in ([], [()], [(2,)]):
        with pytest.raises(ValueError, match="Clauses are"):
            bounds.verify(fn, region, clauses=clauses)
    with pytest.raises(ValueError, match="at least 2"):
        bounds.verify(fn, region, capacity=1)
    with pytest.raises(ValueError, match="does not depend"):
        bounds.verify(lambda x: jnp.ones((1, 2)), region)


def hard_instance():
    """Finds a net that is certified, but not at once."""
    for seed in range(1, 40, 2):
        fn, region, expected = draw("deep", seed)
        result = bounds.verify(fn, region)
        if expected is CERTIFIED and result.num_domains > 10:
            return fn, region, result
    raise AssertionError


def test_limits_leave_the_verdict_open():
    fn, region, result = hard_instance()
    assert result.lower > 0.0
    late = bounds.verify(fn, region, timeout_s=0.0)
    assert late.verdict is UNKNOWN
    assert late.is_timeout
    assert late.lower == -np.inf
    small = bounds.verify(fn, region, max_domains=3, capacity=2)
    assert small.verdict is UNKNOWN
    assert not small.is_timeout
    assert 3 <= small.num_domains <= 5
    assert -np.inf < small.lower <= result.lower
    whole = bounds.verify(fn, region, capacity=2)
    assert whole.verdict is CERTIFIED


def test_candidates_of_an_attack_are_checked():
    fn, region, _ = draw("mlp", 1)
    outside = lambda fn, region: region.center + jnp.linspace(-3.0, 3.0, 200)[:, None] * jnp.ones((1, 3))
    values = fn(outside(fn, region))
    assert (values.min(axis=1) < 0.0).any()  # such an attack would succeed if it were believed
    assert bounds.verify(fn, region, attack=outside).verdict is CERTIFIED
    fn, region, _ = draw("mlp", 0)
    found = bounds.verify(fn, region)
    told = bounds.verify(fn, region, attack=lambda fn, region: jnp.asarray(found.counterexample, jnp.float32))
    assert told.verdict is FALSIFIED
    assert told.num_domains == 0
    check(told, fn, region, FALSIFIED)


def test_rounding_is_no_counterexample():
    # In float32 1e8 + x - 1e8 is 0, in float64 it is x; within such rounding nothing is certified either.
    fn = Partial(lambda c, x: (x + c[None]) - c[None], jnp.array([1e8]))
    region = Ball("linf", 0.1).region(jnp.array([[0.5]]))
    assert fn(region.center)[0, 0] == 0.0
    assert bounds.verify(fn, region).verdict is UNKNOWN


def test_classifiers_margins_and_arguments():
    fn, region, _ = draw("mlp", 1)
    label = fn(region.center).argmax(axis=1)
    point = dict(zip(("center", "radius", "lower", "upper"), itertools.repeat(region.center), strict=False))
    point["radius"] = jnp.zeros((1, 3))
    assert bounds.verify(margins.of(fn), Region(**point, norm="linf"), label).verdict is CERTIFIED
    assert bounds.verify(margins.of(fn), Region(**point, norm="linf"), 1 - label).verdict is FALSIFIED


def test_several_inputs():
    fn = lambda shift, x: jax.nn.relu(x["a"]) @ jnp.ones((2, 1)) + jnp.abs(x["b"]) - shift
    region = {
        "a": Ball("linf", 0.5, -1.0, 1.0).region(jnp.zeros((1, 2))),
        "b": Ball("linf", 0.25, -1.0, 1.0).region(jnp.full((1, 1), 0.5)),
    }
    for split in ("relu", "input"):
        assert bounds.verify(Partial(fn, 0.24), region, split=split).verdict is CERTIFIED
        result = bounds.verify(Partial(fn, 0.26), region, split=split)
        assert result.verdict is FALSIFIED
        assert set(result.counterexample) == {"a", "b"}
