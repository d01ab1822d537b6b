"""Training of detectors: an outlier class, class-conditional detectors, joint abstain classes, nets with dropout."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from rdx import compilation, losses
from rdx.balls import Ball
from rdx.detect import abstain, class_conditional, outlier
from rdx.models import Forward, dropout_fn, hidden_fn, last_layer
from rdx.train import standard
from rdx.train.schedules import Ramp
from rdx.types import Array, AttackResult, Key, LogitsFn, PyTree


def with_dropout(forward: Forward, *, rate: float = 0.5) -> Partial:
    """Builds the loss `mean_i CE(f(r_i, x_i), y_i)` with dropout `r_i` before every dense layer.

    Source: Srivastava et al. (2014, J. Mach. Learn. Res. 15), as the nets of Feinman et al. (2017, arXiv:1703.00410).

    Args:
        forward: an `MLP` or a `ConvNet`, from `models.forward`.
        rate: share of units dropped.

    Returns:
        A loss for `train.fit` with the metrics `loss` and `error`.
    """
    return Partial(_with_dropout, forward, _Rate(rate))


def outlier_class(
    forward: Forward, ball: Ball, *, source: LogitsFn, attack: Callable[..., AttackResult]
) -> Partial:
    """Builds the loss of `detect.outlier.loss`, with adversarial inputs made on a fixed classifier.

    Source: Grosse et al. (2017, arXiv:1702.06280, Sec. 6).

    Args:
        forward: the network with `K + 1` classes.
        ball: the threat model.
        source: the classifier with `K` classes that is attacked.
        attack: `(key, logits_fn, x, labels, *, ball, index) -> AttackResult`, its settings bound.

    Returns:
        A loss for `train.fit` with the metrics `loss`, `error` and `missed`.
    """
    return Partial(_outlier, forward, compilation.as_partial(source), compilation.as_partial(attack), ball)


def gat(forward: Forward, ball: Ball, *, attack: Callable[..., AttackResult]) -> Partial:
    """Builds the loss of `detect.class_conditional.loss`: each input poses as a class drawn among the others.

    Source: Yin et al. (2020, arXiv:1905.11475, Eq. 4). Difference: one class a step for each input, not all.

    Args:
        forward: the network of the `K` detectors.
        ball: the threat model.
        attack: `(key, logits_fn, x, labels, *, ball, goal, index) -> AttackResult`, its settings bound.

    Returns:
        A loss for `train.fit` with the metrics `loss`, `error` (of clean inputs rejected by their own detector) and
        `missed`.
    """
    return Partial(_gat, forward, compilation.as_partial(attack), ball)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Joint:
    """How joint abstain training proceeds.

    Attributes:
        ball: the perturbations; the radius is the ramp's.
        eps: a ramp `step -> radius`.
        num_classes: `K`; the network has more outputs.
        kappa_end: weight of the clean loss at the final radius; it falls from 1 as the radius rises.
        settings: the other weights of the loss.
        gamma: weight of `abstain.balance`.
    """

    ball: Ball
    eps: PyTree
    num_classes: int = dataclasses.field(metadata={"static": True})
    kappa_end: float = 0.5
    settings: abstain.Objective = abstain.DEFAULT
    gamma: float = 0.0


def joint_abstain(
    forward: Forward, ball: Ball, *, eps: Ramp, num_classes: int, kappa_end: float = 0.5,
    settings: abstain.Objective = abstain.DEFAULT, gamma: float = 0.0,
) -> Partial:
    """Builds the loss of `detect.abstain.objective`, while radius and share of the robust loss rise together.

    Source: Sheikholeslami et al. (2021, Sec. 4); Baharlouei et al. (2023, arXiv:2210.14410) for several
    abstain classes.

    Args:
        forward: an `MLP` or a `ConvNet` with `K + M` classes.
        ball: the perturbations; the radius is the ramp's.
        eps: the radius at each step.
        num_classes: `K`.
        kappa_end: weight of the clean loss at the final radius, 0.5 in the authors' code.
        settings: the other weights.
        gamma: weight of the penalty for uneven use of the abstain classes.

    Returns:
        A loss for `train.fit` with the metrics `loss`, `eps` and those of `abstain.objective`.
    """
    return Partial(_joint, forward, Joint(ball, eps, num_classes, kappa_end, settings, gamma))


def network(forward: Forward, params: PyTree, *, num_classes: int) -> abstain.Network:
    """Splits a trained `MLP` or `ConvNet` into hidden layers and last layer, as `detect.abstain` takes it."""
    variables = {"params": params}
    return abstain.Network(hidden_fn(forward.model, variables), *last_layer(variables), num_classes)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Rate:
    value: float = dataclasses.field(metadata={"static": True})


def _with_dropout(
    forward: Forward, rate: _Rate, params: PyTree, model_state: PyTree, key: Key, batch: PyTree, step: Array
) -> tuple[Array, tuple[PyTree, dict[str, Array]]]:
    del step
    x, labels = batch["x"], batch["labels"]
    random_fn = dropout_fn(forward.model, {"params": params}, rate=rate.value)
    logits = random_fn(jax.random.split(key, len(x)), x)
    loss = standard.batch_mean(losses.cross_entropy(logits, labels), batch)
    return loss, (model_state, {"loss": loss, "error": standard.batch_mean(losses.is_wrong(logits, labels), batch)})


def _outlier(
    forward: Forward, source: Partial, attack: Partial, ball: Ball, params: PyTree, model_state: PyTree, key: Key,
    batch: PyTree, step: Array,
) -> tuple[Array, tuple[PyTree, dict[str, Array]]]:
    del step
    x, labels = batch["x"], batch["labels"]
    x_adv = attack(key, source, x, labels, ball=ball, index=batch.get("index")).x_adv
    logits, _ = forward(params, model_state, x, train=True)
    adversarial, model_state = forward(params, model_state, x_adv, train=True)
    loss = standard.batch_mean(outlier.loss(logits, labels, adversarial), batch)
    missed = adversarial.argmax(axis=1) != logits.shape[1] - 1
    metrics = {"error": losses.is_wrong(logits, labels), "missed": missed}
    means = {name: standard.batch_mean(value, batch) for name, value in metrics.items()}
    return loss, (model_state, {"loss": loss, **means})


def _gat(
    forward: Forward, attack: Partial, ball: Ball, params: PyTree, model_state: PyTree, key: Key, batch: PyTree,
    step: Array,
) -> tuple[Array, tuple[PyTree, dict[str, Array]]]:
    del step
    x, labels = batch["x"], batch["labels"].astype(jnp.int32)
    target_key, attack_key = jax.random.split(key)
    fixed = jax.lax.stop_gradient(params)
    logits_fn = forward.logits_fn(fixed, forward.statistics(fixed, model_state, x))
    outputs, model_state = forward(params, model_state, x, train=True)
    num_classes = outputs.shape[1]
    targets = (labels + jax.random.randint(target_key, labels.shape, 1, num_classes)) % num_classes
    goal = class_conditional.pose(targets)
    x_adv = attack(attack_key, logits_fn, x, labels, ball=ball, goal=goal, index=batch.get("index")).x_adv
    adversarial, _ = forward(params, model_state, x_adv, train=True)
    loss = standard.batch_mean(class_conditional.loss(outputs, labels, adversarial, targets), batch)
    rejected = jnp.take_along_axis(outputs, labels[:, None], axis=1)[:, 0] <= 0
    missed = jnp.take_along_axis(adversarial, targets[:, None], axis=1)[:, 0] > 0
    means = {name: standard.batch_mean(flags, batch) for name, flags in (("error", rejected), ("missed", missed))}
    return loss, (model_state, {"loss": loss, **means})


def _joint(
    forward: Forward, joint: Joint, params: PyTree, model_state: PyTree, key: Key, batch: PyTree, step: Array
) -> tuple[Array, tuple[PyTree, dict[str, Array]]]:
    del key
    eps = joint.eps(step)
    share = eps / jnp.maximum(jnp.asarray(joint.eps.eps, jnp.float32), jnp.finfo(jnp.float32).tiny)
    kappa = 1.0 - (1.0 - joint.kappa_end) * share
    split = network(forward, params, num_classes=joint.num_classes)
    per_example, metrics = abstain.objective(
        split, batch["x"], batch["labels"], ball=dataclasses.replace(joint.ball, eps=eps),
        kappa=kappa, settings=joint.settings,
    )
    loss = standard.batch_mean(per_example, batch)
    loss = loss + joint.gamma * abstain.balance(split(batch["x"]), joint.num_classes)
    means = {name: standard.batch_mean(value, batch) for name, value in metrics.items()}
    return loss, (model_state, {"loss": loss, "eps": eps, **means})
