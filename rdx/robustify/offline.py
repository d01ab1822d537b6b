"""A5/O: the perturbation of every image is optimised on its own, its label known.

Paper: Frosio & Kautz (2023, A5, Sec. 3, "Offline robustification with ground truth", Eqs. 4-6). It answers what can be
reached; it needs the label, so it is no deployable defence.

In the authors' code all `z` are one tensor under RMSProp: rows outside the batch receive zero gradients, so their
mean square decays between visits and a visited pixel moves by about `lr / sqrt(1 - decay)` whatever its gradient.
Optimising `{"z": [N, ...]}` with `optax.rmsprop(lr, decay=0.99, eps_in_sqrt=False)` behaves the same way. It suits the
linf norm, where elements have a budget each; for l2 and l1, where they share one, there is `steepest`.
"""

import functools

import jax
import jax.numpy as jnp
import optax
from jax.tree_util import Partial

from rdx import bounds, norms
from rdx.attacks import base
from rdx.balls import Ball
from rdx.bounds import Threat
from rdx.robustify.objective import LossOutput, check_budget, defend, into_unit_ball, out_of_unit_ball, summarize
from rdx.types import Array, ArrayLike, Key, LogitsFn, PyTree

# How near to the edge of the ball `steepest` goes, in units of the radius: at the edge itself `z` would be infinite.
_REACH = 0.999


def init(num_examples: int, shape: tuple[int, ...]) -> PyTree:
    """Builds the parameters `{"z": zeros [N, ...]}`: at first nothing is moved."""
    return {"z": jnp.zeros((num_examples, *shape), jnp.float32)}


def steepest(defense: Ball, learning_rate: optax.ScalarOrSchedule) -> optax.GradientTransformation:
    """Builds projected steepest descent in the norm of the defender's ball, for every image by itself.

    In the unit ball, where `v = delta_D(z) / eps_D` lives (`objective.into_unit_ball`), it makes the step

        v <- P(v - lr * u(dE/dv))

    of PGD (`attacks.base.ascend`): `u` is the sign for linf, the normalised gradient for l2, and for l1 the sign on the
    largest 1 % of the elements; `P` projects to the ball. The update is what moves `z` there. In l2 and l1 the elements
    share one budget, which rules that move all of them alike, such as RMSProp, spend where it does not matter: with l1
    they move every element, where a few do better. Rows outside of the batch have gradient 0 and stay as they are.

    Every step costs a projection of all rows, for l1 and l2 by bisection.

    Source: Tramer & Boneh (2019, arXiv:1904.13000, SLIDE) for l1; Madry et al. (2018, arXiv:1706.06083) for the others.

    Args:
        defense: the defender's ball; only its norm matters.
        learning_rate: length of a step in units of the ball's radius, such as `2.5 / num_steps` where every step sees
            all images, a number or an optax schedule.

    Returns:
        An optax transformation for the parameters of `init`.

    Raises:
        ValueError: on an unknown norm; its `update` where no parameters are given.
    """
    norms.check(defense.norm)
    ball = Ball(defense.norm, _REACH, -jnp.inf, jnp.inf)

    def init(params: PyTree) -> Array:
        del params
        return jnp.zeros((), jnp.int32)

    def update(updates: PyTree, state: PyTree, params: PyTree | None = None) -> tuple[PyTree, PyTree]:
        if params is None:
            raise ValueError("Projected steps start from the parameters: call update(gradients, state, params).")
        rate = learning_rate(state) if callable(learning_rate) else learning_rate
        return jax.tree.map(lambda gradient, z: _descend(ball, gradient, z, rate) - z, updates, params), state + 1

    return optax.GradientTransformation(init, update)


def _descend(ball: Ball, gradient: Array, z: Array, rate: ArrayLike) -> Array:
    v = into_unit_ball(z, ball.norm)
    v = v * norms.expand(_REACH / jnp.maximum(norms.norm(v, ball.norm), _REACH), v)
    _, pull_back = jax.vjp(functools.partial(out_of_unit_ball, norm=ball.norm), v)
    moved = base.ascend(ball, jnp.zeros_like(v), v, -pull_back(gradient)[0], rate)
    is_still = norms.linf(gradient) == 0
    return jnp.where(norms.expand(is_still, z), z, out_of_unit_ball(moved, ball.norm))


def offline(logits_fn: LogitsFn, *, defense: Ball, threat: Threat) -> Partial:
    """Builds the loss `sum_i E(x_i + delta_D(z_i))`, minimised over `z` with the classifier frozen.

    It is a sum, not a mean: every image is its own problem and shall not depend on the size of the batch.

    Args:
        logits_fn: the frozen classifier, a `Partial` so that its parameters are arguments.
        defense: the defender's ball.
        threat: the attack to prepare for.

    Returns:
        A loss for `train.fit` over the parameters of `init`; the batch's `row [B]` says which `z` an image owns.

    Raises:
        ValueError: where a ball is unusable or the balls have different boxes; their norms may differ.
    """
    check_budget(defense, threat.ball)
    return Partial(_loss, logits_fn, defense, threat)


def apply(params: PyTree, x: Array, rows: Array, *, defense: Ball) -> Array:
    """Defends `x [B, ...]` with the optimised `z` of the given rows."""
    return defend(x, params["z"][rows], defense)


def _loss(
    logits_fn: LogitsFn, defense: Ball, threat: Threat,
    params: PyTree, model_state: PyTree, key: Key, batch: PyTree, step: Array,
) -> LossOutput:
    del key
    x_defended = apply(params, batch["x"], batch["row"], defense=defense)
    logits = logits_fn(x_defended)
    loss, metrics = bounds.phased_objective(threat, logits, logits_fn, x_defended, batch["labels"], step)
    return loss.sum(), (model_state, summarize(loss, metrics))
