"""Every layer of flax.linen and flax.nnx and every function of jax.nn by its public name, and what is left out."""

import inspect
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from bounds_helpers import fill, weights
from coverage_cases import IMAGE, VECTOR, Case, between, linen
from flax import nnx

SEQUENCE, ROWS = (2, 2), (4, 2)


def of_linen(module, shape=VECTOR, **options):
    return Case(lambda: linen(module(), shape, **options), shape)


def linear_linen(module, shape=VECTOR, **options):
    return Case(lambda: linen(module(), shape, **options), shape, is_affine=True)


def of_nnx(module, shape=VECTOR, *, is_affine=False, call=lambda layer, x: layer(x)):
    def build():
        definition, state = nnx.split(module(rngs=nnx.Rngs(0)))
        state = fill(state)
        # Copied at every call: some layers write into themselves, which they may only in the trace that made them.
        return lambda x: call(nnx.merge(definition, state, copy=True), x)

    return Case(build, shape, is_affine=is_affine)


linear_nnx = partial(of_nnx, is_affine=True)


def attend_linen():
    embed = nn.Embed(3, 4)
    variables = fill(jax.eval_shape(embed.init, jax.random.key(0), jnp.zeros((1,), int)))
    return partial(embed.apply, variables, method="attend")


def both_ways(library, cell):
    return library.Bidirectional(library.RNN(cell()), library.RNN(cell()))


class NnxNet(nnx.Module):
    def __init__(self, rngs):
        self.first, self.second = nnx.Linear(4, 5, rngs=rngs), nnx.Linear(5, 3, rngs=rngs)

    def __call__(self, x):
        return self.second(nnx.relu(self.first(x)))


class NnxAffine(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(2, 3, (2, 2), strides=2, rngs=rngs)
        self.norm = nnx.BatchNorm(3, use_running_average=True, rngs=rngs)

    def __call__(self, x):
        return self.norm(self.conv(x))


class CausalAttention(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.SelfAttention(num_heads=1)(x, mask=nn.make_causal_mask(x[..., 0]))


LINEN = {
    "BatchNorm": linear_linen(lambda: nn.BatchNorm(use_running_average=True), IMAGE),
    "Bidirectional": of_linen(lambda: both_ways(nn, lambda: nn.SimpleCell(1)), SEQUENCE),
    "Conv": linear_linen(lambda: nn.Conv(2, (3, 3), strides=2), IMAGE),
    "ConvLSTMCell": of_linen(lambda: nn.RNN(nn.ConvLSTMCell(1, (2,))), (2, 2, 1)),
    "ConvLocal": linear_linen(lambda: nn.ConvLocal(2, (3,)), ROWS),
    "ConvTranspose": linear_linen(lambda: nn.ConvTranspose(2, (3,), strides=(2,), kernel_dilation=(2,)), ROWS),
    "Dense": linear_linen(lambda: nn.Dense(3)),
    "DenseGeneral": linear_linen(lambda: nn.DenseGeneral((2, 3), axis=(-2, -1)), ROWS),
    "Dropout": linear_linen(lambda: nn.Dropout(0.5, deterministic=True)),
    "Einsum": linear_linen(lambda: nn.Einsum((2, 3), "btd,df->btf"), ROWS),
    "Embed": Case(attend_linen, is_affine=True),
    "GroupNorm": of_linen(lambda: nn.GroupNorm(num_groups=2, epsilon=0.1), (3, 4)),
    "InstanceNorm": of_linen(lambda: nn.InstanceNorm(epsilon=0.1), ROWS),
    "LayerNorm": of_linen(lambda: nn.LayerNorm(epsilon=0.1)),
    "MultiHeadAttention": of_linen(lambda: nn.MultiHeadAttention(num_heads=2), SEQUENCE),
    "MultiHeadDotProductAttention": of_linen(lambda: nn.MultiHeadDotProductAttention(num_heads=1), SEQUENCE),
    "PReLU": between(lambda x: linen(nn.PReLU(), (5,))(x)),
    "RMSNorm": of_linen(lambda: nn.RMSNorm(epsilon=0.1)),
    "RNN": of_linen(lambda: nn.RNN(nn.SimpleCell(2), reverse=True, keep_order=True), SEQUENCE),
    "SelfAttention": of_linen(CausalAttention, SEQUENCE),
    "Sequential": of_linen(lambda: nn.Sequential([nn.Dense(3), nn.relu, nn.Dense(2)])),
    "SpectralNorm": linear_linen(lambda: nn.SpectralNorm(nn.Dense(3)), update_stats=False),
    "WeightNorm": linear_linen(lambda: nn.WeightNorm(nn.Dense(3))),
    **{name: of_linen(lambda name=name: nn.RNN(getattr(nn, name)(1)), SEQUENCE) for name in (
        "GRUCell", "LSTMCell", "MGUCell", "OptimizedLSTMCell", "SimpleCell",
    )},
}
NNX = {
    "BatchNorm": linear_nnx(partial(nnx.BatchNorm, 2, use_running_average=True), IMAGE),
    "Bidirectional": of_nnx(
        lambda rngs: nnx.Bidirectional(*(nnx.RNN(nnx.SimpleCell(2, 1, rngs=rngs)) for _ in range(2))), SEQUENCE,
    ),
    "Conv": linear_nnx(NnxAffine, IMAGE),
    "ConvTranspose": linear_nnx(partial(nnx.ConvTranspose, 2, 3, (3,), strides=2), ROWS),
    "Dropout": linear_nnx(partial(nnx.Dropout, 0.5, deterministic=True)),
    "Einsum": linear_nnx(partial(nnx.Einsum, "btd,df->btf", (2, 3), (3,)), ROWS),
    "Embed": linear_nnx(partial(nnx.Embed, 3, 4), call=lambda layer, x: layer.attend(x)),
    "GroupNorm": of_nnx(partial(nnx.GroupNorm, 4, 2, epsilon=0.1), (3, 4)),
    "InstanceNorm": of_nnx(partial(nnx.InstanceNorm, 2, epsilon=0.1), ROWS),
    "LayerNorm": of_nnx(partial(nnx.LayerNorm, 4, epsilon=0.1)),
    "Linear": of_nnx(NnxNet),
    "LinearGeneral": linear_nnx(partial(nnx.LinearGeneral, (4, 2), (2,), axis=(-2, -1)), ROWS),
    "LoRA": linear_nnx(partial(nnx.LoRA, 4, 2, 3)),
    "LoRALinear": linear_nnx(partial(nnx.LoRALinear, 4, 3, lora_rank=2)),
    "MultiHeadAttention": of_nnx(
        partial(nnx.MultiHeadAttention, 1, 2, 2, decode=False), SEQUENCE, call=lambda layer, x: layer(0.5 * x),
    ),
    "PReLU": of_nnx(lambda rngs: nnx.Sequential(nnx.Linear(4, 3, rngs=rngs), nnx.PReLU())),
    "RMSNorm": of_nnx(partial(nnx.RMSNorm, 4, epsilon=0.1)),
    "RNN": of_nnx(lambda rngs: nnx.RNN(nnx.SimpleCell(2, 2, rngs=rngs), reverse=True, keep_order=True), SEQUENCE),
    "Sequential": of_nnx(lambda rngs: nnx.Sequential(nnx.Linear(4, 3, rngs=rngs), nnx.relu)),
    "SpectralNorm": linear_nnx(
        lambda rngs: nnx.SpectralNorm(nnx.Linear(4, 3, rngs=rngs), rngs=rngs),
        call=lambda layer, x: layer(x, update_stats=False),
    ),
    "WeightNorm": linear_nnx(lambda rngs: nnx.WeightNorm(nnx.Linear(4, 3, rngs=rngs), rngs=rngs)),
    **{name: of_nnx(lambda rngs, name=name: nnx.RNN(getattr(nnx, name)(2, 1, rngs=rngs)), SEQUENCE) for name in (
        "GRUCell", "LSTMCell", "OptimizedLSTMCell", "SimpleCell",
    )},
}
if hasattr(nnx, "RoPE"):  # flax 0.12.12
    NNX["RoPE"] = linear_nnx(lambda rngs: nnx.RoPE(), ROWS)


def attention_of_jax(x, **options):
    query, key = x[:, :, None, :], (x @ weights(2, 2))[:, :, None, :]
    return jax.nn.dot_product_attention(query, key, query, **options)


def masked_attention(x, fill_value):
    scores = jnp.einsum("btd,bsd->bts", x, x @ weights(2, 2))
    mask = np.array([[[True, False, False], [True, True, False], [False, True, True]]])
    return jax.nn.softmax(jnp.where(mask, scores, fill_value), axis=-1) @ x


JAX_NN = {
    **{name: between(getattr(jax.nn, name)) for name in (
        "celu", "elu", "gelu", "hard_sigmoid", "hard_silu", "hard_tanh", "identity", "leaky_relu", "log_sigmoid",
        "log_softmax", "mish", "relu", "relu6", "selu", "sigmoid", "silu", "soft_sign", "softmax", "softplus",
        "sparse_plus", "sparse_sigmoid", "squareplus", "tanh",
    )},
    "dot_product_attention": Case(lambda: attention_of_jax, SEQUENCE),
    "glu": between(jax.nn.glu, width=6, out=3),
    "log1mexp": between(lambda x: jax.nn.log1mexp(x + 2.0)),
    "logmeanexp": between(lambda x: jax.nn.logmeanexp(x, axis=1, keepdims=True), out=1),
    "logsumexp": between(lambda x: jax.nn.logsumexp(x.reshape(-1, 2, 3), axis=2), width=6, out=2),
    "standardize": between(lambda x: jax.nn.standardize(x, epsilon=0.1)),
}
TABLES = {"linen": (nn, LINEN), "nnx": (nnx, NNX), "jax.nn": (jax.nn, JAX_NN)}
CASES = {f"{library}.{name}": case for library, (_, table) in TABLES.items() for name, case in table.items()} | {
    "causal_attention": Case(lambda: partial(attention_of_jax, is_causal=True), SEQUENCE),
    **{f"masked_attention {value}": Case(lambda value=value: partial(masked_attention, fill_value=value), (3, 2))
       for value in (-1e9, -np.inf, float(jnp.finfo(jnp.float32).min))},
    "min_pool": Case(lambda: lambda x: nnx.min_pool(x, (2, 2)), IMAGE),
    "max_of_some": Case(lambda: lambda x: jnp.max(x, axis=1, initial=-1.0, where=np.arange(4)[None] != 1)),
    "arccosh": between(lambda x: jnp.arccosh(x + 3.0)),
    "power_two": between(lambda x: x**2.0),
    "power_half": between(lambda x: (x + 3.0) ** 0.5),
}

_EIGHT_BITS = "computes in 8 bits, whose rounding no bound covers"
_SCALED_BITS = "multiplies blocks of narrow numbers with scales, by a kernel of its own"
EXCLUDED = {
    "linen.Fp8DirectDotGeneralOp": _EIGHT_BITS, "linen.Fp8DotGeneral": _EIGHT_BITS,
    "linen.Fp8DotGeneralOp": _EIGHT_BITS, "linen.Fp8Einsum": _EIGHT_BITS, "linen.NANOOFp8DotGeneralOp": _EIGHT_BITS,
    "linen.Module": "the base class", "nnx.Module": "the base class",
    "linen.RNNCellBase": "the base class of cells", "nnx.RNNCellBase": "the base class of cells",
    "nnx.Dict": "a container, computes nothing", "nnx.List": "a container, computes nothing",
    "jax.nn.get_scaled_dot_general_config": "returns settings", "jax.nn.one_hot": "a function of integers",
    "jax.nn.scaled_dot_general": _SCALED_BITS, "jax.nn.scaled_matmul": _SCALED_BITS,
}


def public(library):
    """Lists the layers of a library of flax, or the functions of jax.nn: public name -> object."""
    members = {name: value for name, value in vars(library).items() if not name.startswith("_")}
    if library is jax.nn:
        return {name: value for name, value in members.items() if callable(value)}
    is_layer = lambda value: inspect.isclass(value) and issubclass(value, library.Module)
    return {name: value for name, value in members.items() if is_layer(value)}
