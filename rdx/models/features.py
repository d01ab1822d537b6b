"""What networks compute on the way: hidden layers, the last layer by itself, and dropout at test time."""

import functools
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.tree_util import Partial

from rdx.models.cnn import BatchNormConvNet
from rdx.types import Array, Key, PyTree


def features_fn(model: nn.Module, variables: PyTree) -> Partial:
    """Builds `x -> (logits, hidden layers)` of a network of convolutions and dense layers with ReLU between them.

    Args:
        model: an `MLP` or a `ConvNet`.
        variables: what `model.init` returned.

    Returns:
        A `Partial` over the variables: `x [B, ...]` to the logits `[B, K]` and a tuple of what each hidden layer gives
        after its ReLU, the first layer first, each `[B, ...]`.

    Raises:
        ValueError: for a network with BatchNorm.
    """
    if isinstance(model, BatchNormConvNet):
        raise ValueError("Hidden layers are read from networks without BatchNorm: use a ConvNet or an MLP.")
    return Partial(_features(model), variables)


def hidden_fn(model: nn.Module, variables: PyTree) -> Partial:
    """Builds `x [B, ...] -> [B, H]`, the last hidden layer; arguments are those of `features_fn`."""
    return Partial(_last_hidden, features_fn(model, variables))


def last_layer(variables: PyTree) -> tuple[Array, Array]:
    """Gives the last dense layer's parameters: logits are `hidden @ kernel + bias`.

    Args:
        variables: what `model.init` of an `MLP` or a `ConvNet` returned.

    Returns:
        Kernel `[H, K]` and bias `[K]`.
    """
    params = variables["params"]
    last = max((name for name in params if name.startswith("Dense_")), key=_place)
    return params[last]["kernel"], params[last]["bias"]


def dropout_fn(model: nn.Module, variables: PyTree, *, rate: float = 0.5) -> Partial:
    """Builds the random network in which a share of what enters every dense layer is set to 0.

    Args:
        model: an `MLP`, whose inputs are then dropped too, or a `ConvNet`.
        variables: what `model.init` returned.
        rate: the share, in [0, 1).

    Returns:
        A `RandomLogitsFn` `(keys [B], x [B, ...]) -> logits [B, K]`.

    Raises:
        ValueError: on a rate outside [0, 1).
    """
    if not 0.0 <= rate < 1.0:
        raise ValueError(f"rate={rate} is not a share of the units: give a number from 0 to below 1.")
    return Partial(_dropped(model, rate), variables)


def _last_hidden(layers_fn: Partial, x: Array) -> Array:
    return layers_fn(x)[1][-1]


@functools.cache
def _features(model: nn.Module) -> Callable[[PyTree, Array], tuple[Array, tuple[Array, ...]]]:
    def apply(variables: PyTree, x: Array) -> tuple[Array, tuple[Array, ...]]:
        logits, state = model.apply(variables, x, capture_intermediates=_is_layer, mutable=["intermediates"])
        seen = cast(dict[str, Any], state["intermediates"])
        names = sorted((name for name in seen if "_" in name), key=lambda name: (name.split("_")[0], _place(name)))
        return logits, tuple(nn.relu(seen[name]["__call__"][0]) for name in names[:-1])

    return apply


@functools.cache
def _dropped(model: nn.Module, rate: float) -> Callable[[PyTree, Key, Array], Array]:
    def apply(variables: PyTree, keys: Key, x: Array) -> Array:
        def drop(layer: Callable[..., Any], args: Any, options: Any, context: Any) -> Any:
            if not isinstance(context.module, nn.Dense) or context.method_name != "__call__":
                return layer(*args, **options)
            units, number = args[0], _place(cast(str, context.module.name))
            draw = lambda key: jax.random.bernoulli(jax.random.fold_in(key, number), 1.0 - rate, units.shape[1:])
            return layer(jnp.where(jax.vmap(draw)(keys), units / (1.0 - rate), 0.0), *args[1:], **options)

        with nn.intercept_methods(drop):
            return model.apply(variables, x)  # pyright: ignore[reportReturnType]

    return apply


def _is_layer(module: nn.Module, method: str) -> bool:
    return method == "__call__" and isinstance(module, (nn.Conv, nn.Dense))


def _place(name: str) -> int:
    return int(name.rsplit("_", 1)[1])
