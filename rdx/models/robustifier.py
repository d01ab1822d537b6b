"""The networks that A5 puts in front of a classifier."""

from flax import linen as nn

from rdx.models.cnn import Conv
from rdx.models.normalise import normalise
from rdx.types import Array


class Robustifier(nn.Module):
    """Convolutions that keep the image's shape, with ReLU after all but the last.

    The output `z` parametrises the defensive perturbation, such as `eps (2 sigmoid(z) - 1)`; it is unbounded.
    Source: Frosio & Kautz (2023, A5, Sec. 3); the layers are those of their released code.

    Attributes:
        convs: the convolutions, with stride 1; the last one has the image's channels.
        mean: subtracted from the image, one value or one per channel.
        std: divides the image, one value or one per channel.
    """

    convs: tuple[Conv, ...]
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Computes `z`, of the shape of the images `[B, H, W, C]`.

        Raises:
            ValueError: where the convolutions do not lead back to the image's shape.
        """
        image = x
        x = normalise(x, self.mean, self.std)
        for index, conv in enumerate(self.convs):
            x = nn.Conv(conv.channels, (conv.kernel,) * 2, strides=conv.stride)(x if index == 0 else nn.relu(x))
        if x.shape != image.shape:
            raise ValueError(
                f"The robustifier turns {image.shape} into {x.shape}: give the last convolution {image.shape[-1]} "
                "channels and every convolution stride 1."
            )
        return x


def mnist_robustifier() -> Robustifier:
    """Builds A5's robustifier for MNIST and Fashion-MNIST, 1,121 parameters."""
    return Robustifier((Conv(32, 3), Conv(1, 5)))


def cifar_robustifier() -> Robustifier:
    """Builds A5's robustifier for CIFAR-10, 112,131 parameters."""
    return Robustifier((Conv(64, 5), Conv(64, 5), Conv(3, 5)))
