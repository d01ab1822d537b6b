"""What certified losses share: the network in the clean batch's statistics, the mixture of losses, the phases.

A method is a robust loss, `robust(stage) -> Robust`, a function of everything that one step of training knows. The loss
that is minimised is, averaged over the batch,

    kappa CE(z, y) + (1 - kappa) robust + penalties

with `kappa` from `bounds.Threat` and `penalties` such as those of `train.penalties`. Bounds and attacks meet the
network normalised by the statistics of the clean batch, in which its examples are independent, and gradients flow
through those statistics.
"""

import dataclasses
import functools
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.tree_util import Partial

from rdx import attacks, bounds, losses, margins
from rdx.balls import Ball, Region
from rdx.bounds import Details, Threat
from rdx.compilation import as_partial
from rdx.models import Forward
from rdx.train import standard
from rdx.train.loop import Phase
from rdx.train.schedules import Ramp
from rdx.types import Array, ArrayLike, AttackResult, Key, PyTree

# As in the recipes of SABR and the expressive losses; the default step is 2.5 times the radius over the steps.
PGD = functools.partial(attacks.pgd, num_steps=8)


@dataclasses.dataclass(frozen=True)
class Stage:
    """One step of training, as a robust loss sees it.

    Attributes:
        key: for everything random in the loss.
        forward: the model.
        params: its parameters.
        statistics: its state, with the statistics of the clean batch.
        batch: `{"x" [B, ...], "labels" [B], ...}`.
        ball: the perturbations, at this step's radius.
        share: falls from 1 to 0 as the radius rises.
        box: what intervals bound; None for the whole ball.
    """

    key: Key
    forward: Forward
    params: PyTree
    statistics: PyTree
    batch: PyTree
    ball: Ball
    share: Array
    box: Region | None = None

    @property
    def x(self) -> Array:
        """The clean inputs, shape `[B, ...]`."""
        return self.batch["x"]

    @property
    def labels(self) -> Array:
        """The labels, shape `[B]`, int."""
        return self.batch["labels"]

    @property
    def logits_fn(self) -> Partial:
        """The network as a function of the inputs."""
        return self.part()

    @property
    def region(self) -> Region:
        """What intervals bound."""
        return self.ball.region(self.x) if self.box is None else self.box

    @functools.cached_property
    def intervals(self) -> Details:
        """IBP bounds of the margins in the region and of all layers, computed once for loss and penalties."""
        return bounds.details(bounds.ibp, margins.of(self.logits_fn), self.region, self.labels)

    def part(self, **static: Hashable) -> Partial:
        """Builds the part of the network that keywords of the module choose, such as `start` and `stop`."""
        return self.forward.logits_fn(self.params, self.statistics, **static)

    def within(self, box: Region) -> "Stage":
        """Returns the stage with bounds in a box in place of the whole ball."""
        return dataclasses.replace(self, box=box)

    def attacked(self, attack: Callable[..., AttackResult], *, ball: Ball | None = None) -> Array:
        """Attacks the batch and returns the inputs that were found, shape `[B, ...]`.

        Args:
            attack: `(key, logits_fn, x, labels, *, ball, index) -> AttackResult`.
            ball: the stage's by default.
        """
        # Stopped before the attack and not after it: nothing of its course is differentiated by the parameters.
        fixed = jax.lax.stop_gradient(self.logits_fn)
        ball = jax.lax.stop_gradient(self.ball if ball is None else ball)
        return attack(self.key, fixed, self.x, self.labels, ball=ball, index=self.batch.get("index")).x_adv


class Robust(NamedTuple):
    """What a method makes of a stage.

    Attributes:
        loss: the robust loss of each example, shape `[B]`.
        metrics: further values, each `[B]` or a scalar.
        stage: the stage that penalties are told, if the method bounds a box of its own.
    """

    loss: Array
    metrics: dict[str, Array]
    stage: Stage | None = None


# (stage) -> (a scalar to add to the mean loss, metrics).
Penalty: TypeAlias = Callable[[Stage], tuple[Array, dict[str, Array]]]


def objective(
    forward: Forward, ball: Ball, robust: Callable[[Stage], Robust], *, eps: Ramp, kappa_start: ArrayLike = 0.0,
    kappa_end: ArrayLike = 0.0, penalties: Sequence[Penalty] = (),
) -> Partial:
    """Builds the loss for `train.fit` out of a method's robust loss.

    Args:
        forward: the model, from `models.forward`.
        ball: the perturbations; its radius is replaced by the ramp's.
        robust: the method; a `Partial` if it holds arrays.
        eps: the radius at each step.
        kappa_start: weight of the clean loss at radius 0, in [0, 1].
        kappa_end: weight of the clean loss at the final radius.
        penalties: what is added to the mean loss.

    Returns:
        A loss with the metrics `loss`, `clean_loss`, `robust_loss`, `error`, `eps`, `kappa` and those of the method and
        the penalties.
    """
    threat = Threat(ball, eps, kappa_end, kappa_start=kappa_start)
    return Partial(_objective, forward, threat, as_partial(robust), tuple(as_partial(fn) for fn in penalties))


def phases(forward: Forward, loss: Partial, *, eps: Ramp, final: Partial | None = None) -> tuple[Phase, ...]:
    """Builds the phases that train with a certified loss and compute no more than they must.

    While the radius is 0 it is the clean loss, whatever method and mixture are used. A loss that has less to do at the
    final radius, such as CROWN-IBP whose share is 0 there, is followed by the one that does only that.

    Args:
        forward: the model.
        loss: the certified loss, while the radius rises.
        eps: its ramp.
        final: the loss at the final radius; `loss` by default.

    Returns:
        Phases for `train.fit`.
    """
    warmup = Phase(int(eps.start) + 1, standard.cross_entropy(forward))
    if final is None:
        return warmup, Phase(None, loss)
    return warmup, Phase(int(eps.end), loss), Phase(None, final)


def means(metrics: dict[str, Array], batch: PyTree) -> dict[str, Array]:
    """Averages per-example metrics over the batch; scalars stay as they are."""
    return {
        name: value.astype(jnp.float32) if value.ndim == 0 else standard.batch_mean(value, batch)
        for name, value in metrics.items()
    }


def check_share(name: str, value: Any) -> None:
    """Raises where a weight is not in [0, 1]; traced values pass.

    Raises:
        ValueError: naming the weight.
    """
    if not isinstance(value, Tracer) and not 0.0 <= float(value) <= 1.0:
        raise ValueError(f"{name}={value} is not a share: give a number from 0 to 1.")


def _objective(
    forward: Forward, threat: Threat, robust: Partial, penalties: tuple[Partial, ...], params: PyTree,
    model_state: PyTree, key: Key, batch: PyTree, step: Array,
) -> tuple[Array, tuple[PyTree, dict[str, Array]]]:
    x, labels = batch["x"], batch["labels"]
    logits, next_state = forward(params, model_state, x, train=True)
    ball, share, kappa = threat.at(step)
    stage = Stage(key, forward, params, forward.statistics(params, model_state, x), batch, ball, share)
    found: Robust = robust(stage)
    added = [penalty(found.stage or stage) for penalty in penalties]
    clean_loss = losses.cross_entropy(logits, labels)
    loss = standard.batch_mean(kappa * clean_loss + (1.0 - kappa) * found.loss, batch)
    loss = sum((value for value, _ in added), loss)
    metrics = {
        "clean_loss": clean_loss, "robust_loss": found.loss, "error": losses.is_wrong(logits, labels),
        "eps": jnp.asarray(ball.eps), "kappa": kappa, **found.metrics,
        **{name: value for _, metrics in added for name, value in metrics.items()},
    }
    return loss, (next_state, {"loss": loss, **means(metrics, batch)})
