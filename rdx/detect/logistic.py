"""Logistic regression over several scores, as the detectors of Feinman, Ma and Lee end: one score from many layers."""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
import scipy.optimize
from jax.tree_util import Partial

from rdx.compilation import as_partial
from rdx.types import Array, ArrayLike


class Logistic(NamedTuple):
    """A fitted regression `log-odds = ((scores - mean) / scale) @ weights + bias`.

    Attributes:
        mean: of each score over the examples of the fit. Shape `[F]`.
        scale: their standard deviation. Shape `[F]`.
        weights: shape `[F]`.
        bias: a scalar.
    """

    mean: np.ndarray
    scale: np.ndarray
    weights: np.ndarray
    bias: np.ndarray


def fit(negative: ArrayLike, positive: ArrayLike, *, penalty: float = 1.0) -> Logistic:
    """Fits `min_w,b sum_i log(1 + exp(-t_i (w . s_i + b))) + penalty / 2 ||w||^2` over standardised scores.

    Source: Feinman et al. (2017, arXiv:1703.00410, Sec. 5), Ma et al. (2018, arXiv:1801.02613, Sec. 4) and Lee et al.
    (2018, arXiv:1807.03888, Sec. 2.2) combine their scores so. The loss is convex; L-BFGS finds its minimum.

    Args:
        negative: scores of inputs to accept, shape `[N, F]`.
        positive: scores of inputs to reject, shape `[M, F]`.
        penalty: weight of the ridge, 1 as scikit-learn's default.

    Returns:
        The regression, in float32.

    Raises:
        ValueError: without inputs of either kind, or scores that are not finite.
    """
    negative, positive = np.asarray(negative, np.float64), np.asarray(positive, np.float64)
    if not len(negative) or not len(positive):
        raise ValueError("Logistic regression needs inputs of both kinds: give scores to accept and scores to reject.")
    scores, signs = np.concatenate([negative, positive]), np.repeat([-1.0, 1.0], [len(negative), len(positive)])
    if not np.isfinite(scores).all():
        raise ValueError("Scores are not finite: check the detector's fit before the scores are combined.")
    mean, scale = scores.mean(axis=0), np.maximum(scores.std(axis=0), 1e-12)
    inputs = (scores - mean) / scale

    def objective(theta: np.ndarray) -> tuple[float, np.ndarray]:
        margins = signs * (inputs @ theta[:-1] + theta[-1])
        slope = -signs / (1.0 + np.exp(np.clip(margins, -500, 500)))
        value = np.logaddexp(0.0, -margins).sum() + 0.5 * penalty * theta[:-1] @ theta[:-1]
        return value, np.append(inputs.T @ slope + penalty * theta[:-1], slope.sum())

    theta = scipy.optimize.minimize(objective, np.zeros(inputs.shape[1] + 1), jac=True, method="L-BFGS-B").x
    return Logistic(*(np.asarray(value, np.float32) for value in (mean, scale, theta[:-1], theta[-1])))


def combined(scores_fn: Callable[[Array], tuple[Array, Array]], logistic: Logistic) -> Partial:
    """Builds the detector whose score is the regression's log-odds.

    Args:
        scores_fn: `x [B, ...] -> (logits [B, K], scores [B, F])`.
        logistic: from `fit`.

    Returns:
        A `Detector`.
    """
    return Partial(_combined, as_partial(scores_fn), logistic)


def joined(*parts: Callable[[Array], tuple[Array, Array]]) -> Partial:
    """Joins the scores of several detectors of one classifier.

    Args:
        *parts: each `x [B, ...] -> (logits [B, K], score [B] or scores [B, F])`.

    Returns:
        `x -> (logits of the first, scores [B, F])`.
    """
    return Partial(_joined, tuple(as_partial(part) for part in parts))


def _combined(scores_fn: Partial, logistic: Logistic, x: Array) -> tuple[Array, Array]:
    logits, scores = scores_fn(x)
    mean, scale, weights = (value[None] for value in logistic[:3])
    return logits, ((scores - mean) / scale * weights).sum(axis=1) + logistic.bias


def _joined(parts: tuple[Partial, ...], x: Array) -> tuple[Array, Array]:
    outputs = [part(x) for part in parts]
    columns = [scores if scores.ndim == 2 else scores[:, None] for _, scores in outputs]
    return outputs[0][0], jnp.concatenate(columns, axis=1)
