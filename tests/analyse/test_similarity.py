"""PSNR and SSIM against their formulas in NumPy, and their closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rdx import analyse


def _pair(shape, noise=0.1):
    keys = jax.random.split(jax.random.key(0))
    x = jax.random.uniform(keys[0], shape)
    return x, jnp.clip(x + noise * jax.random.normal(keys[1], shape), 0.0, 1.0)


def _by_formula(x, other, window):
    """Wang et al. (2004, Eqs. 13-17): moments under a Gaussian window wherever it fits."""
    x, other = np.asarray(x, np.float64), np.asarray(other, np.float64)
    place = np.arange(window) - window // 2
    weights = np.exp(-(place[:, None] ** 2 + place[None] ** 2) / (2 * 1.5**2))
    weights /= weights.sum()
    values = []
    for row in range(x.shape[0] - window + 1):
        for column in range(x.shape[1] - window + 1):
            a, b = (image[row : row + window, column : column + window] for image in (x, other))
            mean_a, mean_b = (weights * a).sum(), (weights * b).sum()
            var_a, var_b = (weights * (a - mean_a) ** 2).sum(), (weights * (b - mean_b) ** 2).sum()
            cov = (weights * (a - mean_a) * (b - mean_b)).sum()
            c1, c2 = 0.01**2, 0.03**2
            brightness = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
            values.append(brightness * (2 * cov + c2) / (var_a + var_b + c2))
    return np.mean(values)


@pytest.mark.parametrize(("shape", "window"), [((2, 16, 13, 1), 11), ((2, 8, 8, 1), 7), ((2, 12, 12, 3), 11)])
def test_ssim_follows_its_formula(shape, window):
    x, other = _pair(shape)
    found = analyse.ssim(x, other)
    assert found.shape == shape[:1]
    for i in range(shape[0]):
        expected = np.mean([_by_formula(x[i, ..., c], other[i, ..., c], window) for c in range(shape[3])])
        # Variances are differences of squares in float32.
        np.testing.assert_allclose(found[i], expected, rtol=2e-4)
    assert 0.5 < float(found[0]) < 0.99
    np.testing.assert_allclose(analyse.ssim(x, x), 1.0, rtol=1e-5)


def test_ssim_knows_structure_from_brightness():
    x, noisy = _pair((1, 28, 28, 1), 0.05)
    brighter = x + jnp.sqrt(jnp.square(noisy - x).mean())
    np.testing.assert_allclose(analyse.psnr(x, brighter), analyse.psnr(x, noisy), rtol=1e-5)
    assert float(analyse.ssim(x, brighter)[0]) > float(analyse.ssim(x, noisy)[0])


def test_psnr_of_known_errors():
    x = jnp.full((3, 4, 4, 1), 0.5)
    moved = x + jnp.array([0.1, 0.01, 0.0])[:, None, None, None]
    found = np.asarray(analyse.psnr(x, moved))
    np.testing.assert_allclose(found[:2], [20.0, 40.0], rtol=1e-4)
    assert found[2] == np.inf
