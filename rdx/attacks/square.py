"""Square attack: random search by square-shaped changes (Andriushchenko et al. 2020, arXiv:1912.00049)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rdx import goals, losses, norms
from rdx.attacks import base, driver
from rdx.balls import Ball
from rdx.goals import Goal
from rdx.types import Array, ArrayLike, AttackResult, Key, LogitsFn, Norm

# Of 10,000 iterations, those after which the changed share is halved.
_HALVINGS = np.array([10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000])
# Rows and columns of patches in the first perturbation of l2 and l1.
_NUM_TILES = 5
# Keeps divisions by the size of nothing at 0.
_TINY = 1e-12


class _Context(NamedTuple):
    problem: base.Problem
    sides: Array  # [num_steps], int
    spared: Array  # last rows and columns that no square reaches, int


class _State(NamedTuple):
    keys: Key
    current: base.Candidate  # where this restart stands; `found` may come from an earlier one, or be the clean input
    found: base.Found


class _Patch(NamedTuple):
    """A rectangle of an image [H, W] that holds a pattern; all are traced."""

    row: Array
    column: Array
    height: Array
    width: Array


def schedule(
    iteration: ArrayLike, height: int, width: int, *, norm: Norm = "linf", p_init: float = 0.8
) -> tuple[np.ndarray, np.ndarray]:
    """Tells which share `p` of the elements an iteration changes, and the side `s` of its square.

    `p` is halved after iterations 10, 50, 200, 500, 1000, 2000, 4000, 6000 and 8000. `s = round(sqrt(p H W))` is at
    least 1 and at most the image's shorter side; for l2 and l1 it is odd and at least 3 where the image allows it. The
    squares of a vector (`H = 1` or `W = 1`) are intervals, `s = round(p H W)`.

    Source: Andriushchenko et al. (2020, arXiv:1912.00049, Sec. 3.2 and 4), limits of `s` as in AutoAttack's code.

    Args:
        iteration: counted from 0, an integer or an array of them.
        height: rows of the image.
        width: columns of the image.
        norm: the ball's norm.
        p_init: share at the start.

    Returns:
        Share and side, shaped as `iteration`.
    """
    share = p_init * 0.5 ** np.searchsorted(_HALVINGS, iteration)
    is_vector = min(height, width) == 1
    longest = max(height, width) if is_vector else min(height, width)
    side = np.rint(share * height * width if is_vector else np.sqrt(share * height * width)).astype(int)
    if norm == "linf":
        return share, np.clip(side, 1, longest)
    side = np.maximum(side, 3)
    return share, np.minimum(side + (side + 1) % 2, longest)


def square(
    key: Key, logits_fn: LogitsFn, x: ArrayLike, labels: ArrayLike, *, ball: Ball, goal: Goal | None = None,
    index: ArrayLike | None = None, num_steps: int = 5000, num_restarts: int = 1, p_init: float = 0.8,
    rescale_schedule: bool = False, spare_last: bool = False, loop: driver.Loop = driver.AUTO,
) -> AttackResult:
    """Searches at random: changes one square at a time and keeps what raises the loss or reaches the goal.

    linf: starts with stripes, each column of each channel at `+eps` or `-eps`, and sets one square of each channel to
    `+eps` or `-eps`. l2 and l1: starts with a grid of 5 x 5 patches, and moves the mass of one window, with what of the
    budget is unspent, to another one, to which it adds two pyramids of opposite signs.

    Source: Andriushchenko et al. (2020, arXiv:1912.00049, Algorithms 1-3); l1, the sizes of squares and the defaults as
    in AutoAttack (Croce & Hein 2020, arXiv:2003.01690), whose code runs 5,000 iterations of a schedule made for 10,000.
    Its code draws one position and one pattern for the whole batch, here each example has its own, which changes no
    example's chances; its squares never reach the last row and column, here they do, as in the paper. That counts: of
    1,000 MNIST images (linf 0.25, a net trained by PGD, after the other attacks of AutoAttack) 26.1, 26.1 and 25.8 %
    stand for three keys, with `spare_last` 27.3, 27.0 and 27.1 %, and 27.4 and 27.3 % for two seeds of the code.

    Args:
        key: one key; example `i` uses it folded with `index[i]`, restart `r` folds that with `r`.
        logits_fn: `x [B, ...] -> logits [B, K]`.
        x: clean inputs: images `[B, H, W, C]` or `[B, H, W]`, or vectors `[B, D]`, which are images of one row and one
            channel with intervals for squares.
        labels: shape `[B]`, int.
        ball: the threat model, of any norm.
        goal: what is maximised and what counts as success; `goals.misclassify(losses.margin)` by default.
        index: places in the data set, shape `[B]`, int; `0..B-1` by default.
        num_steps: iterations of each restart.
        num_restarts: number of random starts.
        p_init: share of the elements that is changed at first; the paper tunes it, to 0.05 (linf) and 0.1 (l2) on
            ImageNet.
        spare_last: whether squares never reach the last row and column, as in AutoAttack's code.
        rescale_schedule: whether iteration `i` takes the square of `10000 i / num_steps`, as in the paper.
        loop: see `rdx.attacks.driver.Loop`; examples stop at success by default.

    Returns:
        The attack's result: `1 + num_restarts * (1 + num_steps)` forward passes, fewer for examples that stop.

    Raises:
        ValueError: on inputs of another rank, a share outside (0, 1], unusable inputs, or NaN logits.
    """
    if not 0.0 < p_init <= 1.0:
        raise ValueError(f"p_init={p_init} is not a share of the image: give a number above 0 and up to 1.")
    goal = goals.misclassify(losses.margin) if goal is None else goal
    problem, found = base.begin(logits_fn, x, labels, ball, goal)
    height, width, _ = _image_shape(problem.x)
    iterations = np.arange(num_steps)
    iterations = iterations * 10_000 // num_steps if rescale_schedule else iterations
    _, sides = schedule(iterations, height, width, norm=ball.norm, p_init=p_init)
    context = _Context(problem, jnp.asarray(sides, jnp.int32), jnp.asarray(spare_last, jnp.int32))
    found, trace = driver.run(
        _METHOD, context, base.example_keys(key, problem.x, index), found, num_steps=num_steps,
        num_restarts=num_restarts, stops=True, loop=loop,
    )
    return base.report(problem, found, trace)


def _image_shape(x: Array) -> tuple[int, int, int]:
    shape = x.shape[1:]
    if len(shape) == 1:
        return 1, shape[0], 1
    if len(shape) in (2, 3):
        return shape[0], shape[1], shape[2] if len(shape) == 3 else 1
    raise ValueError(f"Squares need images [B, H, W, C] or [B, H, W], or vectors [B, D], not inputs {x.shape}.")


def _start(context: _Context, keys: Key, found: base.Found) -> _State:
    ball, x = context.problem.ball, context.problem.x
    shape = _image_shape(x)
    keys = jax.vmap(jax.random.split)(keys)
    if ball.norm == "linf":
        signs = jax.vmap(lambda key: jax.random.rademacher(key, (1, *shape[1:]), x.dtype))(keys[:, 0])
        point = _at_limits(ball, x, x, jnp.broadcast_to(signs, (len(x), *shape)))
    else:
        tiles = jax.vmap(lambda key: _tiles(key, shape, x.dtype, ball.norm))(keys[:, 0])
        point = _at_radius(ball, x, tiles)
    seen = base.evaluate(context.problem, point)
    return _State(keys[:, 1], seen, base.spend(found, seen, forwards=1))


def _step(context: _Context, state: _State, i: Array) -> _State:
    ball, x = context.problem.ball, context.problem.x
    keys, side, spared, shape = base.fold(state.keys, i), context.sides[i], context.spared, _image_shape(x)
    if ball.norm == "linf":
        signs = jax.vmap(lambda key: _signed_square(key, shape, side, spared, x.dtype))(keys)
        point = _at_limits(ball, x, state.current.x, signs)
    else:
        delta = _in_radii(ball, state.current.x, x).reshape(len(x), *shape)
        move = jax.vmap(lambda key, delta: _move_mass(key, delta, side, spared, ball.norm))
        point = _at_radius(ball, x, move(keys, delta))
    seen = base.evaluate(context.problem, point)
    return _State(state.keys, base.better(state.current, seen), base.spend(state.found, seen, forwards=1))


def _at_limits(ball: Ball, x: Array, point: Array, signs: Array) -> Array:
    """Moves elements to the end of their range that `signs [B, H, W, C]` names; those of sign 0 stay."""
    (lower, upper), signs = ball.limits(x), signs.reshape(x.shape)
    return jnp.where(signs > 0, upper, jnp.where(signs < 0, lower, point))


def _in_radii(ball: Ball, point: Array, x: Array) -> Array:
    radius = ball.radius(x)
    return jnp.where(radius > 0, (point - x) / jnp.where(radius > 0, radius, 1.0), 0.0)


def _at_radius(ball: Ball, x: Array, delta: Array) -> Array:
    """Brings changes `[B, H, W, C]`, in units of the radius, onto the sphere (l2) or into the ball (l1), and box."""
    radius = ball.radius(x)
    delta = jnp.where(radius > 0, delta.reshape(x.shape), 0.0)
    if ball.norm == "l1":
        return ball.project(x + radius * delta, x)
    unit = delta / jnp.maximum(norms.expand(norms.l2(delta), delta), _TINY)
    low, high = (jnp.asarray(end, x.dtype) for end in (ball.low, ball.high))
    return jnp.clip(x + radius * unit, low, high)


def _signed_square(key: Key, shape: tuple[int, ...], side: Array, spared: Array, dtype: jnp.dtype) -> Array:
    where, what = jax.random.split(key)
    signs = jax.random.rademacher(what, (1, 1, shape[2]), dtype)
    return jnp.where(_covers(_place(where, shape, side, spared), shape), signs, 0.0)


def _place(key: Key, shape: tuple[int, ...], side: Array, spared: Array) -> _Patch:
    """Draws where a square lies in an image `[H, W, C]`; it is no longer than the image along either axis.

    It ends before the last `spared` rows and columns, unless it is so long that it must reach them.
    """
    sizes = [jnp.minimum(side, length) for length in shape[:2]]
    row, column = (
        jax.random.randint(key, (), 0, jnp.maximum(length - size + 1 - spared, 1))
        for key, length, size in zip(jax.random.split(key), shape[:2], sizes, strict=True)
    )
    return _Patch(row, column, *sizes)


def _offsets(patch: _Patch, shape: tuple[int, ...]) -> tuple[Array, Array]:
    return jnp.arange(shape[0])[:, None] - patch.row, jnp.arange(shape[1])[None, :] - patch.column


def _covers(patch: _Patch, shape: tuple[int, ...]) -> Array:
    rows, columns = _offsets(patch, shape)
    return ((rows >= 0) & (rows < patch.height) & (columns >= 0) & (columns < patch.width))[:, :, None]


def _move_mass(key: Key, delta: Array, side: Array, spared: Array, norm: Norm) -> Array:
    """Moves mass of a perturbation `[H, W, C]`, in units of the radius, from a second window into a first one."""
    shape = delta.shape
    first_key, second_key, pattern_key, sign_key = jax.random.split(key, 4)
    patch = _place(first_key, shape, side, spared)
    first, second = _covers(patch, shape), _covers(_place(second_key, shape, side, spared), shape)
    old = jnp.where(first, delta, 0.0)
    pattern = _pattern(pattern_key, *_offsets(patch, shape), patch.height, patch.width, norm, delta.dtype)
    signs = jax.random.rademacher(sign_key, (1, 1, shape[2]), delta.dtype)
    new = signs * pattern[:, :, None] + old / jnp.maximum(_sizes(old, norm), _TINY)
    budget = _budget(delta, _sizes(jnp.where(first | second, delta, 0.0), norm), norm)
    new = budget * new / jnp.maximum(_sizes(new, norm), _TINY)
    return jnp.where(first, new, jnp.where(second, 0.0, delta))


def _budget(delta: Array, windows: Array, norm: Norm) -> Array:
    """Computes each channel's size in the first window: that of both windows and a share of what is unspent."""
    num_channels, total = delta.shape[2], norms.norm(delta[None], norm)[:, None, None]
    if norm == "l2":
        return jnp.sqrt(jnp.maximum(1.0 - jnp.square(total), 0.0) / num_channels + jnp.square(windows))
    # The factor is the code's: the window outgrows the ball and the projection takes it off everywhere.
    return num_channels * (jnp.maximum(1.0 - total, 0.0) / num_channels + windows)


def _sizes(delta: Array, norm: Norm) -> Array:
    """Computes the norm of each channel of `[H, W, C]`, shape `[1, 1, C]`."""
    return norms.norm(jnp.moveaxis(delta, 2, 0), norm)[None, None]


def _tiles(key: Key, shape: tuple[int, ...], dtype: jnp.dtype, norm: Norm) -> Array:
    """Draws the first perturbation `[H, W, C]`: a centred grid of patches, each channel of each of random sign."""
    shorter = min(shape[:2]) if min(shape[:2]) > 1 else max(shape[:2])
    sizes = [min(max(shorter // _NUM_TILES, 1), length) for length in shape[:2]]
    counts = [length // size for length, size in zip(shape[:2], sizes, strict=True)]
    pattern_key, sign_key = jax.random.split(key)
    rows, columns = jnp.arange(sizes[0])[:, None], jnp.arange(sizes[1])[None, :]
    keys = jax.random.split(pattern_key, tuple(counts))
    draw = lambda key: _pattern(key, rows, columns, jnp.asarray(sizes[0]), jnp.asarray(sizes[1]), norm, dtype)
    patterns = jax.vmap(jax.vmap(draw))(keys)[..., None]
    signs = jax.random.rademacher(sign_key, (*counts, 1, 1, shape[2]), dtype)
    grid = (patterns * signs).transpose(0, 2, 1, 3, 4).reshape(counts[0] * sizes[0], counts[1] * sizes[1], shape[2])
    missing = [length - covered for length, covered in zip(shape[:2], grid.shape[:2], strict=True)]
    return jnp.pad(grid, [*((gap // 2, gap - gap // 2) for gap in missing), (0, 0)])


def _pattern(
    key: Key, rows: Array, columns: Array, height: Array, width: Array, norm: Norm, dtype: jnp.dtype
) -> Array:
    """Draws the pattern of a rectangle, of norm 1: two pyramids of opposite signs, side by side or one below the other.

    Args:
        key: one key.
        rows: rows from the rectangle's first one, shape `[H, 1]`, int.
        columns: columns from its first one, shape `[1, W]`, int.
        height: its rows.
        width: its columns.
        norm: l2 or l1.
        dtype: of the result.

    Returns:
        Shape `[H, W]`, 0 outside the rectangle.
    """
    is_turned = jax.random.bernoulli(key)
    along, across = jnp.where(is_turned, columns, rows), jnp.where(is_turned, rows, columns)
    length, breadth = jnp.where(is_turned, width, height), jnp.where(is_turned, height, width)
    half = length // 2
    pattern = _pyramid(along, across, half, breadth, norm, dtype)
    pattern -= _pyramid(along - half, across, length - half, breadth, norm, dtype)
    return pattern / jnp.maximum(norms.norm(pattern[None], norm)[:, None], _TINY)


def _pyramid(along: Array, across: Array, length: Array, breadth: Array, norm: Norm, dtype: jnp.dtype) -> Array:
    """Builds `sum_{k >= r} (k + 1)^-a`, of norm 1, over a rectangle at Chebyshev distance `r` from its center.

    The sum ends with the square that covers the rectangle; `a` is 2 for l2 and 4 for l1.
    """
    along, across = jnp.broadcast_arrays(along, across)
    terms = 1.0 / np.arange(1, max(along.shape) + 2) ** (2.0 if norm == "l2" else 4.0)
    sums = jnp.asarray(np.concatenate([[0.0], terms.cumsum()]), dtype)
    distance = jnp.maximum(jnp.abs(along - length // 2), jnp.abs(across - breadth // 2))
    is_inside = (along >= 0) & (along < length) & (across >= 0) & (across < breadth)
    end = jnp.maximum(length, breadth) // 2 + 1
    height = jnp.where(is_inside, sums[end] - sums[jnp.where(is_inside, distance, 0)], 0.0)
    return height / jnp.maximum(norms.norm(height[None], norm)[:, None], _TINY)


_METHOD = driver.Method(_start, _step)
