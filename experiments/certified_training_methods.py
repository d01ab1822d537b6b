"""The trainings that `experiments.certified_training` compares: for each method the network, its start and its loss."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import optax

from experiments.certified_training_presets import Config, Method
from rdx import attacks, data, models
from rdx.balls import Ball
from rdx.train import averaging, certified, convex_outer, expressive, fast_ibp, linf_distance, phased, sabr, taps
from rdx.train import schedules as ramps
from rdx.train.loop import Phase, TrainState, init_state
from rdx.types import Array, Key

# The radius is that of the ramp.
_BALL = Ball("linf", 0.0)
_WITHOUT_NORM = ("ibp", "crown_ibp", "fused", "convex_outer")


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
    ramp = ramps.smoothed(config.eps, config.warmup + 1, config.ramp, 0.3, per_epoch)
    if method.kind == "crown_ibp":
        return certified.phases(forward, _BALL, eps=ramp)
    if method.kind == "fused":
        return certified.phases(forward, _BALL, eps=ramp, loss=certified.fused)
    return phased.phases(forward, _losses(config)[method.kind](forward, weight, ramp), eps=ramp)


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


def _losses(config: Config) -> dict[str, Callable[[models.Forward, Any, ramps.Ramp], Any]]:
    attack, latent = pgd(config.attack_steps), pgd(config.latent_steps)
    return {
        "ibp": lambda f, _, eps: certified.ibp(f, _BALL, eps=eps),
        "fast_ibp": lambda f, _, eps: fast_ibp.fast_ibp(f, _BALL, eps=eps),
        "sabr": lambda f, w, eps: sabr.sabr(f, _BALL, eps=eps, subselection=w, attack=attack),
        "taps": lambda f, w, eps: taps.taps(
            f, _BALL, eps=eps, cut=config.cut, gradient_scale=w, latent_attack=latent),
        "staps": lambda f, w, eps: taps.staps(
            f, _BALL, eps=eps, cut=config.cut, subselection=w, attack=attack, latent_attack=latent),
        "mtl_ibp": lambda f, w, eps: expressive.mtl_ibp(f, _BALL, eps=eps, alpha=w, attack=attack),
        "cc_ibp": lambda f, w, eps: expressive.cc_ibp(f, _BALL, eps=eps, alpha=w, attack=attack),
        "exp_ibp": lambda f, w, eps: expressive.exp_ibp(f, _BALL, eps=eps, alpha=w, attack=attack),
        "convex_outer": lambda f, _, eps: convex_outer.convex_outer(f, _BALL, eps=eps),
    }
