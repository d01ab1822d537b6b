"""Random functions made of the whole coverage table, random regions, and the points that try to leave their bounds.

A function is `head(case(mix(x)))`: the mixture of the inputs has weights that sum to 1, so that a case sees the values
that it is meant for; the head is up to two random nonlinear blocks and a dense layer. Everything follows from one seed;
`VARIANTS` consecutive seeds share the structure and the norm, which are compiled once, and nothing else.
"""

import dataclasses
import functools
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from bounds_helpers import METHODS
from coverage_cases import CASES as CASES_OF_OPERATIONS
from coverage_layers import CASES as CASES_OF_LAYERS
from jax import lax

from rdx import bounds
from rdx.balls import Ball
from rdx.bounds import graph, tracing

CASES = CASES_OF_OPERATIONS | CASES_OF_LAYERS
# What every function is bounded with.
ALL_METHODS = METHODS | {"forward": bounds.forward}
# Slopes are chosen for piecewise-linear functions only: there one of these rules is tried, and at times alpha-CROWN.
RULES = (bounds.relaxations.same_slope, bounds.relaxations.zero_slope, bounds.relaxations.one_slope)
BATCH, VARIANTS = 4, 3
# Points on a way uphill.
NUM_STEPS = 16
# The allowance of `bounds.certify`: 1e-5 of the outputs' scale, here of the largest output seen rather than of the
# largest that intervals allow, and of 1 for the inputs, which are in [0, 1]. Float32 sums of the few hundred terms that
# these functions have err by 1e-6 of it at most.
ROUNDING = 1e-5
_ACTIVATIONS = {
    **{name: getattr(jax.nn, name) for name in (
        "celu", "elu", "gelu", "hard_sigmoid", "hard_silu", "hard_tanh", "leaky_relu", "log_sigmoid", "mish", "relu",
        "relu6", "selu", "sigmoid", "silu", "soft_sign", "softplus", "squareplus", "tanh",
    )},
    "abs": jnp.abs, "arctan": jnp.arctan, "clip": lambda x: jnp.clip(x, -0.5, 0.4), "cos": jnp.cos, "sin": jnp.sin,
    "erf": jax.scipy.special.erf, "exp": lambda x: jnp.exp(0.3 * jnp.clip(x, -9.0, 9.0)), "square": jnp.square,
    "log": lambda x: jnp.log(1.1 + jnp.square(x)), "sqrt": lambda x: jnp.sqrt(0.1 + jnp.square(x)),
    "bump": lambda x: 1.0 / (1.0 + jnp.square(x)), "where": lambda x: jnp.where(x > 0, 2.0 * x, -0.3 * x),
}


def _standardize(x):
    return (x - x.mean(1, keepdims=True)) * lax.rsqrt(x.var(1, keepdims=True) + 0.2)


def _masked_softmax(x):
    return jax.nn.softmax(jnp.where(np.arange(x.shape[1])[None] == 1, -np.inf, x), axis=1) * x


_COUPLED = {
    "product": lambda x: x * jnp.roll(x, 1, axis=1),
    "quotient": lambda x: jnp.roll(x, 1, axis=1) / (1.0 + jnp.abs(x)),
    "maximum": lambda x: jnp.maximum(x, 0.5 * jnp.flip(x, 1)),
    "minimum": lambda x: jnp.minimum(x, jnp.roll(x, 1, axis=1) + 0.1),
    "max_min": lambda x: jnp.concatenate([x.max(1, keepdims=True), x.min(1, keepdims=True)], axis=1),
    "pool": lambda x: lax.reduce_window(x, -jnp.inf, lax.max, (1, 2), (1, 1), "VALID"),
    "softmax": jax.nn.softmax,
    "log_softmax": jax.nn.log_softmax,
    "logsumexp": lambda x: x - jax.nn.logsumexp(x, axis=1, keepdims=True),
    "masked_softmax": _masked_softmax,
    "standardize": _standardize,
    "norm": lambda x: x / jnp.sqrt(0.1 + jnp.square(x).sum(1, keepdims=True)),
    "outer": lambda x: (x[:, :, None] * x[:, None, :2]).reshape(len(x), -1),
    "residual": lambda x: x - jax.nn.relu(jnp.cumsum(x, axis=1)),
    "gate": lambda x: jnp.tanh(x) * jax.nn.sigmoid(jnp.flip(x, 1)),
}
BLOCKS = _ACTIVATIONS | _COUPLED


@dataclasses.dataclass(frozen=True, eq=False)
class Structure:
    """What is compiled: a function `(weights, x [B, ...]) -> [B, K]`, the norm and the methods."""

    apply: Callable
    shapes: list
    x_shape: tuple[int, ...]
    norm: str
    methods: dict
    description: str

    @functools.cached_property
    def bound(self):
        def bound(weights, ball, x):
            region, fn = ball.region(x), partial(self.apply, weights)
            return {name: method(fn, region) for name, method in self.methods.items()}

        return _jit(bound)

    @functools.cached_property
    def evaluate(self):
        return _jit(self.apply)

    @functools.cached_property
    def gradient(self):
        return _jit(jax.grad(lambda x, weights, wish: (self.apply(weights, x) * wish).sum()))


@dataclasses.dataclass(frozen=True, eq=False)
class Problem:
    """A function and a region around each of a batch of inputs."""

    structure: Structure
    weights: list
    ball: Ball
    x: np.ndarray
    description: str


def _jit(fn):
    # Compiling is what takes time here, and less of it goes into code that runs for milliseconds.
    return jax.jit(fn, compiler_options={"xla_backend_optimization_level": 0})


def name_of(number):
    """Names the case that a structure begins with."""
    return str(np.random.default_rng(0).permutation(sorted(CASES))[number % len(CASES)])


@functools.lru_cache(maxsize=1)
def structure(number):
    """Builds a structure; consecutive ones go through the table of covered functions."""
    random, name = np.random.default_rng(number), name_of(number)
    case, size = CASES[name], int(np.prod(CASES[name].shape))
    inner, shapes = case.build(), [(size, size)]
    blocks = [str(block) for block in random.choice(list(BLOCKS), size=random.integers(int(case.is_affine), 3))]
    width = _width(lambda x: inner(x).reshape(1, -1), case.shape)
    for block in blocks:
        shapes.append((width, int(random.integers(2, 5))))
        width = _width(BLOCKS[block], shapes[-1][1:])
    shapes.append((width, int(random.integers(1, 4))))

    def apply(weights, x):
        mixture, *layers = weights
        y = inner((x.reshape(len(x), -1) @ mixture[0]).reshape(x.shape)).reshape(len(x), -1)
        for block, (kernel, bias) in zip(blocks, layers, strict=False):
            y = BLOCKS[block](y @ kernel + bias)
        return y @ layers[-1][0] + layers[-1][1]

    weights = _weights(random, shapes)
    ops = tracing.trace(partial(apply, weights), jnp.zeros((1, *case.shape))).ops
    methods = dict(ALL_METHODS)
    if any(op.name == graph.PIECEWISE_LINEAR for op in ops):
        rule = RULES[random.integers(len(RULES))]
        methods[f"crown_ibp {rule.__name__}"] = partial(bounds.crown_ibp, relu_lower=rule)
        # It takes several times as long to compile as the others together.
        if random.random() < 0.25:
            methods["alpha_crown"] = partial(bounds.alpha_crown, num_steps=3, hidden_steps=2)
    norm = str(random.choice(["linf", "l2", "l1"]))
    return Structure(apply, shapes, case.shape, norm, methods, " > ".join([name, *blocks, "dense"]))


def draw(seed):
    """Builds the problem of a seed."""
    given, random = structure(seed // VARIANTS), np.random.default_rng([seed, 1])
    ball, x, kind = _region(random, given.norm, given.x_shape)
    return Problem(given, _weights(random, given.shapes), ball, x, f"{given.description}, {given.norm}, {kind}")


def _width(fn, shape):
    return jax.eval_shape(fn, jax.ShapeDtypeStruct((1, *shape), jnp.float32)).shape[1]


def _weights(random, shapes):
    (size, _), *rest = shapes
    rows = np.where(random.random((size, size)) < 3.0 / size, random.random((size, size)), 0.0)
    rows = np.eye(size) + (random.random() < 0.6) * rows
    mixture = (rows / rows.sum(axis=1, keepdims=True)).T
    kernels = [random.normal(size=pair) * np.sqrt(random.uniform(0.5, 3.0) / pair[0]) for pair in rest]
    biases = [np.zeros((1, size)), *(0.3 * random.normal(size=(1, pair[1])) for pair in rest)]
    return [(np.float32(k), np.float32(b)) for k, b in zip([mixture, *kernels], biases, strict=True)]


def _region(random, norm, shape):
    """Draws inputs on and off the border of the box, and a ball: radii per element or not, some of them 0."""
    x = np.float32(np.clip(random.uniform(-0.2, 1.2, size=(BATCH, *shape)), 0.0, 1.0))
    largest = {"linf": 0.2, "l2": 0.6, "l1": 0.9}[norm]
    eps = largest * 10.0 ** random.uniform(-2.0, 0.0, size=(BATCH, *(1,) * len(shape))) * np.ones_like(x)
    radii = str(random.choice(["alike", "different", "often 0"]))
    box = str(random.choice(["unit", "own", "none"], p=[0.5, 0.3, 0.2]))
    if radii != "alike":
        eps *= random.uniform(0.2, 1.0, size=x.shape) * (random.random(x.shape) < (0.5 if radii == "often 0" else 1.0))
    low, high = (x + sign * random.uniform(0.01, 0.3, x.shape) for sign in (-1.0, 1.0))
    low, high = {"unit": (0.0, 1.0), "own": (low, high), "none": (-np.inf, np.inf)}[box]
    low, high = (np.float32(np.broadcast_to(end, x.shape)) for end in (low, high))
    return Ball(norm, np.float32(eps), low, high), x, f"radii {radii}, box {box}"


def points(problem, seed, num):
    """Finds points of the regions: a third each random, of the border, and on the way uphill.

    The border: corners of the box, vertices and faces of the l1 ball, the sphere of the l2 ball along some axes or all.
    Uphill: steps of Frank & Wolfe (1956) to the best point of the ball along the gradient of one output, or of a random
    combination. All in float64 and without rdx.balls: what is scaled to norm 1 is clipped towards the center.

    Returns:
        Points `[N, BATCH, ...]` with `N >= num / BATCH`, and the function's values `[N, BATCH, K]`, both float32.
    """
    random, given, x = np.random.default_rng([seed, 2]), problem.structure, problem.x
    num_chains = -(-num // (3 * BATCH * NUM_STEPS))
    num_each, shape = num_chains * NUM_STEPS, (num_chains * NUM_STEPS, *x.shape)
    inside = _unit(random.normal(size=shape), given.norm) * random.random((num_each, BATCH, *(1,) * (x.ndim - 1)))
    single = random.integers(x[0].size, size=(num_each, BATCH, *(1,) * (x.ndim - 1)))
    axes = random.random(shape) < np.linspace(1.0 / x[0].size, 1.0, num_each).reshape(-1, *(1,) * x.ndim)
    axes |= np.arange(x[0].size).reshape(x.shape[1:]) == single
    alike = random.random((num_each, *(1,) * x.ndim)) < 0.5
    sizes = np.where(alike, random.choice([-1.0, 1.0], size=shape), random.normal(size=shape))
    border = _unit(axes * sizes, given.norm)
    steps, wish = [inside[:num_chains]], _wishes(random, num_chains, problem)
    for step in range(NUM_STEPS):
        slope = given.gradient(_place(problem, steps[-1]), problem.weights, wish)
        towards = np.nan_to_num(np.asarray(slope, np.float64)).reshape(num_chains, *x.shape) * problem.ball.eps
        share = 2.0 / (step + 2.0)
        steps.append((1.0 - share) * steps[-1] + share * _best(towards, given.norm))
    found = np.concatenate([_place(problem, unit) for unit in (inside, border, np.concatenate(steps[1:]))])
    values = np.asarray(given.evaluate(problem.weights, found))
    return found.reshape(-1, *x.shape), values.reshape(-1, BATCH, values.shape[-1])


def _wishes(random, num_chains, problem):
    """Draws what each chain maximises: an output or its negative, or a combination."""
    num_outputs = problem.structure.shapes[-1][1]
    chosen = np.eye(num_outputs)[np.arange(num_chains) % num_outputs] * random.choice([-1.0, 1.0], size=(num_chains, 1))
    mixed = np.where(np.arange(num_chains)[:, None] % 4 == 3, random.normal(size=chosen.shape), chosen)
    return np.float32(np.repeat(mixed, BATCH, axis=0))


def _flat(unit):
    return unit.reshape(*unit.shape[:2], -1)


def _unit(direction, norm):
    """Scales directions `[N, BATCH, ...]` to norm 1."""
    size = np.linalg.norm(_flat(direction), {"linf": np.inf, "l2": 2, "l1": 1}[norm], axis=2)
    return direction / np.maximum(size, 1e-30).reshape(*size.shape, *(1,) * (direction.ndim - 2))


def _best(slope, norm):
    """Finds the points of the unit ball that are best along a slope."""
    if norm == "linf":
        return np.sign(slope)
    if norm == "l2":
        return _unit(slope, norm)
    flat = _flat(slope)
    is_best = np.arange(flat.shape[2]) == np.abs(flat).argmax(axis=2)[..., None]
    return (is_best * np.sign(flat)).reshape(slope.shape)


def _place(problem, unit):
    """Maps the unit ball into the region; returns a batch, float32."""
    ball, x = problem.ball, problem.x.astype(np.float64)
    placed = np.clip(x + unit * ball.eps, np.maximum(ball.low, -1e30), np.minimum(ball.high, 1e30))
    return np.float32(placed.reshape(-1, *x.shape[1:]))


def judge(problem, visited, found):
    """Holds points against bounds.

    Returns:
        The number of points with a finite value, and for each method: the largest `excess` over the bounds in units of
        `1 + max |f|` (evaluated in float64 where float32 says that it is above `ROUNDING`), the mean `width` of the
        bounds over that of the values seen, and whether the bounds are finite, and inside those of IBP.
    """
    inputs, values = visited
    is_finite = np.isfinite(values).all(axis=2, keepdims=True)
    seen = np.where(is_finite, values, np.nan)
    scale, spread = 1.0 + np.nanmax(np.abs(seen)), np.nanmean(np.nanmax(seen, axis=0) - np.nanmin(seen, axis=0))
    slack, verdicts = ROUNDING * scale, {}
    least, greatest = found["ibp"]
    for method, (lower, upper) in found.items():
        outside = np.nan_to_num(np.maximum(lower - seen, seen - upper), nan=-np.inf)
        excess = outside.max()
        if excess > slack:
            place, example, _ = np.unravel_index(outside.argmax(), outside.shape)
            exact = in_float64(problem, inputs[place, example])
            excess = np.maximum(lower[example] - exact, exact - upper[example]).max()
        verdicts[method] = {
            "excess": float(excess / scale),
            "width": float((upper - lower).mean() / max(spread, 1e-12)),
            "is_finite": bool(np.isfinite(lower).all() and np.isfinite(upper).all()),
            "is_ordered": not ((lower < least - slack) | (upper > greatest + slack)).any(),
        }
    return int(is_finite.sum()), verdicts


def in_float64(problem, point):
    """Evaluates a function at one point in float64 where its layers can compute in it, else in float32."""
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        for dtype in (jnp.float64, jnp.float32):
            try:
                weights = jax.tree.map(lambda array, dtype=dtype: jnp.asarray(array, dtype), problem.weights)
                return np.asarray(problem.structure.apply(weights, jnp.asarray(point, dtype)[None]))[0]
            except TypeError:  # a loop that carries float32
                continue
    raise AssertionError(problem.description)


def study(seed, num):
    """Bounds a random function by every method and holds points against the bounds; see `judge`."""
    problem = draw(seed)
    found = problem.structure.bound(problem.weights, problem.ball, problem.x)
    return problem, *judge(problem, points(problem, seed, num), jax.tree.map(np.asarray, found))
