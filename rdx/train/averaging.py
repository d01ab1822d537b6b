"""Averages of the weights that training passes through, as an optax transformation.

Stochastic weight averaging (Izmailov et al. 2018, arXiv:1803.05407) takes the plain mean of the iterates from some step
on; an exponential moving average (Polyak & Juditsky 1992, in the form of Tarvainen & Valpola 2017, arXiv:1703.01780)
forgets the older ones. Both ride along in the optimizer's state, so that checkpoints hold them.
"""

from collections.abc import Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from rdx.models import Forward
from rdx.types import Array, PyTree


class AveragedState(NamedTuple):
    """State of `averaged`.

    Attributes:
        inner: the optimizer's state.
        step: number of updates so far, int32.
        mean: the average, of the parameters' structure.
    """

    inner: PyTree
    step: Array
    mean: PyTree


def averaged(
    optimizer: optax.GradientTransformation, *, decay: float | None = None, start: int = 0
) -> optax.GradientTransformation:
    """Has an optimizer keep the average of the parameters after its updates; what it updates stays the same.

    With the parameters `p_s` after update `s`, from `s = start + 1` on,

        decay None:   mean_s = mean_{s-1} + (p_s - mean_{s-1}) / (s - start)                     (SWA)
        otherwise:    mean_s = p_s in the first step, then decay mean_{s-1} + (1 - decay) p_s    (EMA)

    and `mean_s = p_s` before. BatchNorm's running statistics are those of the single iterates: renew them with
    `statistics` before the average is used.

    Args:
        optimizer: any optax transformation.
        decay: of the moving average, in [0, 1); None for the plain mean.
        start: updates before the first one that counts.

    Returns:
        A transformation whose state `average` reads.

    Raises:
        ValueError: on a decay outside [0, 1).
    """
    if decay is not None and not 0.0 <= decay < 1.0:
        raise ValueError(f"decay={decay} keeps nothing or everything: give a number from 0 to below 1, or None.")

    def init(params: PyTree) -> AveragedState:
        return AveragedState(optimizer.init(params), jnp.zeros((), jnp.int32), jax.tree.map(jnp.copy, params))

    def update(updates: PyTree, state: AveragedState, params: PyTree = None) -> tuple[PyTree, AveragedState]:
        if params is None:
            raise ValueError("Averaging needs the parameters: call update(updates, state, params).")
        updates, inner = optimizer.update(updates, state.inner, params)
        step = state.step + 1
        count = jnp.maximum(step - start, 1).astype(jnp.float32)
        rate = 1.0 / count if decay is None else jnp.where(count > 1.0, 1.0 - decay, 1.0)
        mean = optax.incremental_update(optax.apply_updates(params, updates), state.mean, rate)
        return updates, AveragedState(inner, step, mean)

    return optax.GradientTransformation(init, update)  # pyright: ignore[reportArgumentType]


def average(opt_state: PyTree) -> PyTree:
    """Reads the average from the optimizer's state, wherever in it `averaged` stands.

    Raises:
        ValueError: where the optimizer keeps none.
    """
    is_state = lambda leaf: isinstance(leaf, AveragedState)
    found = [leaf for leaf in jax.tree.leaves(opt_state, is_leaf=is_state) if is_state(leaf)]
    if not found:
        raise ValueError("This optimizer keeps no average: wrap it in averaging.averaged.")
    return found[0].mean


def statistics(forward: Forward, params: PyTree, model_state: PyTree, batches: Iterable[Array]) -> PyTree:
    """Computes BatchNorm's statistics for given parameters: the mean of those of some batches.

    An average of weights has no running statistics of its own. Source: Izmailov et al. (2018, arXiv:1803.05407,
    Sec. 3.2); the mean over batches is "precise BatchNorm" of Wu & Johnson (2021, arXiv:2105.07576, Sec. 3).

    Args:
        forward: the model.
        params: the parameters, such as an average.
        model_state: the state, only for its structure.
        batches: inputs, shape `[B, ...]` each, float; as many as the statistics need.

    Returns:
        A state like `model_state`; `{}` for a model without state.

    Raises:
        ValueError: without any batch.
    """
    if not model_state:
        return model_state
    found = [_compiled_statistics(forward, params, model_state, x) for x in batches]
    if not found:
        raise ValueError("Statistics need at least one batch: give some of the training inputs.")
    return jax.tree.map(lambda *leaves: jnp.stack(leaves).mean(axis=0), *found)


_compiled_statistics = jax.jit(Forward.statistics)
