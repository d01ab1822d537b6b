"""Is this evaluation sound? Quick checks of a model and of the attacks on it, to be stored with the robust accuracy."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.tree_util import Partial

from rdx import goals
from rdx.attacks import Loop, adaptive, apgd, base
from rdx.balls import Ball
from rdx.compilation import as_partial
from rdx.evaluate import attack_checks, checks, extra_checks, inspection, shared
from rdx.evaluate.checks import BPDA, Check, Status, check, grade
from rdx.types import Array, ArrayLike, Key, LogitsFn, RandomLogitsFn

# Draws whose mean stands for a random model in the checks that need one function.
_NUM_FIXED = 4
_NUM_DRAWS = 32


@dataclasses.dataclass(frozen=True)
class Diagnosis:
    """What the checks found.

    Attributes:
        checks: in the order in which they were made.
        num_examples: on how many examples.
    """

    checks: tuple[Check, ...]
    num_examples: int

    @property
    def status(self) -> Status:
        """The worst status: where it is "fail", a robust accuracy says little."""
        return checks.worst(one.status for one in self.checks)

    def __getitem__(self, name: str) -> Check:
        """Finds a check by its name."""
        return next(one for one in self.checks if one.name == name)

    def summary(self) -> dict[str, Any]:
        """Gives all that was found as what JSON can hold."""
        advice = dict.fromkeys(one.try_next for one in self.checks if one.try_next)
        return {
            "status": self.status, "num_examples": self.num_examples, "try_next": list(advice),
            "checks": [dataclasses.asdict(one) for one in self.checks],
        }


def diagnose(
    key: Key, logits_fn: LogitsFn | RandomLogitsFn, x: ArrayLike, labels: ArrayLike, *, ball: Ball,
    is_random: bool = False, certified: ArrayLike | None = None, num_examples: int = 32, num_steps: int = 20,
    num_queries: int = 100, is_thorough: bool = False, substitute: LogitsFn | None = None,
    static: LogitsFn | None = None,
) -> Diagnosis:
    """Looks for signs that a robust accuracy would be an illusion, and names the attack to try where it finds one.

    On the first examples: what the code shows; logits, finite values, accuracy; the same output in every pass and every
    batch; gradients that are zero, NaN or no derivatives; a loss that jumps everywhere; attacks that must not be weaker
    than others, see `rdx.evaluate.attack_checks`; adversarial examples that are none; certificates that attacks
    contradict. What costs more or needs another model is asked for, see `rdx.evaluate.extra_checks`. It does not prove
    anything: a defence that passes may still be broken by an attack made for it.

    Source: Carlini et al. (2019, arXiv:1902.06705), Athalye et al. (2018, arXiv:1802.00420), Pintor et al. (2022,
    arXiv:2106.09947), Croce & Hein (2020, arXiv:2003.01690). Derivatives are read from the jaxpr, where the code of
    AutoAttack traces Python.

    Args:
        key: one key.
        logits_fn: `x [B, ...] -> logits [B, K]`, or with `is_random` `(keys [B], x) -> logits`.
        x: clean inputs, shape `[N, ...]`; the first `num_examples` are used.
        labels: shape `[N]`, int.
        ball: the threat model, one `eps` for all examples.
        is_random: whether the model takes keys. Then one draw is attacked and judged by fresh ones, and everything else
            looks at the mean of four fixed draws.
        certified: certificates at the same radius, shape `[N]`, bool, to be held against the attacks.
        num_examples: how many examples are looked at.
        num_steps: steps of Auto-PGD and PGD.
        num_queries: queries of Square.
        is_thorough: whether twice the steps and five restarts shall break no more: 10 times `num_steps` gradients.
        substitute: another model, `x -> logits`: what is made for it must break no more than what knows the model.
        static: the model without what it does at test time, `x -> logits`, beside which its accuracy under attack and
            its cost are put; its examples and its gradients must break no more. Its cost is measured, so that two
            diagnoses may differ there.

    Returns:
        The diagnosis, after about `2 * num_steps` gradients on six times as many inputs, `num_steps` more, and
        `num_queries` and some 150 forward passes; `2 * num_steps` gradients for a substitute, twice that for a static
        model.

    Raises:
        ValueError: on inputs, labels or a ball that do not fit.
    """
    model, x, labels = as_partial(logits_fn), jnp.asarray(x)[:num_examples], jnp.asarray(labels)[:num_examples]
    run_key, point_key, random_key, difference_key, landscape_key, extra_key = jax.random.split(key, 6)
    found = ()
    if is_random:
        found += _random(random_key, model, x, labels, ball, num_steps)
        model = Partial(_mean_of_draws, model, jax.random.split(random_key, _NUM_FIXED))
    shared.check_inputs(model, x, np.asarray(labels), ball)
    code = checks.code(inspection.inspect(model, x))
    found += (code, *checks.outputs(model, x, labels, ball.sample(jax.random.split(point_key, len(x)), x)))
    if not np.isfinite(np.asarray(checks.call(model, x))).all():
        return Diagnosis(found, len(x))  # nothing can be attacked
    smooth, model = _gradients(model, x, labels)
    found += (*checks.repeats(model, x), smooth, checks.differences(difference_key, model, x, labels, ball),
              checks.landscape(landscape_key, model, x, labels, ball))
    runs = attack_checks.run(run_key, model, x, labels, ball, num_steps=num_steps, num_queries=num_queries)
    found += attack_checks.judge(runs)
    others = (None if other is None else as_partial(other) for other in (substitute, static))
    asked = extra_checks.Asked(is_thorough, *others)
    broken, beside = extra_checks.run(extra_key, model, x, labels, ball, asked, num_steps=num_steps)
    runs = runs._replace(broken=runs.broken | broken)
    found += extra_checks.judge(runs, beside, is_masked=code.status != "ok")
    x_adv, success = _strongest(runs)
    found += (attack_checks.validity(model, x, labels, x_adv, success, ball),)
    if certified is not None:
        broken = np.any([runs.broken[name] for name in runs.broken if name not in ("double", "unbounded")], axis=0)
        found += (attack_checks.certified_versus_attacked(jnp.asarray(certified)[:num_examples], np.asarray(broken)),)
    return Diagnosis(found, len(x))


def _gradients(model: Partial, x: Array, labels: Array) -> tuple[Check, Partial]:
    """Checks gradients; a model that has none at all gets zeros, so that the attacks can go on."""
    try:
        return checks.gradients(model, x, labels), model
    except Exception as error:  # noqa: BLE001 - whatever differentiation raises
        reason = str(error).partition("\n")[0][:200]
        told = check("gradients", "fail", f"the model cannot be differentiated: {reason}", BPDA)
        return told, Partial(_without_gradient, model)


def _random(key: Key, random_fn: Partial, x: Array, labels: Array, ball: Ball, num_steps: int) -> tuple[Check, ...]:
    """Checks how random a model is, and how much of what an attack believes holds on fresh draws.

    It takes one draw at each point and stops where that is wrong, as suites of attacks do.
    """
    draw_key, attack_key, judge_key = jax.random.split(key, 3)
    single = Partial(_first, adaptive.eot(draw_key, random_fn, 1))
    found = apgd(attack_key, single, x, labels, ball=ball, num_steps=num_steps, loop=Loop(stop=True))
    rate = adaptive.stochastic_success(judge_key, random_fn, found.x_adv, labels, num_draws=_NUM_DRAWS)
    luck = float((np.asarray(found.success) & (np.asarray(rate) <= 0.5)).mean())
    randomness = checks.randomness(draw_key, random_fn, x, labels, goals.misclassify())
    return randomness, check(
        "luck", grade(luck, 0.005, 0.05),
        f"{luck:.1%} of the examples are broken on one draw but not on most of {_NUM_DRAWS} fresh ones",
        checks.EOT, luck=luck, claimed=float(found.success.mean()), confirmed=float((rate > 0.5).mean()),
    )


def _strongest(runs: attack_checks.Runs) -> tuple[Array, np.ndarray]:
    """Picks adversarial examples at the radius, where there are any, and tells where."""
    x_adv, success = runs.x_adv["cross_entropy"], runs.broken["cross_entropy"]
    for name in ("rescaled", "margin", "pgd", "square"):
        taken = ~success & runs.broken[name]
        x_adv, success = base.choose(jnp.asarray(taken), runs.x_adv[name], x_adv), success | taken
    return x_adv, success


def _mean_of_draws(random_fn: Partial, keys: Key, x: Array) -> Array:
    # The same draws for every example and point: a function that is as smooth as the model.
    return jax.vmap(lambda key: random_fn(jnp.broadcast_to(key, x.shape[:1]), x))(keys).mean(axis=0)


def _without_gradient(logits_fn: Partial, x: Array) -> Array:
    return logits_fn(lax.stop_gradient(x))


def _first(draws: Partial, x: Array) -> Array:
    return draws(x)[:, 0]
