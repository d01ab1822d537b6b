"""The greatest bound that a convex combination of label and abstain logits gives over a box: closed form and steps.

For a network `z = W h + b` with `K` classes and `M` abstain classes, and weights `w` on `(y, a_1, ..., a_M)` that sum
to 1, `J_i(w) = min_{h in [l, u]} sum_k w_k z_k - z_i` is concave and piecewise linear in `w`. With one abstain class
its maximum has a closed form and equals `min_h max(z_y - z_i, z_a - z_i)`, by minimax.

Source: Sheikholeslami, Lotfi & Kolter (2021, "Provably robust classification of adversarial examples with detection",
ICLR, Theorem 1); several abstain classes: Baharlouei et al. (2023, arXiv:2210.14410).
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from rdx.bounds import Interval
from rdx.types import Array, ArrayLike

# With several abstain classes.
_NUM_MIRROR_STEPS = 20


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Network:
    """A network whose last layer is known apart: `z = hidden(x) @ kernel + bias`, of `K` classes and `M` abstain ones.

    Attributes:
        hidden_fn: `x [B, ...] -> [B, H]`, a `Partial`.
        kernel: shape `[H, K + M]`.
        bias: shape `[K + M]`.
        num_classes: `K`.
    """

    hidden_fn: Partial
    kernel: Array
    bias: Array
    num_classes: int = dataclasses.field(metadata={"static": True})

    @property
    def num_abstain(self) -> int:
        """`M`."""
        return self.kernel.shape[1] - self.num_classes

    def __call__(self, x: Array) -> Array:
        """Computes the logits `[B, K + M]` of inputs `[B, ...]`."""
        return self.hidden_fn(x) @ self.kernel + self.bias[None]


def weights(
    box: Interval, network: Network, labels: Array, *, low: ArrayLike = 0.0, high: ArrayLike = 1.0
) -> Array:
    """Finds the weights of label and abstain classes that make the bound greatest.

    With one abstain class and `omega(eta) = W_y - W_i + eta (W_a - W_y)`, the bound `J_i(eta) = c omega(eta) -
    r |omega(eta)| + b(eta)` over a box of center `c` and radius `r` has its kinks at `eta_h = (W_y - W_i)_h / (W_y -
    W_a)_h`; sorted, its slope falls by `2 r_h |W_a - W_y|_h` at each, and the maximum is where it passes 0. With
    several, each abstain class is first solved by itself; mirror steps from the best of these then mix them, which
    finds a good but not always the greatest bound. Any weights are sound.

    Source: Sheikholeslami et al. (2021, Theorem 1); Baharlouei et al. (2023, arXiv:2210.14410, Sec. 4) for the
    steps of several.

    Args:
        box: bounds of the last hidden layer, each end of shape `[B, H]`.
        network: with `K + M` outputs, `M >= 1`.
        labels: shape `[B]`, int.
        low: least weight of the abstain classes together; training raises it to keep them in use. Mirror steps do
            not know it.
        high: greatest.

    Returns:
        Shape `[B, K - 1, 1 + M]`: label first; rows sum to 1.

    Raises:
        ValueError: without an abstain class.
    """
    num_abstain = network.num_abstain
    if num_abstain < 1:
        raise ValueError(f"The network has no abstain class: give it more than {network.num_classes} outputs.")
    ends, candidates = jnp.eye(num_abstain + 1, dtype=box.lower.dtype)[:, None, None], []
    for place in range(1, num_abstain + 1):
        share = jnp.clip(_best_share(box, network, labels, place), low, high)[..., None]
        candidates.append((1.0 - share) * ends[0] + share * ends[place])
    best, value = candidates[0], lower_bound(box, network, labels, candidates[0])
    for candidate in candidates[1:]:
        best, value = _greater(box, network, labels, best, value, candidate)
    if num_abstain == 1:
        return best
    mixed = 0.5 * best + 0.5 / (num_abstain + 1)  # a weight of 0 would stay so

    def step(carry: tuple[Array, Array, Array], i: Array) -> tuple[tuple[Array, Array, Array], None]:
        mixed, best, value = carry
        slopes = _slopes(box, network, labels, mixed)
        spread = (slopes.max(axis=2, keepdims=True) - slopes.min(axis=2, keepdims=True)) * jnp.sqrt(1.0 + i)
        mixed = mixed * jnp.exp((slopes - slopes.max(axis=2, keepdims=True)) / jnp.maximum(spread, 1e-12))
        mixed = mixed / mixed.sum(axis=2, keepdims=True)
        return (mixed, *_greater(box, network, labels, best, value, mixed)), None

    numbers = jnp.arange(_NUM_MIRROR_STEPS, dtype=mixed.dtype)
    return jax.lax.scan(step, (mixed, best, value), numbers)[0][1]


def lower_bound(box: Interval, network: Network, labels: Array, weights: Array) -> Array:
    """Computes `J_i(w)` over a box of the last hidden layer, shape `[B, K - 1]`.

    Args:
        box: bounds of the last hidden layer, each end of shape `[B, H]`.
        network: with `K + M` outputs.
        labels: shape `[B]`, int.
        weights: shape `[B, K - 1, 1 + M]`, of label and abstain classes.

    Returns:
        The bounds for the classes `i != y`, in increasing order of `i`.
    """
    matrix = specification(labels, weights, network.kernel.shape[1])
    rows = jnp.einsum("bik,hk->bih", matrix, network.kernel)
    middle = jnp.einsum("bih,bh->bi", rows, box.center) - jnp.einsum("bih,bh->bi", jnp.abs(rows), box.radius)
    return middle + jnp.einsum("bik,k->bi", matrix, network.bias)


def specification(labels: Array, weights: Array, num_outputs: int) -> Array:
    """Builds the rows `sum_k w_k e_k - e_i` for the classes `i != y`: the combinations are `rows @ z`.

    Args:
        labels: shape `[B]`, int.
        weights: shape `[B, K - 1, 1 + M]`, of label and abstain classes.
        num_outputs: `K + M`.

    Returns:
        Shape `[B, K - 1, K + M]`.
    """
    num_others, num_abstain = weights.shape[1], weights.shape[2] - 1
    labels = labels.astype(jnp.int32)
    order = jnp.arange(num_others, dtype=jnp.int32)[None]
    others = order + (order >= labels[:, None]).astype(jnp.int32)
    one_hot = lambda classes: jax.nn.one_hot(classes, num_outputs, dtype=weights.dtype)
    rows = weights[:, :, :1] * one_hot(labels)[:, None] - one_hot(others)
    return rows.at[:, :, num_outputs - num_abstain:].add(weights[:, :, 1:])


def _best_share(box: Interval, network: Network, labels: Array, place: int) -> Array:
    """Solves for abstain class number `place`, from 1, alone: the maximiser of `J_i` in [0, 1], shape `[B, K - 1]`."""
    label_only = jnp.zeros((len(labels), network.num_classes - 1, network.num_abstain + 1), box.lower.dtype)
    label_only = label_only.at[:, :, 0].set(1.0)
    start = specification(labels, label_only, network.kernel.shape[1])
    change = specification(labels, jnp.roll(label_only, place, axis=2), network.kernel.shape[1]) - start
    rows = lambda matrix: jnp.einsum("bik,hk->bih", matrix, network.kernel)
    first, second, radius = rows(start), rows(change), box.radius[:, None]
    kink = -first / jnp.where(second == 0, 1.0, second)
    is_inside = (second != 0) & (kink > 0) & (kink < 1)
    sign = jnp.where(first == 0, jnp.sign(second), jnp.sign(first))  # of omega just above 0
    slope = (box.center[:, None] * second - radius * sign * second).sum(axis=2)
    slope = slope + jnp.einsum("bik,k->bi", change, network.bias)
    order = jnp.argsort(jnp.where(is_inside, kink, jnp.inf), axis=2)
    fall = jnp.where(is_inside, 2.0 * radius * jnp.abs(second), 0.0)
    sorted_kinks = jnp.take_along_axis(jnp.where(is_inside, kink, 1.0), order, axis=2)
    after = slope[..., None] - jnp.take_along_axis(fall, order, axis=2).cumsum(axis=2)
    has_passed = after <= 0
    at = jnp.take_along_axis(sorted_kinks, has_passed.argmax(axis=2)[..., None], axis=2)[..., 0]
    return jnp.where(slope <= 0, 0.0, jnp.where(has_passed.any(axis=2), at, 1.0))


def _greater(
    box: Interval, network: Network, labels: Array, best: Array, value: Array, new: Array
) -> tuple[Array, Array]:
    reached = lower_bound(box, network, labels, new)
    return jnp.where((reached > value)[..., None], new, best), jnp.maximum(reached, value)


def _slopes(box: Interval, network: Network, labels: Array, weights: Array) -> Array:
    """Computes the supergradient of `J_i` in the weights: the logits at the worst point of the box, `[B, K-1, 1+M]`."""
    matrix = specification(labels, weights, network.kernel.shape[1])
    rows = jnp.einsum("bik,hk->bih", matrix, network.kernel)
    worst = box.center[:, None] - box.radius[:, None] * jnp.sign(rows)
    logits = jnp.einsum("bih,hk->bik", worst, network.kernel) + network.bias[None, None]
    own = jnp.take_along_axis(logits, labels.astype(jnp.int32)[:, None, None], axis=2)
    return jnp.concatenate([own, logits[:, :, network.num_classes:]], axis=2)
