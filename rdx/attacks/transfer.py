"""Transfer attacks: crafted on a substitute, judged at the target; and what makes gradients transfer.

The wrappers turn the substitute into another model and compose with every attack:

    transfer(partial(pgd, num_steps=20), translation_invariant(diverse_inputs(key, net), smoothing_kernel()))
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.tree_util import Partial

from rdx.attacks import base, driver, signatures
from rdx.attacks.adaptive import point_keys
from rdx.attacks.signatures import Attack
from rdx.balls import Ball
from rdx.compilation import as_partial
from rdx.goals import Goal
from rdx.types import Array, ArrayLike, AttackResult, Key, LogitsFn


def transfer(attack: Attack, substitute: LogitsFn, *, lift: Callable[[Goal], Goal] | None = None) -> Attack:
    """Makes an attack craft its inputs on a substitute and be judged at the target, of which it knows nothing else.

    What it returns is called as the attack itself is, with or without a key, and passes other options on, `index` and
    `loop` where the attack takes them. The input
    that is strongest against the substitute is crafted; where it does not gain at the target, the clean input is
    returned, because the strongest input seen is. What withstands transfer is not shown to be robust.

    Source: Dong et al. (2020, arXiv:1912.11852, Sec. 3.2), after Papernot et al. (2016, arXiv:1605.07277).

    Args:
        attack: at a fixed radius; `([key], logits_fn, x, labels, *, ball, goal, ...) -> AttackResult`.
        substitute: `x [B, ...] -> logits [B, K]`, or several answers `[B, S, K]` with `lift`.
        lift: turns the goal at the target into the one at the substitute; `goals.expected` for an ensemble. The same
            goal by default.

    Returns:
        The attack. In its result success and loss are the target's, and so are the counts: two forward passes, of the
        clean and of the crafted input, and no gradient. Its `loop` has no trace, which would be the substitute's.
    """
    attack, takes_key = signatures.keyed(attack), signatures.takes_key(attack)
    call, attack = (_transfer_with_key, attack) if takes_key else (_transfer, partial(attack, None))
    return partial(call, attack, as_partial(substitute), lift)


def _transfer_with_key(
    attack: Attack, substitute: Partial, lift: Callable[[Goal], Goal] | None, key: Key, logits_fn: LogitsFn,
    x: ArrayLike, labels: ArrayLike, **options: Any,
) -> AttackResult:
    return _transfer(partial(attack, key), substitute, lift, logits_fn, x, labels, **options)


def _transfer(
    attack: Attack, substitute: Partial, lift: Callable[[Goal], Goal] | None, logits_fn: LogitsFn, x: ArrayLike,
    labels: ArrayLike, *, ball: Ball, goal: Goal | None = None, loop: driver.Loop | None = None, **options: Any,
) -> AttackResult:
    problem, found = base.begin(logits_fn, x, labels, ball, goal)
    if loop is not None:
        if loop.trace:
            raise ValueError("The steps of a transfer are the substitute's: run the attack there for a trace.")
        options["loop"] = loop
    crafting = problem.goal if lift is None else lift(problem.goal)
    crafted = attack(substitute, problem.x, problem.labels, ball=ball, goal=crafting, **options)
    seen = base.call(base.evaluate, problem, crafted.x_adv)
    return base.report(problem, base.spend(found, seen, forwards=1))


def diverse_inputs(
    key: Key, logits_fn: LogitsFn, *, resize_rate: ArrayLike = 0.9, probability: ArrayLike = 0.5,
) -> Partial:
    """Shows a model its images shrunk and shifted at random: `f(T(x; p))`.

    With `probability` an image of height `H` is resized to `r` rows (and as many columns, in proportion), `r` uniform
    in `resize_rate * H .. H`, and put at a random place on black; else it stays. With MIM this is M-DI2-FGSM. Draws
    follow from the key and the image (`attacks.adaptive.point_keys`), so every step meets fresh ones.

    Source: Xie et al. (2019, arXiv:1803.06978, Sec. 3.2), 299 to 330 rows on 331, `p = 0.5`; the benchmark of Dong et
    al. has 0.85 and 0.7 in its code. Here every image has its own draw, not the batch, and the resizing is bilinear, as
    in most ports.

    Args:
        key: one key.
        logits_fn: `x [B, H, W, C] -> logits [B, K]`.
        resize_rate: least size relative to the image's.
        probability: of changing an image.

    Returns:
        `x [B, H, W, C] -> logits [B, K]`.
    """
    return Partial(_diverse, as_partial(logits_fn), key, jnp.asarray(resize_rate), jnp.asarray(probability))


def _diverse(logits_fn: Partial, key: Key, resize_rate: Array, probability: Array, x: Array) -> Array:
    return logits_fn(jax.vmap(partial(_shrink, resize_rate, probability))(point_keys(key, x), x))


def _shrink(resize_rate: Array, probability: Array, key: Key, image: Array) -> Array:
    is_changed, size_key, *place_keys = jax.random.split(key, 4)
    height, width, _ = image.shape
    rows = jax.random.randint(size_key, (), jnp.ceil(resize_rate * height).astype(int), height + 1)
    scale = rows.astype(image.dtype) / height
    free = [length - scale * length for length in (height, width)]
    # Whole pixels: between them bilinear interpolation would blur.
    offsets = [jnp.floor(jax.random.uniform(key, (), image.dtype) * (room + 1.0))
               for key, room in zip(place_keys, free, strict=True)]
    shrunk = jax.image.scale_and_translate(
        image, image.shape, (0, 1), jnp.stack([scale, scale]), jnp.stack(offsets), "linear", antialias=False
    )
    return jnp.where(jax.random.bernoulli(is_changed, probability), shrunk, image)


def smoothing_kernel(
    kind: Literal["gaussian", "linear", "uniform"] = "gaussian", size: int = 15, *, num_deviations: float = 3.0,
) -> Array:
    """Builds the kernel `w w^T` that translation-invariant attacks smooth gradients with, of sum 1.

    gaussian: `w` is the normal density at `size` points from `-num_deviations` to `num_deviations`. linear:
    `w_i = 1 - |i| / (k + 1)`. uniform: `w_i = 1`; `i` runs from `-k` to `k`, `size = 2k + 1`.

    Source: Dong et al. (2019, arXiv:1904.02884, Sec. 3.3 and released code); their size is 15 for images of 299 rows.

    Args:
        kind: which one.
        size: rows and columns, odd.
        num_deviations: where the Gaussian is cut off, in standard deviations.

    Returns:
        Shape `[size, size]`.

    Raises:
        ValueError: on an unknown kind or an even size.
    """
    if size < 1 or size % 2 == 0:
        raise ValueError(f"size={size} must be odd and positive, so that the kernel has a center.")
    place = np.linspace(-1.0, 1.0, size) if size > 1 else np.zeros(1)
    half = size // 2
    weights = {
        "gaussian": np.exp(-0.5 * np.square(num_deviations * place)),
        "linear": 1.0 - np.abs(place) * half / (half + 1),
        "uniform": np.ones(size),
    }
    if kind not in weights:
        raise ValueError(f"Unknown kernel {kind!r}: use one of {sorted(weights)}.")
    weight = weights[kind] / weights[kind].sum()
    return jnp.asarray(np.outer(weight, weight), jnp.float32)


def translation_invariant(logits_fn: LogitsFn, kernel: Array) -> Partial:
    """Smooths a model's input gradient by a kernel: `g -> W * g`, channel by channel, beyond the edges 0.

    That is nearly the mean gradient over shifted images, weighted by the kernel. The value stays as it is.

    Source: Dong et al. (2019, arXiv:1904.02884, Eq. 6-7).

    Args:
        logits_fn: `x [B, H, W, C] -> logits [B, K]`.
        kernel: shape `[h, w]`, odd, such as `smoothing_kernel()`.

    Returns:
        `x [B, H, W, C] -> logits [B, K]`.
    """
    return Partial(_smoothed, as_partial(logits_fn), kernel)


def _smoothed(logits_fn: Partial, kernel: Array, x: Array) -> Array:
    return logits_fn(_with_smooth_gradient(kernel, x))


@jax.custom_vjp
def _with_smooth_gradient(kernel: Array, x: Array) -> Array:
    del kernel
    return x


def _forwards(kernel: Array, x: Array) -> tuple[Array, Array]:
    return x, kernel


def _backwards(kernel: Array, gradient: Array) -> tuple[Array, Array]:
    size, height, width, channels = gradient.shape
    # Channels as images of their own: grouped convolutions are slow.
    images = jnp.moveaxis(gradient, 3, 1).reshape(size * channels, height, width, 1)
    weights = kernel.astype(gradient.dtype)[:, :, None, None]
    smooth = lax.conv_general_dilated(images, weights, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    return jnp.zeros_like(kernel), jnp.moveaxis(smooth.reshape(size, channels, height, width), 1, 3)


_with_smooth_gradient.defvjp(_forwards, _backwards)
