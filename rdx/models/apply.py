"""The bridge from flax.linen modules to pure functions that `jit` caches per model."""

import dataclasses
import functools
from collections.abc import Callable, Hashable
from typing import Any, cast

import jax
from flax import linen as nn
from jax.tree_util import Partial

from rdx.types import Array, PyTree


def logits_fn(model: nn.Module, variables: PyTree, **static: Hashable) -> Partial:
    """Builds the `LogitsFn` `x [B, ...] -> logits [B, K]` of a module.

    The variables are leaves of the result: they pass through `jit` as arguments and through `vmap` for ensembles. Equal
    models and keywords share one function, so that new variables do not recompile anything.

    Args:
        model: a linen module; its fields must be hashable (tuples, not lists).
        variables: what `model.init` returned, `{"params": ..., ...}`.
        **static: keywords of the module's `__call__`, such as `train=False`; they are never traced.

    Returns:
        A `Partial` over the variables.
    """
    return Partial(_apply_fn(model, tuple(sorted(static.items()))), variables)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Forward:
    """A module as a function of explicit parameters and state; a pytree without leaves, equal for equal models.

    `model_state` holds the collections besides the parameters: `{"batch_stats": ...}`, or `{}` for nets without
    BatchNorm. A module with state takes the keyword `train` in `__call__` and has a field `bn_momentum`.

    Attributes:
        model: a linen module.
    """

    model: nn.Module = dataclasses.field(metadata={"static": True})

    def __call__(self, params: PyTree, model_state: PyTree, x: Array, *, train: bool) -> tuple[Array, PyTree]:
        """Computes the output and the next state.

        Args:
            params: the parameters.
            model_state: the state.
            x: inputs, shape `[B, ...]`.
            train: whether BatchNorm uses the batch's own statistics and updates the running ones.

        Returns:
            The output `[B, ...]` and the state, which inference leaves as it is.
        """
        variables = {"params": params, **model_state}
        if not model_state:
            return cast(Array, self.model.apply(variables, x)), model_state
        if not train:
            return cast(Array, self.model.apply(variables, x, train=False)), model_state
        return cast(tuple[Array, PyTree], self.model.apply(variables, x, train=True, mutable=list(model_state)))

    def statistics(self, params: PyTree, model_state: PyTree, x: Array) -> PyTree:
        """Computes the state in which inference normalises by the statistics of the batch `x`.

        It is differentiable in the parameters. Certified training bounds the network in this state, so that the bounds
        are those of the very function that the clean pass evaluates (Shi et al. 2021, arXiv:2103.17268).

        Args:
            params: the parameters.
            model_state: the state, only for its structure.
            x: inputs, shape `[B, ...]`.

        Returns:
            A state like `model_state`.
        """
        if not model_state:
            return model_state
        # With momentum 0 the running statistics become those of the batch.
        instant = Forward(self.model.clone(bn_momentum=0.0))  # pyright: ignore[reportCallIssue]
        return instant(params, model_state, x, train=True)[1]

    def logits_fn(self, params: PyTree, model_state: PyTree, **static: Hashable) -> Partial:
        """Builds the `LogitsFn` of the module in inference mode; `static` are further keywords of its `__call__`."""
        mode = {"train": False} if model_state else {}
        return logits_fn(self.model, {"params": params, **model_state}, **mode, **static)


def forward(model: nn.Module) -> Forward:
    """Builds `(params, model_state, x, *, train) -> (logits, model_state)`, the form in which losses take a model.

    Args:
        model: a linen module; its fields must be hashable (tuples, not lists).

    Returns:
        The model's `Forward`; those of equal models are equal.
    """
    return Forward(model)


def num_parameters(params: PyTree) -> int:
    """Counts the scalars in a pytree of arrays."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))


@functools.cache
def _apply_fn(model: nn.Module, static: tuple[tuple[str, Any], ...]) -> Callable[[PyTree, Array], Array]:
    def apply(variables: PyTree, x: Array) -> Array:
        return cast(Array, model.apply(variables, x, **dict(static)))

    return apply
