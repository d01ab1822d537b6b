"""Preemptive robustification: an image is moved to where an attack on it does least harm, found by attacking it.

Moon et al. (2022, "Preemptive Image Robustification for Protecting Users against Man-in-the-Middle Adversarial
Attacks", AAAI, arXiv:2112.05634), the baseline that the paper of A5 names. It is what A5/O is without certificates: the
inner maximum is bounded from below by PGD instead of from above by bounds, so nothing is guaranteed.

    min_{||x_D - x|| <= eps_D}  max_{||x_A - x_D|| <= eps_A}  CE(f(x_A), y)

Differences from the released code (`PreemptRobustLinf`, `PreemptRobustL2`): outer steps are projected steepest steps of
the defender's norm, where it has RMSProp on a tanh-transformed image for linf and plain gradient steps for l2, so that
one rule serves every norm; random starts are uniform in the ball for l2 too; of the attacks' restarts there is one, the
code's default. As in its default (`hessian: false`) the gradient is of first order: the attacked image moves with the
defended one, but for the elements that the box holds.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax.tree_util import Partial

from rdx.attacks import base, driver
from rdx.balls import Ball
from rdx.compilation import as_partial
from rdx.robustify.objective import check_budget
from rdx.types import Array, ArrayLike, Key, LogitsFn


class _Context(NamedTuple):
    problem: base.Problem  # its ball is the defender's, its data the two step sizes
    threat: Ball
    attack_steps: Array


class _State(NamedTuple):
    keys: Key
    x_defended: Array
    x_adv: Array
    found: base.Found


def preemptive(
    key: Key, logits_fn: LogitsFn, x: ArrayLike, labels: ArrayLike | None, *, defense: Ball, threat: Ball,
    num_steps: int = 100, step_size: ArrayLike | None = None, attack_steps: int = 20,
    attack_step_size: ArrayLike | None = None, index: ArrayLike | None = None,
) -> Array:
    """Minimises the loss under PGD over the defender's ball; see the module for the bilevel problem.

    From a random point of the defender's ball, every outer step attacks with `attack_steps` of PGD from a random point
    of the attacker's ball and descends the gradient that it ends with,

        x_A = PGD(x_D),    x_D <- P(x_D + s * u(-grad CE(f(x_A), y)))

    with the projection `P` and the steepest direction `u` of the defender's norm. The last image is the result.

    Source: Moon et al. (2022, arXiv:2112.05634); see the module for the differences from the released code.

    Args:
        key: one key; example `i` uses it folded with `index[i]`.
        logits_fn: `x [B, ...] -> logits [B, K]`.
        x: clean inputs, shape `[B, ...]`.
        labels: shape `[B]`, int; None for the classifier's own predictions for `x`, as in the paper, where a user has
            nothing else.
        defense: the defender's ball, of any norm.
        threat: the attacker's ball around the defended input, of any norm, in the same box.
        num_steps: number of outer steps; each costs `attack_steps + 1` gradients.
        step_size: length of an outer step in the defender's norm, in input units; `2.5 * eps_D / num_steps` by default.
        attack_steps: steps of each attack.
        attack_step_size: length of a step in the attacker's norm; `eps_A / 4` by default, as in the released code.
        index: places in the data set, shape `[B]`, int; `0..B-1` by default.

    Returns:
        Defended inputs in the defender's ball and box, shape `[B, ...]`.

    Raises:
        ValueError: on unusable inputs, labels, balls or numbers of steps, different boxes, or NaN logits.
    """
    if num_steps < 1 or attack_steps < 1:
        raise ValueError(f"num_steps={num_steps} and attack_steps={attack_steps} must both be at least 1.")
    check_budget(defense, threat)
    logits_fn, x = as_partial(logits_fn), jnp.asarray(x)
    labels = base.call(_predict, logits_fn, x) if labels is None else labels
    problem, found = base.begin(logits_fn, x, labels, defense, None)
    size = 2.5 / num_steps * jnp.asarray(defense.eps) if step_size is None else step_size
    attack_size = 0.25 * jnp.asarray(threat.eps) if attack_step_size is None else attack_step_size
    problem = problem._replace(data=(base.per_example(size, x), base.per_example(attack_size, x)))
    context = _Context(problem, threat, jnp.int32(attack_steps))
    found, _ = driver.run(
        _METHOD, context, base.example_keys(key, x, index), found, num_steps=num_steps * (attack_steps + 1)
    )
    return found.best.x


def _predict(logits_fn: Partial, x: Array) -> Array:
    return logits_fn(x).argmax(axis=1).astype(jnp.int32)


def _init(context: _Context, keys: Key, found: base.Found) -> _State:
    x_defended = context.problem.ball.sample(base.fold(keys, 0), context.problem.x)
    return _State(keys, x_defended, context.threat.sample(base.fold(keys, 1), x_defended), found)


def _step(context: _Context, state: _State, i: Array) -> _State:
    """Attacks, `attack_steps` times; then moves the defended image, around which the next attack begins.

    Both need one gradient at the attacked image, so that the two loops are one.
    """
    problem, threat = context.problem, context.threat
    step_size, attack_step_size = problem.data
    _, gradient = base.value_and_gradient(problem, state.x_adv)
    attacked = base.ascend(threat, state.x_defended, state.x_adv, gradient, attack_step_size)
    is_free = (state.x_adv > threat.low) & (state.x_adv < threat.high)
    descent = jnp.where(is_free, -gradient, 0.0)
    moved = base.ascend(problem.ball, problem.x, state.x_defended, descent, step_size)
    is_attacked = i % (context.attack_steps + 1) == context.attack_steps
    restarted = threat.sample(base.fold(state.keys, i + 2), moved)
    return state._replace(
        x_defended=jnp.where(is_attacked, moved, state.x_defended), x_adv=jnp.where(is_attacked, restarted, attacked)
    )


def _finish(context: _Context, state: _State) -> base.Found:
    del context
    return state.found._replace(best=state.found.best._replace(x=state.x_defended))


_METHOD = driver.Method(_init, _step, _finish)
