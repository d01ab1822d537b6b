"""Bounds and their input gradients against auto_LiRPA's, stored by scripts/make_golden_bounds.py."""

from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.tree_util import Partial

from rdx import balls, bounds, margins

FILE = Path(__file__).resolve().parents[1] / "golden" / "bounds_residual.npz"
REGIONS = ("linf", "l2", "linf_box")
METHODS = ("IBP", "CROWN-IBP.adaptive", "CROWN-IBP.same-slope", "CROWN.adaptive", "CROWN.same-slope")
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def golden():
    with np.load(FILE) as file:
        return {name: jnp.asarray(value) for name, value in file.items()}


def logits_fn(weights, x):
    """Computes the logits of the net that the script describes, NCHW."""

    def conv(name, a, padding):
        dimensions = ("NCHW", "OIHW", "NCHW")
        a = lax.conv_general_dilated(a, weights[f"{name}.weight"], (1, 1), padding, dimension_numbers=dimensions)
        return a + per_channel(weights[f"{name}.bias"])

    def batchnorm(name, a):
        deviation = jnp.sqrt(weights[f"{name}.var"] + weights["bn.eps"])
        centered = (a - per_channel(weights[f"{name}.mean"])) / per_channel(deviation)
        return centered * per_channel(weights[f"{name}.weight"]) + per_channel(weights[f"{name}.bias"])

    def dense(name, a):
        return a @ weights[f"{name}.weight"].T + weights[f"{name}.bias"][None, :]

    def average(a):
        return lax.reduce_window(a, 0.0, lax.add, (1, 1, 2, 2), (1, 1, 2, 2), "VALID") / 4.0

    a = jax.nn.relu(batchnorm("bn1", conv("conv1", x, "VALID")))
    a = jax.nn.relu(batchnorm("bn2", conv("conv2", a, "SAME")) + a)
    a = average(a).reshape(len(x), -1)
    return dense("dense2", jax.nn.relu(dense("dense1", a)))


def per_channel(vector):
    return vector[None, :, None, None]


def net(golden):
    named = ("conv", "bn", "dense")
    return Partial(logits_fn, {name: value for name, value in golden.items() if name.startswith(named)})


def ball_of(golden, region):
    norm = region.removesuffix("_box")
    low, high = (0.0, 1.0) if region.endswith("_box") else (-jnp.inf, jnp.inf)
    return balls.Ball(norm, golden[f"eps.{norm}"], low, high)


def bound(golden, ball, method, x):
    margins_fn, region = margins.of(net(golden)), ball.region(x)
    name, _, relu = method.partition(".")
    if name == "IBP":
        return bounds.ibp(margins_fn, region, golden["labels"])
    certify = {"CROWN-IBP": bounds.crown_ibp, "CROWN": bounds.crown}[name]
    lower = {"adaptive": bounds.relaxations.adaptive, "same-slope": bounds.relaxations.same_slope}[relu]
    return certify(margins_fn, region, golden["labels"], relu_lower=lower, intersect=False)


def assert_close(ours, reference):
    scale = max(1.0, float(jnp.abs(reference).max()))
    np.testing.assert_allclose(ours, reference, rtol=0.0, atol=TOLERANCE * scale)


def test_net_is_that_of_the_file(golden):
    assert_close(net(golden)(golden["x"]), golden["logits"])


def test_file_separates_the_cases(golden):
    values = [golden[f"{region}.{method}.lower"] for region in REGIONS for method in METHODS]
    for i, value in enumerate(values):
        assert all(jnp.abs(value - other).max() > 100 * TOLERANCE * jnp.abs(value).max() for other in values[:i])


# The ball is traced, so that both linf regions share one compilation.
@partial(jax.jit, static_argnames="method")
def bounds_and_gradients(golden, ball, method):
    interval, pull_back = jax.vjp(partial(bound, golden, ball, method), golden["x"])
    zeros, ones = jnp.zeros_like(interval.lower), jnp.ones_like(interval.lower)
    (lower_grad,) = pull_back(interval._replace(lower=ones, upper=zeros))
    (upper_grad,) = pull_back(interval._replace(lower=zeros, upper=ones))
    return {"lower": interval.lower, "upper": interval.upper, "lower_grad": lower_grad, "upper_grad": upper_grad}


@pytest.mark.parametrize("region", REGIONS)
@pytest.mark.parametrize("method", METHODS)
def test_bounds_and_gradients(golden, region, method):
    ours = bounds_and_gradients(golden, ball_of(golden, region), method)
    for part, value in ours.items():
        assert_close(value, golden[f"{region}.{method}.{part}"])
