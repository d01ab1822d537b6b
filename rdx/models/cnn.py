"""Convolutional networks, with BatchNorm or without, and the ones that the papers use.

Every constructor returns a module whose fields can still be changed: `a5_classifier().clone(mean=(0.5,), std=(2.0,))`.
"""

from typing import NamedTuple

from flax import linen as nn

from rdx.models.normalise import normalise
from rdx.types import Array


class Conv(NamedTuple):
    """One convolution: output channels, side of the square kernel, stride."""

    channels: int
    kernel: int
    stride: int = 1


class ConvNet(nn.Module):
    """Convolutions, then dense layers, with ReLU after all but the last.

    Attributes:
        convs: the convolutions.
        dense: widths of the hidden dense layers.
        num_classes: number of logits.
        padding: of every convolution, "SAME", the number of zeros on each side, or "HALF" for half the kernel.
        mean: subtracted from the image, one value or one per channel.
        std: divides the image, one value or one per channel.
    """

    convs: tuple[Conv, ...]
    dense: tuple[int, ...]
    num_classes: int = 10
    padding: str | int = "SAME"
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)

    @nn.compact
    def __call__(self, x: Array, *, start: int = 0, stop: int | None = None) -> Array:
        """Computes the logits `[B, K]` of images `[B, H, W, C]`, or a part of the way there.

        Args:
            x: images; with `start`, what the part before it returned.
            start: the number of layers before the part, convolutions and dense layers counted together.
            stop: the number of layers up to the part's end, whose ReLU is in it; None for the last layer.
        """
        if start == 0:
            x = normalise(x, self.mean, self.std)
        last = len(self.convs) + len(self.dense)
        for number in range(start, last + 1 if stop is None else stop):
            x = _layer(self, x, number)
            x = x if number == last else nn.relu(x)
        return x


class BatchNormConvNet(ConvNet):
    """A `ConvNet` with BatchNorm after every layer but the last.

    Attributes:
        bn_momentum: decay of BatchNorm's running statistics; 0 keeps those of the last batch.
    """

    bn_momentum: float = 0.9

    @nn.compact
    def __call__(self, x: Array, *, train: bool = False, start: int = 0, stop: int | None = None) -> Array:
        """Computes as `ConvNet` does; `train` normalises by the batch's statistics."""
        if start == 0:
            x = normalise(x, self.mean, self.std)
        last = len(self.convs) + len(self.dense)
        for number in range(start, last + 1 if stop is None else stop):
            x = _layer(self, x, number)
            if number < last:
                norm = nn.BatchNorm(not train, momentum=self.bn_momentum, name=f"BatchNorm_{number}")
                x = nn.relu(norm(x))
        return x


def small_cnn(num_classes: int = 10) -> ConvNet:
    """Builds the small network of certified training: two strided 4x4 convolutions and 100 hidden units.

    Source: Wong & Kolter (2018, arXiv:1711.00851); 166,406 parameters for 28x28x1.
    """
    return ConvNet((Conv(16, 4, 2), Conv(32, 4, 2)), (100,), num_classes)


def bench_cnn(num_classes: int = 10) -> ConvNet:
    """Builds the network of the speed comparisons: as `small_cnn`, with stride 1 in the second convolution.

    Its layers are those of "small" in Gowal et al. (2018, arXiv:1810.12715), here with zero padding.
    """
    return ConvNet((Conv(16, 4, 2), Conv(32, 4, 1)), (100,), num_classes)


def digits_cnn(num_classes: int = 10) -> ConvNet:
    """Builds a network for 8x8 images that trains in seconds on a CPU."""
    return ConvNet((Conv(16, 3), Conv(32, 3, 2)), (64,), num_classes)


def a5_classifier(num_classes: int = 10) -> ConvNet:
    """Builds the classifier of A5 for MNIST, Fashion-MNIST and CIFAR-10.

    Five 3x3 convolutions with 64, 64, 128 (stride 2), 128, 128 channels and 512 hidden units: 13,257,290 parameters
    for 28x28x1, 17,190,602 for 32x32x3. Source: Frosio & Kautz (2023, A5); the layers are those of "large" in Gowal et
    al. (2018, arXiv:1810.12715).
    """
    return cnn7(num_classes)


def cnn7(num_classes: int = 10, *, width: int = 64) -> ConvNet:
    """Builds the network of certified training: five 3x3 convolutions and 512 hidden units.

    Channels are 64, 64, 128 (stride 2), 128, 128. Source: "large" in Gowal et al. (2018, arXiv:1810.12715); CNN7 of Shi
    et al. (2021, arXiv:2103.17268) has BatchNorm as well, see `cnn7_batch_norm`.

    Args:
        num_classes: number of logits.
        width: channels of the first convolution; the others and the hidden units shrink in proportion.
    """
    return ConvNet(_cnn7_convs(width), (8 * width,), num_classes, padding=1)


def cnn7_batch_norm(num_classes: int = 10, *, width: int = 64) -> BatchNormConvNet:
    """Builds `cnn7` with BatchNorm after every hidden layer (Shi et al. 2021, arXiv:2103.17268, Sec. 4)."""
    return BatchNormConvNet(_cnn7_convs(width), (8 * width,), num_classes, padding=1)


def fonts_cnn(num_classes: int = 62) -> ConvNet:
    """Builds the classifier of A5 for pictures of characters, 356,342 parameters for 128x128x3.

    Four convolutions of stride 2 with 64, 32, 16, 8 channels and 512 hidden units; it takes 0.5 from every value.
    Source: Frosio & Kautz (2023, A5), their released code.
    """
    convs = (Conv(64, 5, 2), Conv(32, 5, 2), Conv(16, 3, 2), Conv(8, 3, 2))
    return ConvNet(convs, (512,), num_classes, padding="HALF", mean=(0.5,))


def small_fonts_cnn(num_classes: int = 62) -> ConvNet:
    """Builds a classifier for pictures of characters of 32x32 pixels that trains in minutes on a CPU."""
    return ConvNet((Conv(32, 5, 2), Conv(32, 3, 2)), (128,), num_classes, padding="HALF", mean=(0.5,))


def _cnn7_convs(width: int) -> tuple[Conv, ...]:
    return Conv(width, 3), Conv(width, 3), Conv(2 * width, 3, 2), Conv(2 * width, 3), Conv(2 * width, 3)


def _layer(net: ConvNet, x: Array, number: int) -> Array:
    """Computes a layer, before its ReLU; called within the network's own `__call__`."""
    if number < len(net.convs):
        conv, name = net.convs[number], f"Conv_{number}"
        padding = conv.kernel // 2 if net.padding == "HALF" else net.padding
        return nn.Conv(conv.channels, (conv.kernel,) * 2, strides=conv.stride, padding=padding, name=name)(x)
    place = number - len(net.convs)
    features = (*net.dense, net.num_classes)[place]
    return nn.Dense(features, name=f"Dense_{place}")(x.reshape(x.shape[0], -1))
