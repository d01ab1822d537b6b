"""alpha-CROWN (Xu et al. 2021, arXiv:2011.13824): CROWN whose lower slopes of relu are optimised for every bound.

An unstable relu has any line `a x` with `0 <= a <= 1` below it. CROWN fixes `a` by the neuron's interval; here every
bounded element, hidden or not, has slopes of its own, which ascend its bound:

    l(a) = min_x A(a) x + b(a),      a <- clip(a + step, 0, 1)

Any slope is sound, so the ascent may stop wherever it likes. Hidden layers come one after the other: whatever follows
is the tighter the tighter they are, so there is nothing to gain from optimising them for the output.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from rdx.bounds import relaxations
from rdx.bounds.chunks import any_example
from rdx.bounds.crown import default_max_bytes, layer_by_layer
from rdx.bounds.graph import PIECEWISE_LINEAR, Op
from rdx.bounds.interval import Interval
from rdx.bounds.linear import SlopeChoice
from rdx.bounds.patches import Rows
from rdx.types import Array, PyTree

# Steps fall to this part of the first in the end, and Adam remembers less than with its usual 0.9: slopes lie in [0, 1]
# and are moved a few times only.
_LAST, _MOMENTUM = 0.1, 0.5
# Slopes, the best ones, Adam's two moments and a gradient, beside what substitution holds.
_SHARE_OF_MEMORY = 0.25


def alpha_crown(
    fn: Callable[..., Array], region: PyTree, *args: PyTree, num_steps: int = 20, hidden_steps: int = 10,
    learning_rate: float = 0.5, is_shared: bool = False, stop_above: float = jnp.inf,
    max_bytes: float | None = None,
) -> Interval:
    """Bounds `fn` by backward substitution with optimised lower slopes, intersected with intervals in every layer.

    The cost is that of `crown` times about `1 + 3 * hidden_steps`, and that of `crown_ibp` times `1 + 3 * num_steps`.
    In gradients of the bounds the slopes that were found are constants.

    Source: Xu et al. (2021, alpha-CROWN, arXiv:2011.13824, Sec. 3.1).

    Args:
        fn: any JAX function `(x, *args) -> [B, ...]` whose examples are independent.
        region: the perturbed inputs, from `Ball.region`; a pytree of regions where `x` is a pytree.
        *args: further arguments, not perturbed; every leaf has a leading batch axis.
        num_steps: steps of the ascent of the output's bounds; with 0 they keep CROWN's own slopes.
        hidden_steps: steps for the bounds of hidden layers.
        learning_rate: Adam's first step size; slopes lie in [0, 1].
        is_shared: one slope for each neuron, rather than one for each neuron and bound: less memory, looser bounds.
        stop_above: the ascent of the output's bounds ends once all lower ones exceed this; 0 for certificates.
        max_bytes: about how much memory coefficients and slopes may take; they are computed in chunks. See `crown`
            for the default.

    Returns:
        Bounds of the output, each end of shape `[B, ...]`.

    Raises:
        UnsupportedPrimitiveError: if `fn` uses an operation without a rule.
    """
    ascend = functools.partial(_ascend, learning_rate=learning_rate, is_shared=is_shared)
    return layer_by_layer(
        fn, region, *args,
        optimise_hidden=functools.partial(ascend, num_steps=hidden_steps, stop_above=jnp.inf),
        optimise_output=functools.partial(ascend, num_steps=num_steps, stop_above=stop_above),
        max_bytes=_SHARE_OF_MEMORY * (default_max_bytes() if max_bytes is None else max_bytes),
    )


class _State(NamedTuple):
    """Where the ascent is, the best slopes seen and the bounds there, and what Adam remembers."""

    shares: PyTree
    best: PyTree
    lower: Array
    moments: optax.OptState


def _ascend(
    value: Callable[[SlopeChoice], Array], entered: Mapping[Op, Sequence[Interval]], *, num_steps: int,
    learning_rate: float, is_shared: bool, stop_above: float,
) -> Array:
    """Finds slopes that raise `value(slopes)`, lower bounds of some rows; returns the best bound of each."""
    start: dict[Op, Array] = {}

    def begin(op: Op, rows: Rows) -> Array | None:
        if op.name != PIECEWISE_LINEAR:
            return None
        share = relaxations.share(entered[op][0], relaxations.adaptive)
        beside = share if is_shared else jnp.broadcast_to(rows.beside(share), rows.values.shape)
        start[op] = lax.stop_gradient(beside)
        return _slopes(op, rows, entered[op][0], start[op])

    at_start = value(begin)
    if not start or num_steps == 0:
        return at_start
    ops = tuple(start)

    def bound(shares: list[Array]) -> Array:
        given = dict(zip(ops, shares, strict=True))

        def choose(op: Op, rows: Rows) -> Array | None:
            return _slopes(op, rows, entered[op][0], given[op]) if op in given else None

        return value(choose)

    def objective(shares: list[Array]) -> tuple[Array, Array]:
        found = bound(shares)
        return -found.sum(), found

    optimizer = optax.adam(optax.exponential_decay(learning_rate, 1, _LAST ** (1 / num_steps)), b1=_MOMENTUM)

    def step(state: _State) -> _State:
        (_, found), gradient = jax.value_and_grad(objective, has_aux=True)(state.shares)
        is_better = found.sum() > state.lower.sum() if is_shared else found > state.lower

        def pick(new: Array, old: Array) -> Array:
            return jnp.where(is_better.reshape(-1, *(1,) * (new.ndim - 1)) if is_better.ndim else is_better, new, old)

        best = jax.tree.map(pick, state.shares, state.best)
        with jax.numpy_dtype_promotion("standard"):  # optax counts its steps in int32
            updates, moments = optimizer.update(gradient, state.moments)
        shares = jax.tree.map(lambda share: jnp.clip(share, 0.0, 1.0), optax.apply_updates(state.shares, updates))
        return _State(shares, best, pick(found, state.lower), moments)

    shares = list(start.values())
    state = _State(shares, shares, jnp.full_like(at_start, -jnp.inf), optimizer.init(shares))
    state, _ = lax.scan(_while_open(step, stop_above), state, length=num_steps)
    return _known_value(bound, state.best, lax.stop_gradient(state.lower))


def _while_open(step: Callable[[_State], _State], stop_above: float) -> Callable[..., tuple[_State, None]]:
    """Makes a step for `scan`, which does nothing once all bounds exceed a value."""

    def guarded(state: _State, _: None) -> tuple[_State, None]:
        is_open = (state.lower <= stop_above).any()
        moved = lax.cond(any_example(is_open), step, lambda state: state, state)
        # Each example stops by itself, whoever shares its batch.
        return jax.tree.map(lambda new, old: jnp.where(is_open, new, old), moved, state), None

    never = isinstance(stop_above, float) and stop_above == math.inf
    return (lambda state, _: (step(state), None)) if never else guarded


def _known_value(fn: Callable[[PyTree], Array], at: PyTree, value: Array) -> Array:
    """Gives a value `fn(at)` that is known already the derivatives of `fn` in what it closes over."""
    convert, closed_over = jax.closure_convert(fn, lax.stop_gradient(at))

    @jax.custom_jvp
    def known(value: Array, at: PyTree, closed_over: PyTree) -> Array:
        del at, closed_over
        return value

    @known.defjvp
    def _differentiate(primals: tuple, tangents: tuple) -> tuple[Array, Array]:
        value, at, closed_over = primals
        return value, jax.jvp(lambda *consts: convert(at, *consts), tuple(closed_over), tuple(tangents[2]))[1]

    return known(value, lax.stop_gradient(at), closed_over)


def _slopes(op: Op, rows: Rows, bounds: Interval, share: Array) -> Array:
    """Turns shares of the range of slopes, beside the rows or one for each neuron, into slopes."""
    low, high = (rows.beside(relaxations.free_slope(op, bounds, end)) for end in (0.0, 1.0))
    return low + (high - low) * (share if share.ndim == rows.values.ndim else rows.beside(share))
