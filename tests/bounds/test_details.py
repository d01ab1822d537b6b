"""Names, bounds of hidden layers, planes, and the layer where bounds blow up."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from bounds_helpers import EPS, fill, inputs, logits_fn, weights

from rdx import bounds
from rdx.balls import Ball

X = inputs((4,), num=3)


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(6)(x))
        x = nn.relu(nn.Dense(5)(x))
        return nn.Dense(2)(jnp.tanh(x * nn.Dense(5)(x)))


def net():
    variables = fill(jax.eval_shape(Net().init, jax.random.key(0), X))
    return lambda x: Net().apply(variables, x), variables["params"]


@pytest.mark.parametrize("method", [bounds.ibp, bounds.crown_ibp, bounds.crown, bounds.alpha_crown])
def test_layers_have_names_and_their_bounds_hold(method):
    fn, params = net()
    region = Ball("linf", 0.1).region(X)
    found = bounds.details(method, fn, region, **({"hidden_steps": 2} if method is bounds.alpha_crown else {}))
    assert list(found.layers) == [
        "Net/Dense_0 -> relu", "Net/Dense_1 -> relu", "Net -> mul[0]", "Net/Dense_3 -> mul[1]", "Net -> tanh",
    ]
    if method is not bounds.alpha_crown:
        for ours, theirs in zip(found.output, method(fn, region), strict=True):
            np.testing.assert_allclose(ours, theirs, atol=1e-5)
    first = X @ params["Dense_0"]["kernel"] + params["Dense_0"]["bias"][None]
    lower, upper = found.layers["Net/Dense_0 -> relu"]
    spread = (region.upper - region.lower) @ jnp.abs(params["Dense_0"]["kernel"])
    np.testing.assert_allclose(upper - lower, spread, rtol=1e-4, atol=1e-6)
    assert ((lower <= first + 1e-6) & (first <= upper + 1e-6)).all()


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_planes_enclose_and_their_extremes_are_the_bounds(norm, key):
    fn, ball = logits_fn(), Ball(norm, EPS[norm])
    region = ball.region(X)
    output, _, planes = bounds.details(bounds.crown_ibp, fn, region, intersect=False)
    points = jax.vmap(lambda key: ball.sample(jax.random.split(key, len(X)), X))(jax.random.split(key, 200))
    values = jax.vmap(fn)(points)
    for plane, bias, sign in ((planes.lower, planes.lower_bias, 1.0), (planes.upper, planes.upper_bias, -1.0)):
        assert plane[0].shape == (3, 3, 4)
        at_points = jnp.einsum("bkd,nbd->nbk", plane[0], points) + bias[None]
        assert (sign * (values - at_points) >= -1e-5).all()
    if norm == "linf":
        middle, radius = (region.upper + region.lower) / 2, (region.upper - region.lower) / 2
        extreme = jnp.einsum("bkd,bd->bk", planes.lower[0], middle) - jnp.einsum(
            "bkd,bd->bk", jnp.abs(planes.lower[0]), radius
        )
        np.testing.assert_allclose(extreme + planes.lower_bias, output.lower, atol=1e-5)


def test_planes_of_several_inputs():
    first, second = weights(4, 5), weights(4, 5, seed=1)
    fn = lambda x: jax.nn.relu(x["a"] @ first - x["b"] @ second) @ weights(5, 2)
    region = {name: Ball("linf", 0.1).region(X) for name in "ab"}
    planes = bounds.details(bounds.crown, fn, region).planes
    assert [a.shape for a in planes.lower] == [(3, 2, 4), (3, 2, 4)]
    at_center = sum(jnp.einsum("bkd,bd->bk", a, X) for a in planes.lower) + planes.lower_bias
    assert (at_center <= fn({"a": X, "b": X}) + 1e-5).all()


def test_methods_without_lines_have_no_planes():
    assert bounds.details(bounds.ibp, logits_fn(), Ball("linf", 0.1).region(X)).planes is None


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_explain_finds_the_layer_that_blows_up(norm, key):
    def fn(x):
        x = jnp.tanh(x @ weights(4, 6))
        # Cancels, which intervals do not see.
        x = jnp.sin(x @ weights(6, 6, seed=1) - 0.999 * (x @ weights(6, 6, seed=1)))
        return jnp.tanh(x) @ weights(6, 2, seed=2)

    region = Ball(norm, jnp.array([[0.1, 0.1, 0.1, 0.0]])).region(X)
    layers = bounds.explain(key, bounds.ibp, fn, region)
    assert [layer.name.split(" -> ")[1] for layer in layers] == ["tanh", "sin", "tanh"]
    assert all("test_details.py" in layer.name for layer in layers)
    assert 1.0 - 1e-5 <= layers[0].excess < 1.6
    assert max(layers, key=lambda layer: layer.growth).name == layers[1].name
    assert layers[1].growth > 100.0


def test_nothing_is_left_behind():
    fn, region = logits_fn(), Ball("linf", 0.1).region(X)
    with pytest.raises(TypeError):
        bounds.details(bounds.ibp, fn, region, unknown=1)
    before = bounds.crown(fn, region)
    bounds.details(bounds.crown, fn, region)
    for ours, theirs in zip(before, bounds.crown(fn, region), strict=True):
        np.testing.assert_array_equal(ours, theirs)
