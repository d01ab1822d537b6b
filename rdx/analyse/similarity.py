"""How much of an image survives a perturbation: peak signal-to-noise ratio and structural similarity.

    PSNR = 10 log10(1 / mean((x - x')^2))
    SSIM = (2 mu mu' + c1) (2 cov + c2) / ((mu^2 + mu'^2 + c1) (var + var' + c2)),    c1 = 0.01^2, c2 = 0.03^2

for images in [0, 1]. The moments of SSIM are local, under a Gaussian window of 11 pixels with standard deviation 1.5,
and the image's value is the mean over all places where the window fits. Source: Wang, Bovik, Sheikh & Simoncelli (2004,
"Image quality assessment: from error visibility to structural similarity", IEEE Trans. Image Process. 13, Eqs. 13-17).
Computed by dm-pix.
"""

import dm_pix
import jax
import jax.numpy as jnp

from rdx.types import Array

_WINDOW = 11


def psnr(x: Array, other: Array) -> Array:
    """Computes the peak signal-to-noise ratio of each image in decibels; infinite for equal images.

    Args:
        x: images in [0, 1], shape `[B, H, W, C]`.
        other: the same images changed, shape `[B, H, W, C]`.

    Returns:
        Shape `[B]`.
    """
    return jnp.asarray(dm_pix.psnr(x, other))


def ssim(x: Array, other: Array) -> Array:
    """Computes the structural similarity of each image, 1 for equal ones; channels are averaged.

    Images with sides under 11 pixels get the largest window of odd size that fits, which Wang et al. do not treat.

    Args:
        x: images in [0, 1], shape `[B, H, W, C]`.
        other: the same images changed, shape `[B, H, W, C]`.

    Returns:
        Shape `[B]`.
    """
    side = min(x.shape[1:3])
    # dm-pix adds floats to integers, which strict promotion forbids.
    with jax.numpy_dtype_promotion("standard"):
        return jnp.asarray(dm_pix.ssim(x, other, filter_size=min(_WINDOW, side - 1 + side % 2)))
