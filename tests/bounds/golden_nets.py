"""The nets of scripts/make_golden_bounds.py in plain JAX; `w` are the arrays of their files."""

import jax
import jax.numpy as jnp
from jax import lax


def dense(w, name, x):
    return x @ w[f"{name}.weight"].T + w[f"{name}.bias"][(None,) * (x.ndim - 1)]


def conv(w, name, x, *, stride=1, padding=0):
    pads = [(padding, padding)] * 2
    x = lax.conv_general_dilated(
        x, w[f"{name}.weight"], (stride, stride), pads, dimension_numbers=("NCHW", "OIHW", "NCHW")
    )
    return x + per_channel(w[f"{name}.bias"])


def batchnorm(w, name, x):
    deviation = jnp.sqrt(w[f"{name}.var"] + 1e-5)
    centered = (x - per_channel(w[f"{name}.mean"])) / per_channel(deviation)
    return centered * per_channel(w[f"{name}.weight"]) + per_channel(w[f"{name}.bias"])


def per_channel(vector):
    return vector[None, :, None, None]


def windows(x, initial, reduce):
    return lax.reduce_window(x, initial, reduce, (1, 1, 2, 2), (1, 1, 2, 2), "VALID")


def flatten(x):
    return x.reshape(len(x), -1)


def mlp(w, x):
    x = jax.nn.relu(dense(w, "dense1", x))
    x = jax.nn.relu(dense(w, "dense2", x))
    return dense(w, "dense3", x)


def convolutional(w, x):
    x = jax.nn.relu(conv(w, "conv1", x))
    x = jax.nn.relu(conv(w, "conv2", x, stride=2, padding=1))
    return dense(w, "dense1", flatten(x))


def residual(w, x):
    a = jax.nn.relu(batchnorm(w, "bn1", conv(w, "conv1", x)))
    a = jax.nn.relu(batchnorm(w, "bn2", conv(w, "conv2", a, padding=1)) + a)
    a = flatten(windows(a, 0.0, lax.add) / 4.0)
    return dense(w, "dense2", jax.nn.relu(dense(w, "dense1", a)))


def pooling(w, x):
    x = windows(jax.nn.relu(conv(w, "conv1", x)), -jnp.inf, lax.max)
    x = jax.nn.relu(conv(w, "conv2", x))
    return dense(w, "dense1", flatten(x))


def smooth(w, x):
    x = jnp.tanh(dense(w, "dense1", x))
    x = jax.nn.sigmoid(dense(w, "dense2", x))
    return dense(w, "dense3", x)


def attention(w, x):
    x = dense(w, "embed", x)
    query, key, value = (dense(w, name, x) for name in ("query", "key", "value"))
    shares = jax.nn.softmax(query @ key.swapaxes(1, 2) / 2.0, axis=-1)
    x = jax.nn.relu(dense(w, "dense1", x + shares @ value))
    return dense(w, "dense2", flatten(x))


NETS = {
    "mlp": mlp, "conv": convolutional, "residual": residual, "pooling": pooling, "smooth": smooth,
    "attention": attention,
}
