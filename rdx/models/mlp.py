"""Fully connected networks."""

from flax import linen as nn

from rdx.models.normalise import normalise
from rdx.types import Array


class MLP(nn.Module):
    """Dense layers with ReLU after all but the last.

    Attributes:
        features: widths of the hidden layers.
        num_classes: number of logits.
        mean: subtracted from the input, one value or one per channel.
        std: divides the input, one value or one per channel.
    """

    features: tuple[int, ...]
    num_classes: int = 10
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Computes the logits `[B, K]` of inputs `[B, ...]`."""
        x = normalise(x, self.mean, self.std)
        x = x.reshape(x.shape[0], -1)
        for features in self.features:
            x = nn.relu(nn.Dense(features)(x))
        return nn.Dense(self.num_classes)(x)
