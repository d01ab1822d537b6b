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
from rdx.evaluate import attack_checks, checks, inspection, shared
from rdx.evaluate.checks import BPDA, Check, Status, check, grade
from rdx.types import Array, ArrayLike, Key, LogitsFn, RandomLogitsFn

_ORDER: tuple[Status, ...] = ("ok", "warn", "fail")
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
        return _ORDER[max((_ORDER.index(one.status) for one in self.checks), default=0)]

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
    num_queries: int = 100,
) -> Diagnosis:
    """Looks for signs that a robust accuracy would be an illusion, and names the attack to try where it finds one.

    On the first examples: what the code shows; logits, finite values, accuracy; the same output in every pass and every
    batch; gradients that are zero, NaN or no derivatives; attacks that must not be weaker than others, see
    `rdx.evaluate.attack_checks`; adversarial examples that are none; certificates that attacks contradict. It does not
    prove anything: a defence that passes may still be broken by an attack made for it.

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
        num_steps: steps of Auto-PGD.
        num_queries: queries of Square.

    Returns:
        The diagnosis, after about `2 * num_steps` gradients on six times as many inputs, `num_queries` forward passes
        and some dozens more.

    Raises:
        ValueError: on inputs, labels or a ball that do not fit.
    """
    model, x, labels = as_partial(logits_fn), jnp.asarray(x)[:num_examples], jnp.asarray(labels)[:num_examples]
    run_key, point_key, random_key, difference_key = jax.random.split(key, 4)
    found = ()
    if is_random:
        found += _random(random_key, model, x, labels, ball, num_steps)
        model = Partial(_mean_of_draws, model, jax.random.split(random_key, _NUM_FIXED))
    shared.check_inputs(model, x, np.asarray(labels), ball)
    found += (checks.code(inspection.inspect(model, x)),)
    found += checks.outputs(model, x, labels, ball.sample(jax.random.split(point_key, len(x)), x))
    if not np.isfinite(np.asarray(checks.call(model, x))).all():
        return Diagnosis(found, len(x))  # nothing can be attacked
    found += checks.repeats(model, x)
    try:
        found += (checks.gradients(model, x, labels),)
    except Exception as error:  # noqa: BLE001 - whatever differentiation raises; the attacks go on without gradients
        reason = str(error).partition("\n")[0][:200]
        found += (check("gradients", "fail", f"the model cannot be differentiated: {reason}", BPDA),)
        model = Partial(_without_gradient, model)
    found += (checks.differences(difference_key, model, x, labels, ball),)
    runs = attack_checks.run(run_key, model, x, labels, ball, num_steps=num_steps, num_queries=num_queries)
    found += attack_checks.judge(runs)
    x_adv, success = _strongest(runs)
    found += (attack_checks.validity(model, x, labels, x_adv, success, ball),)
    if certified is not None:
        broken = np.any([runs.broken[name] for name in runs.broken if name not in ("double", "unbounded")], axis=0)
        found += (attack_checks.certified_versus_attacked(jnp.asarray(certified)[:num_examples], np.asarray(broken)),)
    return Diagnosis(found, len(x))


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
    for name in ("rescaled", "margin", "square"):
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
