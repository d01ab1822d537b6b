"""Networks of linf distances (Zhang et al. 2021, arXiv:2102.05363), which are 1-Lipschitz in linf by construction."""

import math

import jax
import jax.numpy as jnp
from flax import linen as nn

from rdx.models.normalise import normalise
from rdx.types import Array, ArrayLike

# Divisors and arguments of logarithms are at least this.
_TINY = 1e-30


class LinfDistanceNet(nn.Module):
    """Layers of units `||x - w||_inf`, with mean shift after all but the last; logits are minus the last distances.

    Every unit changes by at most as much as its inputs do, so each logit is 1-Lipschitz in linf and a prediction is
    certified within half of its margin; see `bounds.lipschitz`. In training the norm is `||x - w||_p` with `p` rising
    from about 8, as the gradient of the maximum is that of one element; such units are not 1-Lipschitz yet.

    Mean shift subtracts the batch's mean of each unit, the running one in inference. Source: Zhang et al. (2021,
    arXiv:2102.05363), their fully connected net. Weights are drawn from N(0, 1); the identity that
    they add to the weights of deep nets is left out. The parameter `scale` is for the loss of `train.linf_distance`.

    Attributes:
        features: widths of the hidden layers.
        num_classes: number of logits.
        bn_momentum: decay of the running means; 0 keeps those of the last batch.
        mean: subtracted from the input, one value or one per channel.
        std: divides the input; the logits are then `1 / std`-Lipschitz.
    """

    features: tuple[int, ...]
    num_classes: int = 10
    bn_momentum: float = 0.9
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)

    @nn.compact
    def __call__(self, x: Array, *, train: bool = False, p: ArrayLike | None = None) -> Array:
        """Computes the logits `[B, K]` of inputs `[B, ...]`.

        Args:
            x: inputs.
            train: whether means are those of the batch, and update the running ones.
            p: the norm, a scalar that may be traced; None for linf.
        """
        x = normalise(x, self.mean, self.std).reshape(x.shape[0], -1)
        for number, width in enumerate(self.features):
            x = LpDistance(width, name=f"LpDistance_{number}")(x, p=p)
            x = MeanShift(self.bn_momentum, name=f"MeanShift_{number}")(x, train=train)
        self.param("scale", nn.initializers.ones, ())
        bias = self.param("bias", nn.initializers.zeros, (self.num_classes,))
        x = LpDistance(self.num_classes, name=f"LpDistance_{len(self.features)}")(x, p=p)
        return -(x + bias[None])


class LpDistance(nn.Module):
    """Computes distances of the input to learned points.

    Attributes:
        features: number of points.
    """

    features: int

    @nn.compact
    def __call__(self, x: Array, *, p: ArrayLike | None = None) -> Array:
        """Computes `||x - w_j||_p`, shape `[B, features]`, of inputs `[B, I]`; None for linf."""
        points = self.param("points", nn.initializers.normal(1.0), (self.features, x.shape[1]))
        if p is None:
            return _largest(jnp.abs(x[:, None, :] - points[None]))
        return lp_distance(x, points, jnp.asarray(p, x.dtype))


def _largest(distances: Array) -> Array:
    """Computes the maximum over the last axis of numbers from 0 up, `[B, O, I] -> [B, O]`, in two steps.

    Bounds list what a maximum is taken of, and twice the root of `I` are fewer than `I`.
    """
    size = distances.shape[2]
    block = math.isqrt(size - 1) + 1
    padded = jnp.pad(distances, ((0, 0), (0, 0), (0, -size % block)))
    return padded.reshape(*distances.shape[:2], -1, block).max(axis=3).max(axis=2)


class MeanShift(nn.Module):
    """Subtracts each unit's mean over the batch; BatchNorm without the scale, which would change Lipschitz constants.

    Attributes:
        momentum: decay of the running mean.
    """

    momentum: float = 0.9

    @nn.compact
    def __call__(self, x: Array, *, train: bool) -> Array:
        """Shifts units `[B, I]`."""
        running = self.variable("batch_stats", "mean", jnp.zeros, (x.shape[1],), x.dtype)
        if not train:
            return x - running.value[None]
        mean = x.mean(axis=0)
        if not self.is_initializing():
            running.value = self.momentum * running.value + (1.0 - self.momentum) * mean
        return x - mean[None]


@jax.custom_vjp
def lp_distance(x: Array, points: Array, p: Array) -> Array:
    """Computes `||x_b - w_j||_p = m (sum_i (|x_bi - w_ji| / m)^p)^(1/p)` with the largest difference `m`.

    Nothing overflows for any finite `p`. Differences are recomputed for the gradient rather than kept, as there are
    `B O I` of them; `p` has no gradient.

    Args:
        x: shape `[B, I]`.
        points: shape `[O, I]`.
        p: at least 1, a scalar.

    Returns:
        Shape `[B, O]`.
    """
    return _forward(x, points, p)[0]


def _parts(x: Array, points: Array, p: Array) -> tuple[Array, Array]:
    largest = jnp.abs(x[:, None, :] - points[None]).max(axis=2)
    return largest, _powers(x, points, largest, p).sum(axis=2)


def _powers(x: Array, points: Array, largest: Array, power: Array) -> Array:
    # exp and log are vectorised on CPUs, pow is not.
    share = jnp.abs(x[:, None, :] - points[None]) / jnp.maximum(largest, _TINY)[:, :, None]
    return jnp.exp(power * jnp.log(jnp.maximum(share, _TINY)))


def _forward(x: Array, points: Array, p: Array) -> tuple[Array, tuple[Array, ...]]:
    largest, total = _parts(x, points, p)
    return largest * total ** (1.0 / p), (x, points, p, largest, total)


def _backward(kept: tuple[Array, ...], cotangent: Array) -> tuple[Array, Array, Array]:
    x, points, p, largest, total = kept
    # d ||v||_p / d |v_i| = (|v_i| / ||v||_p)^(p - 1)
    # The largest share is 1, so the total is less only where all differences are 0.
    outer = cotangent * jnp.maximum(total, 1.0) ** (1.0 / p - 1.0)
    inner = outer[:, :, None] * _powers(x, points, largest, p - 1.0) * jnp.sign(x[:, None, :] - points[None])
    return inner.sum(axis=1), -inner.sum(axis=0), jnp.zeros_like(p)


lp_distance.defvjp(_forward, _backward)
