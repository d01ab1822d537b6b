"""How much of an image survives a perturbation: peak signal-to-noise ratio and structural similarity.

    PSNR = 10 log10(1 / mean((x - x')^2))
    SSIM = (2 mu mu' + c1) (2 cov + c2) / ((mu^2 + mu'^2 + c1) (var + var' + c2)),    c1 = 0.01^2, c2 = 0.03^2

for images in [0, 1]. The moments of SSIM are local, under a Gaussian window of 11 pixels with standard deviation 1.5,
and the image's value is the mean over all places where the window fits. Source: Wang, Bovik, Sheikh & Simoncelli (2004,
"Image quality assessment: from error visibility to structural similarity", IEEE Trans. Image Process. 13, Eqs. 13-17).
"""

import jax.numpy as jnp

from rdx import images
from rdx.types import Array

_WINDOW, _DEVIATION = 11, 1.5
_C1, _C2 = 0.01**2, 0.03**2


def psnr(x: Array, other: Array) -> Array:
    """Computes the peak signal-to-noise ratio of each image in decibels; infinite for equal images.

    Args:
        x: images in [0, 1], shape `[B, H, W, C]`.
        other: the same images changed, shape `[B, H, W, C]`.

    Returns:
        Shape `[B]`.
    """
    return -10.0 * jnp.log10(jnp.square(x - other).mean(axis=(1, 2, 3)))


def ssim(x: Array, other: Array) -> Array:
    """Computes the structural similarity of each image, 1 for equal ones; channels are averaged.

    Images with sides under 11 pixels get the largest window of odd size that fits, which Wang et al. do not treat.

    Args:
        x: images in [0, 1], shape `[B, H, W, C]`.
        other: the same images changed, shape `[B, H, W, C]`.

    Returns:
        Shape `[B]`.
    """
    mean, other_mean = _local_mean(x), _local_mean(other)
    variances = _local_mean(x * x) - mean * mean + _local_mean(other * other) - other_mean * other_mean
    covariance = _local_mean(x * other) - mean * other_mean
    brightness = (2.0 * mean * other_mean + _C1) / (mean * mean + other_mean * other_mean + _C1)
    return (brightness * (2.0 * covariance + _C2) / (variances + _C2)).mean(axis=(1, 2, 3))


def _local_mean(x: Array) -> Array:
    """Averages under the window wherever it fits."""
    side = min(x.shape[1:3])
    num_taps = min(_WINDOW, side - 1 + side % 2)
    means = images.gaussian_blur(x, jnp.full(len(x), _DEVIATION, x.dtype), num_taps=num_taps)
    reach = num_taps // 2
    return means[:, reach : x.shape[1] - reach, reach : x.shape[2] - reach]
