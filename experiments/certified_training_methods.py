"""The trainings that `experiments.certified_training` compares: for each method the network, its start and its loss."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import optax

from experiments.certified_training_presets import Config, Method
from rdx import attacks, data, models
from rdx.balls import Ball
from rdx.train import (
    averaging,
    certified,
    convex_outer,
    expressive,
    fast_ibp,
    linf_distance,
    penalties,
    phased,
    sabr,
    taps,
)
from rdx.train import schedules as ramps
from rdx.train.loop import Phase, TrainState, init_state
from rdx.types import Array, Key

# The radius is that of the ramp.
_BALL = Ball("linf", 0.0)
_WITHOUT_NORM = ("ibp", "crown_ibp", "fused", "convex_outer")
_PENALISED = ("sabr", "taps", "staps", "mtl_ibp", "cc_ibp", "exp_ibp")


def network(config: Config, method: Method) -> models.Forward:
    """Chooses the network of a method."""
    if method.net is not None:
        return models.forward(method.net)
    if method.kind == "linf_distance":
        return models.forward(config.distance)
    return models.forward(config.plain if method.kind in _WITHOUT_NORM else config.norm)


def start(key: Key, config: Config, method: Method, x: Array, optimizer: optax.GradientTransformation) -> TrainState:
    """Initialises a method's network: as Fast-IBP does with BatchNorm, else as flax does."""
    init_key, draw_key = jax.random.split(key)
    forward = network(config, method)
    variables = dict(forward.model.init(init_key, x))
    params = variables.pop("params")
    if method.kind not in (*_WITHOUT_NORM, "linf_distance"):
        params = fast_ibp.init(draw_key, params)
    return init_state(params, variables, optimizer)


def phases(config: Config, method: Method, weight: float | None, per_epoch: int) -> Sequence[Phase]:
    """Builds a method's phases.

    Args:
        config: the preset.
        method: the method.
        weight: its hyper-parameter.
        per_epoch: updates in an epoch.
    """
    forward = network(config, method)
    if method.kind == "linf_distance":
        epochs = method.epochs or config.epochs
        span = (epochs * per_epoch // 8, 7 * epochs * per_epoch // 8)
        assert weight is not None
        return linf_distance.phases(
            forward, theta=2.0 * config.eps * weight, p=ramps.GeometricRamp(8.0, 1000.0, *span),
            weight=ramps.GeometricRamp(0.1, 0.001, *span),
        )
    warmup = config.warmup if method.kind in _WITHOUT_NORM else 0
    ramp = ramps.smoothed(method.radius * config.eps, warmup + 1, config.ramp, 0.3, per_epoch)
    if method.kind == "crown_ibp":
        return certified.phases(forward, _BALL, eps=ramp)
    if method.kind == "fused":
        return certified.phases(forward, _BALL, eps=ramp, loss=certified.fused)
    build = _builders(config, weight)
    if method.kind in _PENALISED:
        return _penalised(build, config, method, ramp)
    return phased.phases(forward, build[method.kind](forward, _BALL, eps=ramp), eps=ramp)


def _penalised(
    build: dict[str, Callable[..., Any]], config: Config, method: Method, ramp: ramps.Ramp
) -> Sequence[Phase]:
    """Builds phases as their authors train: Fast-IBP's penalties while the radius rises, few weights throughout.

    TAPS and STAPS begin once it has risen; until then there are intervals, for STAPS over small boxes.
    """
    forward, sparse = network(config, method), penalties.l1(method.l1)
    early = {"taps": "fast_ibp", "staps": "sabr"}.get(method.kind, method.kind)
    rising = build[early](forward, _BALL, eps=ramp, penalties=(penalties.of_bounds(), sparse))
    final = build[method.kind](forward, _BALL, eps=ramp, penalties=(sparse,))
    return phased.phases(forward, rising, eps=ramp, final=final)


def optimizer(config: Config, method: Method, per_epoch: int) -> optax.GradientTransformation:
    """Builds Adam with clipped gradients, falling rates and, at the end, averaged weights."""
    epochs, rate = method.epochs or config.epochs, method.learning_rate or config.learning_rate
    # Epochs of decay are those of the preset, scaled to the method's own number.
    steps = {round(epoch * epochs / config.epochs * per_epoch): 0.2 for epoch in config.decay}
    second = 0.99 if method.kind == "linf_distance" else 0.999
    adam = optax.adam(optax.piecewise_constant_schedule(rate, steps), b2=second)
    clipped = optax.chain(optax.clip_by_global_norm(config.clip), adam)
    # A linf-distance net's last steps are its first ones with the norm that counts: nothing to average over.
    if not config.average or method.kind == "linf_distance":
        return clipped
    return averaging.averaged(clipped, start=(epochs - config.average) * per_epoch)


def trained(config: Config, method: Method, state: TrainState, source: data.Source) -> tuple[models.Forward, Any, Any]:
    """Takes what is evaluated from the last state: averaged weights, with statistics of their own.

    Returns:
        The model, its parameters and its state.
    """
    forward = network(config, method)
    params, model_state = jax.device_put((state.params, state.model_state), jax.local_devices()[0])
    if config.average and method.kind != "linf_distance":
        params = jax.device_put(averaging.average(state.opt_state), jax.local_devices()[0])
        size, num = config.batch_size, min(len(source) // config.batch_size, 50)
        batches = (data.to_float(source.images[size * i : size * (i + 1)]) for i in range(num))
        model_state = averaging.statistics(forward, params, model_state, batches)
    return forward, params, model_state


@functools.cache
def pgd(num_steps: int) -> functools.partial:
    """Builds the attack of training; one object for all methods, so that it is compiled once.

    On CPUs it unrolls: compiled loops hold convolutions in their slow form.
    """
    kind = "host" if jax.default_backend() == "cpu" else "compiled"
    return functools.partial(attacks.pgd, num_steps=num_steps, loop=attacks.Loop(kind=kind))


def _builders(config: Config, weight: Any) -> dict[str, Callable[..., Any]]:
    """Binds the settings of the losses, of which all take `(forward, ball, *, eps)` and `_PENALISED` penalties too."""
    attack, latent = pgd(config.attack_steps), pgd(config.latent_steps)
    bind = functools.partial
    return {
        "ibp": certified.ibp,
        "fast_ibp": fast_ibp.fast_ibp,
        "sabr": bind(sabr.sabr, subselection=weight, attack=attack),
        "taps": bind(taps.taps, cut=config.cut, gradient_scale=weight, latent_attack=latent),
        "staps": bind(taps.staps, cut=config.cut, subselection=weight, attack=attack, latent_attack=latent),
        "mtl_ibp": bind(expressive.mtl_ibp, alpha=weight, attack=attack),
        "cc_ibp": bind(expressive.cc_ibp, alpha=weight, attack=attack),
        "exp_ibp": bind(expressive.exp_ibp, alpha=weight, attack=attack),
        "convex_outer": convex_outer.convex_outer,
    }
