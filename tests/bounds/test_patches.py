"""Coefficients on windows, in chunks and for some elements only: the same bounds as with dense ones at once."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from bounds_helpers import fill, inputs
from jax import lax

from rdx import bounds
from rdx.balls import Ball
from rdx.bounds import chunks, patches

SHAPE = (9, 8, 2)


class Layers(nn.Module):
    """Two relu layers and a third one, of every kind of image operation in turn."""

    kind: str

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(3, (3, 3))(x))
        match self.kind:
            case "strides":
                x = nn.relu(nn.Conv(4, (3, 2), strides=(2, 1), padding=((1, 0), (2, 1)))(x))
                x = nn.Conv(3, (2, 2), strides=2, padding="VALID")(x)
            case "dilation":
                x = nn.relu(nn.Conv(4, (2, 2), kernel_dilation=2)(x))
            case "groups":
                x = nn.relu(nn.Conv(6, (3, 3), feature_group_count=3)(x))
            case "residual":
                x = nn.relu(nn.Conv(3, (3, 3))(nn.relu(nn.Conv(3, (1, 1))(x))) + x)
                x = nn.relu(nn.Conv(3, (3, 3))(x) - 2.0 * nn.Conv(3, (1, 5))(x))
            case "norm":
                x = nn.relu(nn.BatchNorm(use_running_average=True)(nn.Conv(4, (3, 3))(x)))
                x = nn.BatchNorm(use_running_average=True)(nn.Conv(4, (3, 3))(x)) / 3.0
            case "pool":
                x = nn.avg_pool(x, (3, 2), strides=(2, 1), padding="SAME")
                x = nn.relu(nn.avg_pool(nn.Conv(3, (2, 2))(x), (2, 2)))
            case "double":
                x = nn.relu(nn.Conv(3, (3, 3))(nn.Conv(4, (3, 3), padding=2)(x)))
            case "channels first":
                kernel = self.param("kernel", nn.initializers.normal(), (10, 3, 3, 2))
                x = nn.relu(lax.conv_general_dilated(jnp.moveaxis(x, -1, 1), kernel, (1, 1), "SAME"))
                x = jnp.moveaxis(x, 1, -1)
            case "rows":
                x = nn.relu(nn.Conv(4, (3,))(x.reshape(x.shape[0], -1, 6)))
        x = nn.relu(nn.Conv(2, (3,) * (x.ndim - 2))(x))
        return nn.Dense(2)(x.reshape(x.shape[0], -1))


KINDS = ("strides", "dilation", "groups", "residual", "norm", "pool", "double", "channels first", "rows")


def net(kind):
    module = Layers(kind)

    def apply(variables, x):
        with jax.numpy_dtype_promotion("standard"):  # average pooling divides by integers
            return module.apply(variables, x)

    with jax.numpy_dtype_promotion("standard"):
        variables = fill(jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, *SHAPE))))
    return partial(apply, variables)


def study(fn, ball, **options):
    """Computes bounds and the gradients of their sums."""

    def total(x):
        interval = bounds.crown(fn, ball.region(x), **options)
        return interval.lower.sum() - 2.0 * interval.upper.sum(), interval

    (_, interval), gradient = jax.jit(jax.value_and_grad(total, has_aux=True))(inputs(SHAPE))
    return {"lower": interval.lower, "upper": interval.upper, "gradient": gradient}


def assert_equal(found, expected):
    for name, value in expected.items():
        scale = float(jnp.abs(value).max())
        np.testing.assert_allclose(found[name], value, rtol=0.0, atol=1e-5 * scale, err_msg=name)


@pytest.mark.parametrize("kind", KINDS)
def test_windows_are_dense_rows(kind, monkeypatch):
    fn, ball = net(kind), Ball("linf", 0.05)
    met = []
    through = patches.transpose
    monkeypatch.setattr(patches, "transpose", lambda *a, **k: met.append(through(*a, **k)) or met[-1])
    local = study(fn, ball)
    assert any(rows and rows[0].window is not None and np.prod(rows[0].values.shape[1:]) > 20 for rows in met)
    monkeypatch.setattr(patches, "image_axes", lambda graph, node: None)
    assert_equal(local, study(fn, ball))


@pytest.mark.parametrize("norm", ["l2", "l1"])
def test_balls_on_windows(norm, monkeypatch):
    fn, ball = net("strides"), Ball(norm, 0.3)
    local = study(fn, ball)
    monkeypatch.setattr(patches, "image_axes", lambda graph, node: None)
    assert_equal(local, study(fn, ball))


@pytest.mark.parametrize("kind", ["strides", "channels first", "rows"])
@pytest.mark.parametrize("intersect", [False, True])
def test_chunks_change_nothing(kind, intersect, monkeypatch):
    fn, ball = net(kind), Ball("linf", 0.05)
    whole = study(fn, ball, intersect=intersect, max_bytes=np.inf)
    counts = []
    size = chunks._chunk_size
    monkeypatch.setattr(chunks, "_chunk_size", lambda *args: counts.append(size(*args)) or counts[-1])
    assert_equal(study(fn, ball, intersect=intersect, max_bytes=2e5), whole)
    assert min(counts) < 20


def test_elements_that_are_needed_come_first_and_together():
    # 6 places of 8 elements in groups of 4.
    elements = np.random.default_rng(0).permutation(48).reshape(6, 8)
    is_needed = np.zeros(48, bool)
    is_needed[elements[[0, 2, 2, 2, 4, 4, 4, 4, 4], [7, 1, 3, 6, 0, 2, 4, 5, 7]]] = True
    groups = np.asarray(chunks._needed_first(elements, jnp.asarray(is_needed), 4))
    assert sorted(groups.ravel()) == list(range(48))
    assert is_needed[groups].sum(axis=1).tolist() == [1, 3, 4, 1, *[0] * 8]
    places = np.argsort(elements.ravel()) // 8
    assert (places[groups] == places[groups[:, :1]]).all()
