"""The nets of scripts/make_golden_bounds.py: their arrays, and what they compute, in torch.

Images are NCHW, tokens [B, 4, 4]; every net has 5 classes. `w` are the arrays of the file, by name.
"""

# ruff: noqa: TID251
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

NUM_IMAGES, NUM_CLASSES = 4, 5
BATCHNORM_EPS = 1e-5


class Net(NamedTuple):
    """A small net.

    Attributes:
        function: `(w, x) -> logits` in torch.
        input_shape: of one example.
        layers: name -> shape of the weight, in the order in which they are drawn; names that begin with "bn" are
            BatchNorms, given by their channels.
        eps: radius of the balls, by norm.
        relus: choices of the lower slope of unstable relus for CROWN.
    """

    function: Callable[[dict[str, Any], Any], Any]
    input_shape: tuple[int, ...]
    layers: dict[str, tuple[int, ...]]
    eps: Mapping[str, float] = MappingProxyType({"linf": 0.04, "l2": 0.25})
    relus: tuple[str, ...] = ("adaptive",)


def dense(w, name, x):
    from torch.nn import functional

    return functional.linear(x, w[f"{name}.weight"], w[f"{name}.bias"])


def conv(w, name, x, *, stride=1, padding=0):
    from torch.nn import functional

    return functional.conv2d(x, w[f"{name}.weight"], w[f"{name}.bias"], stride, padding)


def batchnorm(w, name, x):
    from torch.nn import functional

    parameters = (w[f"{name}.{kind}"] for kind in ("mean", "var", "weight", "bias"))
    return functional.batch_norm(x, *parameters, eps=BATCHNORM_EPS)


def average_pool(x, channels):
    """Averages 2 x 2 pixels by a convolution: auto_LiRPA's forward bounds know no average pooling."""
    import torch

    kernel = torch.eye(channels)[:, :, None, None].expand(channels, channels, 2, 2) / 4.0
    return torch.nn.functional.conv2d(x, kernel, stride=2)


def mlp(w, x):
    x = dense(w, "dense1", x).relu()
    x = dense(w, "dense2", x).relu()
    return dense(w, "dense3", x)


def convolutional(w, x):
    x = conv(w, "conv1", x).relu()
    x = conv(w, "conv2", x, stride=2, padding=1).relu()
    return dense(w, "dense1", x.flatten(1))


def residual(w, x):
    a = batchnorm(w, "bn1", conv(w, "conv1", x)).relu()
    a = (batchnorm(w, "bn2", conv(w, "conv2", a, padding=1)) + a).relu()
    a = dense(w, "dense1", average_pool(a, 4).flatten(1)).relu()
    return dense(w, "dense2", a)


def pooling(w, x):
    from torch.nn import functional

    x = functional.max_pool2d(conv(w, "conv1", x).relu(), 2)
    x = conv(w, "conv2", x).relu()
    return dense(w, "dense1", x.flatten(1))


def smooth(w, x):
    x = dense(w, "dense1", x).tanh()
    x = dense(w, "dense2", x).sigmoid()
    return dense(w, "dense3", x)


def attention(w, x):
    import torch

    x = dense(w, "embed", x)
    query, key, value = (dense(w, name, x) for name in ("query", "key", "value"))
    shares = torch.softmax(query @ key.transpose(1, 2) / 2.0, dim=-1)
    x = dense(w, "dense1", x + shares @ value).relu()
    return dense(w, "dense2", x.flatten(1))


NETS = {
    "mlp": Net(mlp, (12,), {"dense1": (16, 12), "dense2": (12, 16), "dense3": (5, 12)}),
    "conv": Net(convolutional, (1, 8, 8), {"conv1": (4, 1, 3, 3), "conv2": (4, 4, 3, 3), "dense1": (5, 36)}),
    "residual": Net(
        residual, (1, 8, 8),
        {"conv1": (4, 1, 3, 3), "bn1": (4,), "conv2": (4, 4, 3, 3), "bn2": (4,), "dense1": (12, 36), "dense2": (5, 12)},
        relus=("adaptive", "same-slope"),
    ),
    "pooling": Net(pooling, (1, 8, 8), {"conv1": (4, 1, 3, 3), "conv2": (6, 4, 2, 2), "dense1": (5, 24)}),
    "smooth": Net(smooth, (12,), {"dense1": (16, 12), "dense2": (12, 16), "dense3": (5, 12)}),
    "attention": Net(
        attention, (4, 4),
        {"embed": (4, 4), "query": (4, 4), "key": (4, 4), "value": (4, 4), "dense1": (6, 4), "dense2": (5, 24)},
        eps={"linf": 0.02, "l2": 0.1},
    ),
}


def draw_arrays(net, seed=0):
    """Draws weights and inputs as float32; scales of BatchNorm have both signs."""
    rng = np.random.default_rng(seed)

    def layer(name, shape):
        return {
            f"{name}.weight": rng.normal(size=shape) * np.sqrt(2.0 / np.prod(shape[1:])),
            f"{name}.bias": rng.normal(size=shape[0]) * 0.1,
        }

    def batchnorm(name, channels):
        return {
            f"{name}.weight": rng.uniform(0.6, 1.4, channels) * np.where(np.arange(channels) == 1, -1, 1),
            f"{name}.bias": rng.normal(size=channels) * 0.2,
            f"{name}.mean": rng.normal(size=channels) * 0.3,
            f"{name}.var": rng.uniform(0.5, 1.5, channels),
        }

    arrays = {}
    for name, shape in net.layers.items():
        arrays.update(batchnorm(name, *shape) if name.startswith("bn") else layer(name, shape))
    arrays["x"] = rng.uniform(size=(NUM_IMAGES, *net.input_shape))
    return {name: value.astype(np.float32) for name, value in arrays.items()}


def build(net, arrays):
    """Builds the net as a module of torch, in float64."""
    import torch

    class Module(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.names = [name for name in arrays if "." in name]
            for name in self.names:
                value = torch.tensor(arrays[name].astype(np.float64))
                # auto_LiRPA's BatchNorm wants parameters to be parameters, and statistics buffers.
                if name.endswith(("mean", "var")):
                    self.register_buffer(name.replace(".", "_"), value)
                else:
                    self.register_parameter(name.replace(".", "_"), torch.nn.Parameter(value))

        def forward(self, x):
            return net.function({name: getattr(self, name.replace(".", "_")) for name in self.names}, x)

    return Module().eval()
