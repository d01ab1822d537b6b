"""Small functions with known answers, as `Partial`s over module-level functions."""

import jax
import jax.numpy as jnp
from jax.tree_util import Partial


def _linear(w, b, x):
    score = x @ w + b
    return jnp.stack([-score, score], axis=1)


def linear_classifier(w, b=0.0):
    """Two classes on the sides of `w x + b = 0`."""
    return Partial(_linear, jnp.asarray(w), b)


def _banded(w, b, x):
    logits = _linear(w, b, x)
    return logits, -jnp.abs(logits[:, 1])


def banded_detector(w, b=0.0):
    """The same with the score `-|w x + b|`: with a threshold -t, a band of half-width t is rejected."""
    return Partial(_banded, jnp.asarray(w), b)


def _mlp(params, x):
    for w, b in params[:-1]:
        x = jax.nn.relu(x @ w + b[None])
    return x @ params[-1][0] + params[-1][1][None]


def _random_detector(params, x):
    out = _mlp(params, x)
    return out[:, :-1], out[:, -1]


def _params(key, sizes):
    keys = jax.random.split(key, len(sizes) - 1)
    return [
        (2.0 * jax.random.normal(k, (a, b)) / jnp.sqrt(a), 0.3 * jax.random.normal(k, (b,)))
        for k, a, b in zip(keys, sizes[:-1], sizes[1:], strict=True)
    ]


def random_detector(key, num_inputs=6, num_classes=3):
    """An untrained net whose last output is the rejection score: it fails in all the ways there are."""
    return Partial(_random_detector, _params(key, (num_inputs, 24, 24, num_classes + 1)))


def random_classifier(key, num_inputs=6, num_classes=3):
    return Partial(_mlp, _params(key, (num_inputs, 24, 24, num_classes)))


def _tabulated(logits, score, x):
    return logits[x], score[x]


def tabulated_detector(decisions, num_classes):
    """A detector on the numbered points of a finite space; -1 is rejected."""
    decisions = jnp.asarray(decisions)
    return Partial(_tabulated, jax.nn.one_hot(decisions, num_classes), jnp.where(decisions < 0, 1.0, -1.0))


def _looked_up(logits, x):
    return logits[x]


def tabulated_classifier(labels, num_classes):
    return Partial(_looked_up, jax.nn.one_hot(jnp.asarray(labels), num_classes))
