"""Fast backward substitution equals the vector-Jacobian product that automatic differentiation makes."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from bounds_helpers import weights
from jax import lax

from rdx.bounds import tracing, transposition


@dataclasses.dataclass(frozen=True)
class Conv:
    space: tuple[int, ...]
    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    padding: str | tuple[tuple[int, int], ...] = "VALID"
    channels: tuple[int, int] = (2, 3)
    layout: tuple[str, str, str] | None = None
    groups: int = 1
    lhs_dilation: tuple[int, ...] | None = None
    rhs_dilation: tuple[int, ...] | None = None
    num: int = 1

    @property
    def names(self):
        return "DHW"[-len(self.space):]

    @property
    def dimensions(self):
        return self.layout or (f"N{self.names}C", f"{self.names}IO", f"N{self.names}C")

    def arrange(self, names, sizes):
        return tuple(sizes[name] for name in names)

    @property
    def shapes(self):
        into, out = self.channels
        image = dict(zip(self.names, self.space, strict=True)) | {"N": self.num, "C": into}
        kernel = dict(zip(self.names, self.kernel, strict=True)) | {"I": into // self.groups, "O": out}
        return self.arrange(self.dimensions[0], image), self.arrange(self.dimensions[1], kernel)

    def __call__(self, x, kernel):
        return lax.conv_general_dilated(
            x, kernel, self.strides, self.padding, self.lhs_dilation, self.rhs_dilation, self.dimensions, self.groups
        )


FIRST = ("NCHW", "OIHW", "NCHW")
CASES = {
    "plain": Conv((5, 4), (3, 3), (1, 1), "SAME"),
    "valid": Conv((5, 4), (3, 2), (1, 1)),
    "channels_first": Conv((5, 4), (3, 2), (1, 1), "SAME", layout=FIRST),
    "odd_layout": Conv((5, 4), (3, 2), (2, 1), "SAME", layout=("HNCW", "OHIW", "CWNH")),
    "odd_layout_unit_stride": Conv((5, 4), (3, 2), (1, 1), "SAME", layout=("HNCW", "OHIW", "CWNH")),
    "stride_2": Conv((6, 5), (3, 3), (2, 2), "SAME"),
    "stride_2_first": Conv((6, 5), (3, 3), (2, 2), "SAME", layout=FIRST),
    "stride_2_valid": Conv((6, 5), (3, 3), (2, 2)),
    "stride_3": Conv((7, 8), (3, 3), (3, 3), "SAME"),
    "stride_mixed": Conv((7, 8), (2, 3), (1, 3), "SAME"),
    "stride_divides": Conv((6, 6), (4, 4), (2, 2), ((1, 1), (1, 1))),
    "kernel_below_stride": Conv((7, 7), (1, 2), (3, 3)),
    "kernel_below_stride_same": Conv((7, 7), (1, 1), (2, 2), "SAME"),
    "kernel_far_above_stride": Conv((9, 5), (7, 5), (2, 2), "SAME"),
    "rest_unreached": Conv((8, 9), (2, 2), (3, 3), ((0, 0), (1, 0))),
    "asymmetric": Conv((6, 5), (3, 3), (2, 2), ((0, 3), (2, 1))),
    "asymmetric_unit_stride": Conv((6, 5), (3, 3), (1, 1), ((0, 3), (2, 1))),
    "negative": Conv((8, 8), (3, 2), (2, 2), ((-1, 0), (-2, -1))),
    "negative_unit_stride": Conv((8, 8), (3, 2), (1, 1), ((-1, 2), (0, -1))),
    "padding_above_kernel": Conv((4, 4), (2, 2), (2, 2), ((3, 4), (5, 2))),
    "dilated_kernel": Conv((7, 7), (2, 3), (1, 1), "SAME", rhs_dilation=(2, 2)),
    "dilated_kernel_stride": Conv((7, 7), (2, 3), (2, 2), ((1, 2), (0, 3)), rhs_dilation=(2, 1)),
    "dilated_input": Conv((3, 4), (3, 3), (1, 1), ((2, 1), (1, 2)), lhs_dilation=(2, 2)),
    "dilated_input_stride": Conv((3, 4), (3, 3), (2, 1), ((2, 1), (1, 2)), lhs_dilation=(3, 2)),
    "groups": Conv((5, 5), (3, 3), (1, 1), "SAME", channels=(4, 6), groups=2),
    "groups_stride": Conv((5, 5), (3, 3), (2, 2), "SAME", channels=(4, 6), groups=2),
    "depthwise": Conv((5, 5), (3, 3), (1, 1), "SAME", channels=(3, 3), groups=3),
    "line": Conv((9,), (3,), (1,), "SAME"),
    "line_stride": Conv((9,), (4,), (3,), ((2, 1),)),
    "volume": Conv((3, 4, 3), (2, 2, 2), (1, 1, 1), "SAME"),
    "volume_stride": Conv((4, 5, 3), (2, 3, 2), (2, 2, 1), "SAME"),
    "several_images": Conv((5, 4), (3, 3), (2, 1), "SAME", num=2),
    "several_images_unit_stride": Conv((5, 4), (3, 3), (1, 1), "SAME", num=2),
}


@dataclasses.dataclass(frozen=True)
class Product:
    """A product of an image-like array with a matrix, along any axis."""

    shapes: tuple[tuple[int, ...], tuple[int, int]]
    equation: str

    def __call__(self, x, kernel):
        return jnp.einsum(self.equation, x, kernel)


CASES |= {
    "dense": Product(((1, 5), (5, 3)), "bi,io->bo"),
    "dense_transposed": Product(((1, 5), (3, 5)), "bi,oi->bo"),
    "dense_last_of_many": Product(((1, 2, 3, 5), (5, 4)), "bxyi,io->bxyo"),
    "dense_middle_axis": Product(((1, 2, 5, 3), (5, 4)), "bxiy,io->bxyo"),
    "dense_first_axis": Product(((5, 2), (4, 5)), "ib,oi->bo"),
}


def ours(layer, rows, kernel, *, are_own):
    ops = tracing.trace(layer, jnp.zeros(layer.shapes[0]), kernel).ops
    (op,) = ops
    rows = transposition.transpose(op, rows, are_own=are_own)
    assert rows is not None
    return rows


def plain(layer, rows, kernel):
    _, transpose = jax.vjp(lambda x: layer(x, kernel), jnp.zeros(layer.shapes[0]))
    return jax.vmap(lambda row: transpose(row)[0])(rows)


def arrays(layer):
    """Draws two kernels, two times three rows and their images."""
    zeros = map(partial(jnp.zeros, dtype=jnp.float32), layer.shapes)
    shape = jax.eval_shape(layer, *zeros).shape
    return weights(2, *layer.shapes[1]), weights(2, 3, *shape, seed=1), weights(2, 3, *layer.shapes[0], seed=2)


def is_plain(layer):
    return isinstance(layer, Conv) and layer.groups == 1 and not (layer.lhs_dilation or layer.rhs_dilation)


@pytest.mark.parametrize(
    ("name", "by_taps"),
    [(name, choice) for name, layer in CASES.items() for choice in ((True, False) if is_plain(layer) else (None,))],
)
def test_transpose_is_the_vector_jacobian_product(name, by_taps, monkeypatch):
    layer = CASES[name]
    if by_taps is not None:
        monkeypatch.setattr(transposition, "_is_mostly_zeros", lambda *_: by_taps)

    def values_and_gradients(fn, axes, rows, kernels, cotangent):
        if axes is None:
            value, pull_back = jax.vjp(fn, rows[0], kernels[0])
            return value, *pull_back(cotangent[0])
        arguments = (a if axis == 0 else a[0] for a, axis in zip((rows, kernels), axes, strict=True))
        value, pull_back = jax.vjp(jax.vmap(fn, in_axes=axes), *arguments)
        return value, *pull_back(cotangent)

    @jax.jit
    def everything(*arguments):
        pairs = []
        for axes in (None, (0, None), (None, 0), (0, 0)):
            mine = partial(ours, layer, are_own=axes is not None)
            pairs.append([values_and_gradients(fn, axes, *arguments) for fn in (mine, partial(plain, layer))])
        return pairs

    kernels, rows, cotangent = arrays(layer)
    for mine, reference in everything(rows, kernels, cotangent):
        for value, expected in zip(mine, reference, strict=True):
            np.testing.assert_allclose(value, expected, rtol=0.0, atol=1e-5 * (1.0 + float(jnp.abs(expected).max())))


@pytest.mark.parametrize(("shape", "kernel", "stride", "by_taps"), [
    ((72, 16, 16, 128), (3, 3, 128, 128), 1, False),  # a whole image
    ((72, 16, 16, 128), (3, 3, 64, 128), 2, False),  # many zeros, but too much to add up out of the cache
    ((64, 3, 3, 128), (3, 3, 128, 128), 1, True),  # a window of few places
    ((64, 5, 5, 128), (3, 3, 64, 128), 2, True),  # and with stride
    ((64, 11, 11, 64), (3, 3, 64, 64), 1, False),  # a large window
    ((64, 4, 4, 32), (4, 4, 16, 32), 2, False),  # few products for each number to add up
    ((72, 32, 32, 64), (3, 3, 3, 64), 1, True),  # an image of few channels
    ((128, 32, 32, 64), (3, 3, 3, 64), 1, True),  # out of the cache, yet smaller than the rows
    ((128, 32, 32, 16), (5, 5, 3, 16), 1, False),  # and many times as large
    ((4096, 1, 1, 128), (3, 3, 128, 128), 1, True),  # single places: nothing is added up
])
def test_taps_are_added_up_where_that_is_fast(shape, kernel, stride, by_taps):
    rows, kernel = (jax.ShapeDtypeStruct(which, jnp.float32) for which in (shape, kernel))
    assert transposition._is_mostly_zeros(rows, kernel, (stride, stride)) == by_taps


@pytest.mark.parametrize("are_own", [False, True])
@pytest.mark.parametrize("name", ["stride_2", "plain", "groups_stride", "dense"])
def test_gradients_of_each_example(name, are_own):
    layer = CASES[name]
    kernels, rows, _ = arrays(layer)

    def gradients(fn):
        loss = lambda rows, kernel: jnp.square(jax.vmap(fn, in_axes=(0, None))(rows[None], kernel)).sum()
        return jax.jit(jax.vmap(jax.grad(loss, argnums=(0, 1)), in_axes=(0, None)))(rows, kernels[0])

    mine = gradients(partial(ours, layer, are_own=are_own))
    for value, expected in zip(mine, gradients(partial(plain, layer)), strict=True):
        np.testing.assert_allclose(value, expected, rtol=1e-4, atol=1e-4)


def test_everything_else_is_left_to_differentiation():
    dimensions = ("NXC", "XIO", "NXC")
    conv = partial(lax.conv_general_dilated, window_strides=(1,), padding="VALID", dimension_numbers=dimensions)
    image, kernel, matrices = jnp.zeros((2, 5, 1)), jnp.zeros((3, 1, 4)), jnp.zeros((2, 1, 4))
    cases = {
        "groups of the batch": (partial(conv, batch_group_count=2, rhs=kernel), image),
        "a kernel": (partial(conv, image), kernel),
        "matrices": (lambda x: lax.dot_general(x, matrices, (((2,), (1,)), ((0,), (0,)))), image),
        "a right factor": (lambda w: jnp.ones((2, 2)) @ w, jnp.ones((2, 3))),
        "a vector": (lambda x: x @ jnp.ones((3,)), jnp.ones((2, 3))),
        "a scale": (lambda x: 2.0 * x, image),
        "a sum": (lambda x: x.sum(), image),
    }
    for name, (fn, x) in cases.items():
        (op,) = [op for op in tracing.trace(fn, x).ops if op.name != "transpose"]
        rows = jnp.zeros((1, *op.outputs[0].shape))
        assert transposition.transpose(op, rows, are_own=False) is None, name


def test_double_contractions_are_left_to_differentiation():
    fn = lambda x: jnp.einsum("bij,ij->b", x, weights(2, 3))
    (op,) = [op for op in tracing.trace(fn, jnp.zeros((1, 2, 3))).ops if op.name == "dot_general"]
    assert transposition.transpose(op, jnp.zeros((1, *op.outputs[0].shape)), are_own=False) is None
