"""Bounds and their input gradients against auto_LiRPA's, stored by scripts/make_golden_bounds.py."""

import functools
from functools import partial
from pathlib import Path

import golden_nets
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

from rdx import balls, bounds, margins
from rdx.bounds import relaxations

FOLDER = Path(__file__).resolve().parents[1] / "golden"
REGIONS = ("linf", "l2", "linf_box")
METHODS = {
    "IBP": bounds.ibp,
    "forward.adaptive": bounds.forward,
    "CROWN-IBP.adaptive": bounds.crown_ibp,
    "CROWN-IBP.same-slope": partial(bounds.crown_ibp, relu_lower=relaxations.same_slope),
    "CROWN.adaptive": bounds.crown,
    "CROWN.same-slope": partial(bounds.crown, relu_lower=relaxations.same_slope),
}
WEIGHTS = {"weight", "bias", "mean", "var"}
TOLERANCE = 1e-5
# Relaxations of our own, by net: how much wider than auto_LiRPA's a single margin's bounds may be. Its mean width is
# held to 1e-4. Max pooling takes another of the planes below: on average higher, not everywhere (0.3 % measured).
OWN = {"pooling": 5e-3, "smooth": 1e-4, "attention": 1e-4}


@functools.cache
def golden(net):
    with np.load(FOLDER / f"bounds_{net}.npz") as file:
        return {name: jnp.asarray(value) for name, value in file.items()}


def logits_fn(net):
    weights = {name: value for name, value in golden(net).items() if name.split(".")[-1] in WEIGHTS}
    return Partial(golden_nets.NETS[net], weights)


def ball_of(net, region):
    norm = region.removesuffix("_box")
    low, high = (0.0, 1.0) if region.endswith("_box") else (-jnp.inf, jnp.inf)
    return balls.Ball(norm, golden(net)[f"eps.{norm}"], low, high)


def cases(net):
    """Lists the methods that a file holds and that rdx has."""
    return [method for method in METHODS if f"linf.{method}.lower" in golden(net)]


def is_same(net, method):
    """Tells whether the relaxations are auto_LiRPA's."""
    return net not in OWN or (method == "IBP" and net != "attention")


SAME = [(net, method) for net in golden_nets.NETS for method in cases(net) if is_same(net, method)]
DIFFERENT = [(net, method) for net in OWN for method in cases(net) if not is_same(net, method)]


# The ball is traced, so that both linf regions share one compilation.
@partial(jax.jit, static_argnames="method")
def bound(logits_fn, ball, x, labels, method):
    return METHODS[method](margins.of(logits_fn), ball.region(x), labels)


@partial(jax.jit, static_argnames="method")
def bounds_and_gradients(logits_fn, ball, x, labels, method):
    plain = METHODS[method] if method == "IBP" else partial(METHODS[method], intersect=False)
    interval, pull_back = jax.vjp(lambda x: plain(margins.of(logits_fn), ball.region(x), labels), x)
    zeros, ones = jnp.zeros_like(interval.lower), jnp.ones_like(interval.lower)
    (lower_grad,) = pull_back(interval._replace(lower=ones, upper=zeros))
    (upper_grad,) = pull_back(interval._replace(lower=zeros, upper=ones))
    return {"lower": interval.lower, "upper": interval.upper, "lower_grad": lower_grad, "upper_grad": upper_grad}


@jax.jit
def optimised(logits_fn, ball, x, labels):
    method = partial(bounds.alpha_crown, num_steps=20, hidden_steps=20, learning_rate=0.5)
    return method(margins.of(logits_fn), ball.region(x), labels)


@jax.jit
def sampled_margins(logits_fn, ball, x, labels):
    """Computes margins at random points of the ball, and of its border."""
    keys = jax.random.split(jax.random.key(0), (256, len(x)))
    inside = jax.vmap(ball.sample, in_axes=(0, None))(keys, x)
    border = jax.vmap(lambda points: ball.project(x + 100.0 * (points - x), x))(inside)
    return jax.vmap(margins.of(logits_fn), in_axes=(0, None))(jnp.concatenate([inside, border]), labels)


def assert_close(ours, reference):
    scale = max(1.0, float(jnp.abs(reference).max()))
    np.testing.assert_allclose(ours, reference, rtol=0.0, atol=TOLERANCE * scale)


@pytest.mark.parametrize("net", golden_nets.NETS)
def test_net_is_that_of_the_file(net):
    assert_close(logits_fn(net)(golden(net)["x"]), golden(net)["logits"])


@pytest.mark.parametrize("net", golden_nets.NETS)
def test_file_separates_the_cases(net):
    values = [
        value for name, value in golden(net).items() if name.endswith(".lower") and "Optimized" not in name
    ]
    assert len(values) >= len(REGIONS) * 3
    for i, value in enumerate(values):
        assert all(jnp.abs(value - other).max() > 100 * TOLERANCE * jnp.abs(value).max() for other in values[:i])


@pytest.mark.parametrize("region", REGIONS)
@pytest.mark.parametrize(("net", "method"), SAME)
def test_bounds_and_gradients(net, method, region):
    file = golden(net)
    ours = bounds_and_gradients(logits_fn(net), ball_of(net, region), file["x"], file["labels"], method)
    for part, value in ours.items():
        assert_close(value, file[f"{region}.{method}.{part}"])


@pytest.mark.parametrize("region", REGIONS)
@pytest.mark.parametrize("net", ["mlp", "conv", "residual"])
def test_optimised_bounds_are_at_least_as_tight(net, region):
    # As many steps of the same first size; auto_LiRPA's fall to 0.67 of it, ours to 0.12.
    file, name = golden(net), f"{region}.CROWN-Optimized.adaptive"
    ours = optimised(logits_fn(net), ball_of(net, region), file["x"], file["labels"])
    allowed = TOLERANCE * float(jnp.abs(file[f"{name}.lower"]).max())
    assert ours.lower.mean() >= file[f"{name}.lower"].mean() - allowed
    assert ours.upper.mean() <= file[f"{name}.upper"].mean() + allowed


@pytest.mark.parametrize("region", REGIONS)
@pytest.mark.parametrize(("net", "method"), DIFFERENT)
def test_bounds_are_sound_and_no_looser(net, method, region):
    file, ball = golden(net), ball_of(net, region)
    ours = bound(logits_fn(net), ball, file["x"], file["labels"], method)
    width = ours.upper - ours.lower
    theirs = file[f"{region}.{method}.upper"] - file[f"{region}.{method}.lower"]
    assert width.mean() <= theirs.mean() * (1.0 + 1e-4)
    assert (width <= theirs * (1.0 + OWN[net])).all()
    seen = sampled_margins(logits_fn(net), ball, file["x"], file["labels"])
    assert (seen.min(axis=0) >= ours.lower - TOLERANCE).all()
    assert (seen.max(axis=0) <= ours.upper + TOLERANCE).all()
