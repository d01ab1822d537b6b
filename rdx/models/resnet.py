"""Residual networks with BatchNorm."""

import functools

from flax import linen as nn

from rdx.models.normalise import normalise
from rdx.types import Array


class ResNet(nn.Module):
    """The residual network for small images of He et al. (2015, arXiv:1512.03385, Sec. 4.2), of any width and depth.

    A 3x3 convolution, stages of basic blocks that halve the resolution from the second stage on, the mean over the
    image, and a dense layer.

    Attributes:
        widths: channels of each stage.
        blocks: basic blocks of each stage.
        num_classes: number of logits.
        bn_momentum: decay of BatchNorm's running statistics; 0 keeps those of the last batch.
        mean: subtracted from the image, one value or one per channel.
        std: divides the image, one value or one per channel.
    """

    widths: tuple[int, ...] = (16, 32, 64)
    blocks: tuple[int, ...] = (1, 1, 1)
    num_classes: int = 10
    bn_momentum: float = 0.9
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)

    @nn.compact
    def __call__(self, x: Array, *, train: bool = False) -> Array:
        """Computes the logits `[B, K]` of images `[B, H, W, C]`; `train` normalises by the batch's statistics."""
        norm = functools.partial(nn.BatchNorm, use_running_average=not train, momentum=self.bn_momentum)
        conv = functools.partial(nn.Conv, use_bias=False)
        x = normalise(x, self.mean, self.std)
        x = nn.relu(norm()(conv(self.widths[0], (3, 3))(x)))
        for stage, (width, num_blocks) in enumerate(zip(self.widths, self.blocks, strict=True)):
            for block in range(num_blocks):
                stride = 2 if stage > 0 and block == 0 else 1
                y = nn.relu(norm()(conv(width, (3, 3), strides=stride)(x)))
                y = norm()(conv(width, (3, 3))(y))
                if y.shape != x.shape:
                    x = norm()(conv(width, (1, 1), strides=stride)(x))
                x = nn.relu(x + y)
        return nn.Dense(self.num_classes)(x.mean(axis=(1, 2)))
