"""The functions that bounds have to cover: operations of jax.numpy, layers and nets in many settings, look-alikes."""

import dataclasses
from collections.abc import Callable
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from bounds_helpers import fill, weights
from jax import lax

VECTOR, IMAGE = (4,), (4, 4, 2)


@dataclasses.dataclass(frozen=True)
class Case:
    build: Callable  # -> fn(x [B, ...]) -> [B, ...]; called inside the test, so that a failure is that of one case
    shape: tuple[int, ...] = VECTOR
    is_affine: bool = False


def linen(module, shape, **kwargs):
    variables = fill(jax.eval_shape(partial(module.init, **kwargs), jax.random.key(0), jnp.zeros((1, *shape))))
    return partial(module.apply, variables, **kwargs)


def affine(build, shape=VECTOR):
    return Case(build, shape, is_affine=True)


def affine_fn(fn, shape=VECTOR):
    return affine(lambda: fn, shape)


def conv(shape=IMAGE, module=nn.Conv, **options):
    options = {"features": 2, "kernel_size": (3,) * (len(shape) - 1)} | options
    return affine(lambda: linen(module(**options), shape), shape)


def between(bend, width=5, out=None):
    """Puts a nonlinear function between two dense layers whose inputs take both signs; `out` values come out of it."""
    first, second = 1.5 * weights(4, width), weights(out or width, 3, seed=1)
    return Case(lambda: lambda x: bend((x - 0.5) @ first + weights(1, width, seed=2) * 0.2) @ second)


class BatchNormed(nn.Module):
    @nn.compact
    def __call__(self, x, *, train):
        x = nn.Conv(2, (3, 3), strides=2, use_bias=False)(x)
        return nn.BatchNorm(use_running_average=not train)(x)


class ConvNet(nn.Module):
    @nn.compact
    def __call__(self, x, *, train):
        x = nn.relu(BatchNormed()(x, train=train))
        x = nn.relu(x + nn.Conv(2, (3, 3))(x))
        with jax.numpy_dtype_promotion("standard"):
            x = nn.avg_pool(x, (2, 2), (2, 2))
        return nn.Dense(3)(x.reshape(x.shape[0], -1))


class ActivatedNet(nn.Module):
    activation: Callable

    @nn.compact
    def __call__(self, x):
        x = self.activation(nn.Dense(6)(4.0 * x - 2.0))
        return nn.Dense(3)(self.activation(nn.Dense(5)(x)))


def avg_pool(x):
    with jax.numpy_dtype_promotion("standard"):
        return nn.avg_pool(x, (2, 2), (1, 1), padding="SAME")


@jax.custom_jvp
def double(x):
    return 2.0 * x


@double.defjvp
def _wrong_derivative(primals, tangents):
    return 2.0 * primals[0], 7.0 * tangents[0]


@jax.custom_vjp
def triple(x):
    return 3.0 * x


triple.defvjp(lambda x: (3.0 * x, None), lambda _, g: (7.0 * g,))


def power_of_two():
    return lax.scan(lambda carry, _: (2.0 * carry, None), jnp.ones(()), None, length=3)[0]


@jax.vmap
def as_kernel(x):
    """Takes the input as the kernel of a convolution over a constant image."""
    image = weights(1, 6, 2, seed=3)
    kernel = x.reshape(2, 2, 1)
    return lax.conv_general_dilated(image, kernel, (1,), "VALID", dimension_numbers=("NXC", "XIO", "NXC")).ravel()


@jax.vmap
def batch_grouped(x):
    image = jnp.stack([x, 2.0 * x]).reshape(2, 4, 1)
    kernel = weights(3, 1, 4, seed=3)
    dimensions = ("NXC", "XIO", "NXC")
    y = lax.conv_general_dilated(image, kernel, (1,), "VALID", dimension_numbers=dimensions, batch_group_count=2)
    return y.ravel()


def channels_first(x):
    dimensions = ("NCHW", "OIHW", "NCHW")
    kernel = weights(3, 2, 2, 3, seed=4)
    return lax.conv_general_dilated(x, kernel, (2, 1), ((1, 0), (0, 2)), dimension_numbers=dimensions)


def attention(x):
    """Attends over two tokens of three features."""
    tokens = ((x - 0.5) @ weights(4, 6)).reshape(-1, 2, 3)
    scores = jnp.einsum("btd,bsd->bts", tokens, tokens @ weights(3, 3))
    return (jax.nn.softmax(scores, axis=-1) @ tokens).reshape(len(x), -1)


RECURRENT = jnp.stack([weights(4, 4, seed=seed) for seed in range(3)])


def cell(carry, kernel):
    return jnp.tanh(carry @ kernel), carry.sum(axis=1)


def recurrence(x):
    return lax.scan(cell, x - 0.5, RECURRENT)[0]


CASES = {
    # Layers.
    "conv_same": conv(),
    "conv_valid": conv(padding="VALID"),
    "conv_strided": conv(strides=2, kernel_size=(3, 2)),
    "conv_strided_valid": conv(strides=(2, 3), padding="VALID", kernel_size=(2, 1)),
    "conv_asymmetric": conv(padding=((0, 1), (2, 0)), strides=2),
    "conv_dilated": conv(kernel_dilation=2),
    "conv_grouped": conv(feature_group_count=2, features=4, strides=2),
    "conv_1d": conv((6, 2), strides=2),
    "conv_transpose": conv((3, 3, 2), nn.ConvTranspose, strides=(2, 2)),
    "conv_channels_first": affine_fn(channels_first, (2, 4, 4)),
    "conv_of_kernel": affine_fn(as_kernel),
    "conv_batch_groups": affine_fn(batch_grouped),
    "batchnorm": affine(lambda: linen(BatchNormed(), IMAGE, train=False), IMAGE),
    "residual": affine(lambda: (lambda f: lambda x: x + f(x))(linen(nn.Conv(2, (3, 3)), IMAGE)), IMAGE),
    "avg_pool": affine_fn(avg_pool, IMAGE),
    # Operations of jax.numpy.
    "mean_sum": affine_fn(lambda x: x.mean((1, 2)) - 0.3 * x.sum((1, 3))[:, :2], IMAGE),
    "reshape_transpose": affine_fn(lambda x: x.transpose(0, 3, 1, 2).reshape(len(x), 8, 4) @ weights(4, 1), IMAGE),
    "concatenate_pad": affine_fn(lambda x: jnp.pad(jnp.concatenate([x, -x], 1), ((0, 0), (1, 2)), constant_values=3.0)),
    "pad_reflect": affine_fn(lambda x: jnp.pad(x, ((0, 0), (2, 1)), mode="reflect")),
    "slice_stack": affine_fn(lambda x: jnp.stack([x[:, ::2], x[:, 2:], jnp.ones_like(x[:, :2])], axis=2)),
    "unstack_tile": affine_fn(lambda x: jnp.tile(jnp.unstack(x, axis=1)[1], (1, 2, 1))[:, :, 0], IMAGE),
    "split_cumsum": affine_fn(lambda x: jnp.cumsum(jnp.split(x, [1], axis=1)[1], axis=1)),
    "split_both": affine_fn(lambda x: (lambda a, b: a - 0.5 * b)(*jnp.split(x, 2, axis=1))),
    "flip_take": affine_fn(lambda x: jnp.flip(x, 1) + jnp.take(x, jnp.array([1, 1, 0, 3]), axis=1)),
    "roll_repeat": affine_fn(lambda x: jnp.repeat(jnp.roll(x, 1, axis=1), 2, axis=1)[:, 1:]),
    "index": affine_fn(lambda x: x[:, np.array([0, 2]), 1, 1] - x[:, 3, :, 0].mean(axis=1, keepdims=True), IMAGE),
    "dynamic_slice": affine_fn(lambda x: lax.dynamic_slice_in_dim(x, power_of_two().astype(int) - 7, 2, axis=1)),
    "where_constant": affine_fn(lambda x: jnp.where(jnp.arange(4)[None] % 2 == 0, -x, 0.25)),
    "triangle": affine_fn(lambda x: jnp.tril(x[..., 0]), IMAGE),
    "resize": affine_fn(lambda x: jax.image.resize(x, (len(x), 6, 2, 2), "bilinear"), IMAGE),
    "negate_subtract": affine_fn(lambda x: (1.0 - x) - (-x - weights(1, 4)) * 3.0),
    "divide": affine_fn(lambda x: x / jnp.array([[2.0, -4.0, 0.5, 1.0]]) - x / 3.0),
    "self_difference": affine_fn(lambda x: x - 0.5 * x),
    "multiply_both_sides": affine_fn(lambda x: weights(1, 4) * x * -2.0),
    "einsum": affine_fn(lambda x: jnp.einsum("bhwc,cd,hk->bkd", x, weights(2, 2), weights(4, 2)), IMAGE),
    "matmul_left": affine_fn(lambda x: weights(3, 4) @ x[..., 0], IMAGE),
    "matmul_right": affine_fn(lambda x: x @ weights(4, 3) @ weights(3, 2)),
    "set": affine_fn(lambda x: jnp.asarray(x).at[:, 1].set(0.5) @ weights(4, 2)),
    "set_to_perturbed": affine_fn(lambda x: jnp.ones_like(x).at[:, 1:3].set(2.0 * x[:, :2])),
    "add_at": affine_fn(lambda x: jnp.asarray(x).at[:, np.array([0, 0, 2])].add(-x[:, 1:])),
    "dynamic_update_slice": affine_fn(lambda x: lax.dynamic_update_slice(x, 3.0 * x[:, :2], (0, 1))),
    "clamp": between(lambda x: lax.clamp(-0.2, x, 0.3)),
    # Transformations of functions.
    "scan": affine_fn(lambda x: lax.scan(lambda carry, row: (carry * 2.0 + row, carry), x, jnp.ones((3, 1, 4)))[0]),
    "stop_gradient": affine_fn(lambda x: lax.stop_gradient(x) @ weights(4, 2) + x[:, :2]),
    "jit_nested": affine_fn(jax.jit(lambda x: jax.jit(jnp.matmul)(x, weights(4, 2)) + 1.0)),
    "remat": affine_fn(jax.checkpoint(lambda x: x @ weights(4, 2) + 1.0)),
    "custom_jvp": affine_fn(lambda x: double(x) + 1.0),
    "custom_vjp": affine_fn(lambda x: triple(x) + 1.0),
    "vmap_inside": affine_fn(jax.vmap(lambda x: weights(3, 4) @ x)),
    "scan_of_constants": affine_fn(lambda x: power_of_two() * x),
    # Piecewise linear.
    "relu6": between(lambda x: jax.nn.relu6(5.0 * x)),
    "leaky_relu": between(partial(nn.leaky_relu, negative_slope=0.2)),
    "leaky_relu_above_one": between(partial(nn.leaky_relu, negative_slope=1.5)),
    "abs": between(jnp.abs),
    "clip": between(lambda x: jnp.clip(x, -0.3, 0.2)),
    "hard_tanh": between(lambda x: jnp.clip(3.0 * x, -1.0, 1.0)),
    "hard_sigmoid": between(lambda x: nn.hard_sigmoid(8.0 * x)),
    "maximum": between(lambda x: jnp.maximum(x, jnp.flip(x, 1))),
    "minimum": between(lambda x: jnp.minimum(x, 0.2 - 2.0 * x)),
    "maximum_constant": between(lambda x: jnp.maximum(weights(1, 5, seed=5), x)),
    "minimum_zero": between(lambda x: jnp.minimum(x, 0.0)),
    "pairwise_max": between(lambda x: jnp.tile(jnp.maximum(x[:, ::2], x[:, 1::2]), (1, 2)), width=6),
    "where_slopes": between(lambda x: jnp.where(x > 0, 2.0 * x, -0.5 * x)),
    "where_below": between(lambda x: jnp.where(x <= 0.0, weights(1, 5, seed=6) * x, x)),
    "where_zero": between(lambda x: jnp.where(x > 0.0, x, 0.0)),
    "where_zeros_like": between(lambda x: jnp.where(x < jnp.zeros_like(x), 0.0, x * 2.0)),
    "median": between(lambda x: jnp.maximum(jnp.minimum(x, 0.3), jnp.minimum(jnp.maximum(x, 0.3), jnp.flip(x, 1)))),
    # S-shaped, and nets.
    "tanh": between(lambda x: jnp.tanh(4.0 * x)),
    "sigmoid": between(lambda x: jax.nn.sigmoid(6.0 * x)),
    "erf": between(lambda x: jax.scipy.special.erf(2.0 * x)),
    "arctan": between(lambda x: jnp.arctan(4.0 * x)),
    "arcsinh": between(lambda x: jnp.arcsinh(4.0 * x)),
    # Convex and concave.
    "exp": between(lambda x: jnp.exp(2.0 * x)),
    "expm1_exp2": between(lambda x: jnp.expm1(x) - jnp.exp2(x)),
    "log": between(lambda x: jnp.log(x + 3.0)),
    "log1p": between(lambda x: jnp.log1p(x + 2.0)),
    "sqrt": between(lambda x: jnp.sqrt(x + 3.0)),
    "rsqrt": between(lambda x: lax.rsqrt(x + 3.0)),
    "square": between(jnp.square),
    "fourth_power": between(lambda x: x**4),
    "cosh": between(jnp.cosh),
    "reciprocal": between(lambda x: 1.0 / (x + 3.0)),
    "reciprocal_below_zero": between(lambda x: 2.0 / (x - 4.0)),
    "inverse_square": between(lambda x: (x + 3.0) ** -2),
    # Any function of one value.
    "cube": between(lambda x: x**3),
    "power": between(lambda x: (x + 3.0) ** 1.5),
    "sin": between(lambda x: jnp.sin(3.0 * x)),
    "cos": between(lambda x: jnp.cos(3.0 * x)),
    "sinh": between(jnp.sinh),
    "tan": between(lambda x: jnp.tan(0.3 * x)),
    "erfc": between(jax.scipy.special.erfc),
    "product_with_sine": between(lambda x: x * jnp.sin(x)),
    "where_knot": between(lambda x: jnp.where(x > 0.3, 2.0 * x - 0.6, 0.0)),
    "where_jump": between(lambda x: jnp.where(x < 0.3, x, 0.0)),
    "gelu_exact": between(partial(jax.nn.gelu, approximate=False)),
    # Of several values.
    "product": between(lambda x: x * jnp.flip(x, 1)),
    "quotient": between(lambda x: x / (jnp.flip(x, 1) + 3.0)),
    "norm": Case(lambda: lambda x: jnp.sqrt(jnp.square(x + 1.0).sum(axis=1, keepdims=True))),
    "variance": between(lambda x: x.var(axis=1, keepdims=True), out=1),
    "amax": between(lambda x: x.max(axis=1, keepdims=True), out=1),
    "amin": between(lambda x: x.reshape(-1, 2, 3).min(axis=1), width=6, out=3),
    "max_pool": Case(lambda: lambda x: nn.max_pool(x @ weights(2, 2), (2, 2), (2, 2), "SAME"), IMAGE),
    # Some of the relus are dead, and no less than what the others may be.
    "max_of_relus": between(lambda x: nn.relu(x - jnp.array([[3.0, 0.0, 3.0, 0.3, 0.0]])).max(axis=1)[:, None], out=1),
    "softmax_of_many": between(jax.nn.softmax, width=12),
    "max_pool_1d": between(lambda x: nn.max_pool(x[..., None], (2,), (1,), "VALID")[..., 0], width=6, out=5),
    "bilinear_form": between(lambda x: jnp.einsum("bi,ij,bj->b", x, weights(5, 5), x)[:, None], out=1),
    "attention": Case(lambda: attention),
    "recurrence": Case(lambda: recurrence),
    "recurrence_outputs": Case(lambda: lambda x: lax.scan(cell, x - 0.5, RECURRENT, reverse=True)[1].T),
    "tanh_net": Case(lambda: linen(ActivatedNet(jnp.tanh), VECTOR)),
    "sigmoid_net": Case(lambda: linen(ActivatedNet(nn.sigmoid), VECTOR)),
    "relu_net": Case(lambda: linen(ActivatedNet(nn.relu), VECTOR)),
    "mixed_net": Case(lambda: linen(ActivatedNet(lambda x: jnp.tanh(x) - nn.relu(x)), VECTOR)),
    "conv_net": Case(lambda: linen(ConvNet(), IMAGE, train=False), IMAGE),
}


# What looks like a softmax or log-sum-exp and is none: sums along another axis, another shift, none at all.
def wrong_axis(x):
    exponentials = jnp.exp(x - x.max(axis=2, keepdims=True))
    return exponentials / exponentials.sum(axis=2)[:, None, :]


def wrong_shift(x):
    return jnp.log(jnp.exp(x - x.max(axis=1, keepdims=True)).sum(axis=1)) + jnp.maximum(x.max(axis=1), 0.9)


def not_shifted_back(x):
    return jnp.log(jnp.exp(x - x.max(axis=1, keepdims=True)).sum(axis=1, keepdims=True))


CASES |= {
    "softmax_along_the_wrong_axis": Case(lambda: wrong_axis, (2, 2)),
    "softmax_of_rows": Case(lambda: lambda x: jax.nn.softmax(4.0 * x, axis=1), (2, 2)),
    "softmax_of_all": Case(lambda: lambda x: jax.nn.softmax(4.0 * x, axis=(1, 2)), (2, 2)),
    "logsumexp_wrong_shift": Case(lambda: lambda x: wrong_shift(x)[:, None]),
    "logsumexp_not_shifted_back": Case(lambda: not_shifted_back),
    "logsumexp_of_rows": Case(lambda: lambda x: jax.nn.logsumexp(4.0 * x, axis=1), (2, 2)),
}
