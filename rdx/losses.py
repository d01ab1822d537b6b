"""Per-example losses: `[B]`, higher is worse for the model. Every function takes logits, never probabilities."""

import jax
import jax.numpy as jnp

from rdx.types import Array


def _pick(logits: Array, labels: Array) -> Array:
    return jnp.take_along_axis(logits, labels[:, None], axis=1)[:, 0]


def _best_other(logits: Array, labels: Array) -> Array:
    # Labels of a narrow integer type must not wrap around at the number of classes.
    is_label = jnp.arange(logits.shape[1], dtype=jnp.int32)[None, :] == labels[:, None].astype(jnp.int32)
    return jnp.where(is_label, -jnp.inf, logits).max(axis=1)


def is_wrong(logits: Array, labels: Array) -> Array:
    """Tells where the prediction differs from the label; NaN logits count as wrong.

    Args:
        logits: shape `[B, K]`.
        labels: shape `[B]`, int.

    Returns:
        `argmax_j z_j != y`, shape `[B]`, bool.
    """
    return (logits.argmax(axis=1) != labels) | jnp.isnan(logits).any(axis=1)


def cross_entropy(logits: Array, labels: Array) -> Array:
    """Computes `log sum_j exp(z_j) - z_y`.

    Args:
        logits: shape `[B, K]`.
        labels: shape `[B]`, int.

    Returns:
        Loss, shape `[B]`.
    """
    return jax.nn.logsumexp(logits, axis=1) - _pick(logits, labels)


def margin(logits: Array, labels: Array) -> Array:
    """Computes the margin loss of Carlini & Wagner (2017, arXiv:1608.04644), `max_{j != y} z_j - z_y`.

    Positive exactly where the example is misclassified.

    Args:
        logits: shape `[B, K]`.
        labels: shape `[B]`, int.

    Returns:
        Loss, shape `[B]`.
    """
    return _best_other(logits, labels) - _pick(logits, labels)


def dlr(logits: Array, labels: Array) -> Array:
    """Computes the difference of logits ratio of Croce & Hein (2020, arXiv:2003.01690, Eq. 6).

    `(max_{j != y} z_j - z_y) / (z_(1) - z_(3) + 1e-12)`, where `z_(1) >= z_(2) >= ...` are the sorted logits. It does
    not change when the logits are shifted or scaled. With two classes there is no third logit, and the plain margin is
    returned.

    Args:
        logits: shape `[B, K]`.
        labels: shape `[B]`, int.

    Returns:
        Loss, shape `[B]`.
    """
    if logits.shape[1] < 3:
        return margin(logits, labels)
    ordered = jnp.sort(logits, axis=1, descending=True)
    return margin(logits, labels) / (ordered[:, 0] - ordered[:, 2] + 1e-12)


def kl(logits: Array, reference_logits: Array) -> Array:
    """Computes `KL(softmax(reference) || softmax(logits)) = sum_j p_j (log p_j - log q_j)`.

    The order is that of TRADES (Zhang et al. 2019, arXiv:1901.08573): the reference is the clean prediction.

    Args:
        logits: shape `[B, K]`.
        reference_logits: shape `[B, K]`.

    Returns:
        Divergence, shape `[B]`.
    """
    log_p = jax.nn.log_softmax(reference_logits, axis=1)
    return (jnp.exp(log_p) * (log_p - jax.nn.log_softmax(logits, axis=1))).sum(axis=1)


def targeted_cross_entropy(logits: Array, targets: Array) -> Array:
    """Computes `-cross_entropy(logits, targets)`: rises as the target class becomes more probable. Shape `[B]`."""
    return -cross_entropy(logits, targets)


def targeted_margin(logits: Array, targets: Array) -> Array:
    """Computes `z_t - max_{j != t} z_j`: positive exactly where the target is predicted. Shape `[B]`."""
    return -margin(logits, targets)


def targeted_log_odds(logits: Array, targets: Array) -> Array:
    """Computes the log-odds of the target, `log p_t - log(1 - p_t) = z_t - log sum_{j != t} exp(z_j)`.

    Source: Alzantot et al. (2019, arXiv:1805.11090, Eq. 1), the fitness of GenAttack.

    Args:
        logits: shape `[B, K]`.
        targets: shape `[B]`, int.

    Returns:
        Loss, shape `[B]`.
    """
    is_target = jnp.arange(logits.shape[1], dtype=jnp.int32)[None, :] == targets[:, None].astype(jnp.int32)
    return _pick(logits, targets) - jax.nn.logsumexp(jnp.where(is_target, -jnp.inf, logits), axis=1)


def targeted_dlr(logits: Array, labels: Array, targets: Array) -> Array:
    """Computes the targeted DLR loss of Croce & Hein (2020, arXiv:2003.01690, Eq. 7).

    `(z_t - z_y) / (z_(1) - (z_(3) + z_(4)) / 2 + 1e-12)`; with fewer than four classes the plain `z_t - z_y`.

    Args:
        logits: shape `[B, K]`.
        labels: shape `[B]`, int.
        targets: shape `[B]`, int.

    Returns:
        Loss, shape `[B]`.
    """
    difference = _pick(logits, targets) - _pick(logits, labels)
    if logits.shape[1] < 4:
        return difference
    ordered = jnp.sort(logits, axis=1, descending=True)
    return difference / (ordered[:, 0] - 0.5 * (ordered[:, 2] + ordered[:, 3]) + 1e-12)


def worst_case_cross_entropy(margins_lower: Array) -> Array:
    """Computes the worst-case cross entropy of certified margins.

    With `m_j <= z_y - z_j` for every `j != y` and `m_y = 0`, the loss is `-log p_y` for `p_j = e^{-m_j} / sum_k
    e^{-m_k}`, that is `log(1 + sum_{j != y} e^{-m_j})`. It bounds the cross entropy of every attacked input from above.

    Source: Frosio & Kautz (2023, A5, Eqs. 2-3), after Gowal et al. (2018, arXiv:1810.12715).

    Args:
        margins_lower: lower bounds of the margins against the other classes, shape `[B, K - 1]`.

    Returns:
        Loss, shape `[B]`.
    """
    return jax.nn.logsumexp(jnp.pad(-margins_lower, ((0, 0), (1, 0))), axis=1)
