"""AutoAttack: a cascade of complementary attacks without parameters to choose (Croce & Hein 2020, arXiv:2003.01690)."""

import dataclasses
import time
import zlib
from collections import OrderedDict
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rdx import goals, losses, norms
from rdx.attacks import adaptive, base, driver, resumption, signatures
from rdx.attacks.apgd import apgd
from rdx.attacks.apgd_targeted import apgd_targeted
from rdx.attacks.fab import fab, fab_targeted
from rdx.attacks.signatures import Attack
from rdx.attacks.square import square
from rdx.balls import Ball
from rdx.goals import Goal
from rdx.types import Array, ArrayLike, AttackResult, Key, LogitsFn, Norm, RandomLogitsFn


class Cascade(NamedTuple):
    """What a cascade found; `rdx.evaluate.report.cascade_table` makes a table of it.

    Attributes:
        result: the strongest inputs, and what all attacks together cost each example.
        found_by: place of the attack that found the strongest input; -1 where that is the clean one. Shape `[B]`,
            int32.
        seconds: by attack, in their order, how long it ran, with compilation; NaN under an outer transformation.
    """

    result: AttackResult
    found_by: Array
    seconds: OrderedDict[str, float]

    @property
    def broken_by(self) -> Array:
        """Place of the attack that succeeded, `[B]`: -1 where the clean input does, the number of attacks where none.

        So what stands after attack `i` is `broken_by > i`.
        """
        return jnp.where(self.result.success, self.found_by, len(self.seconds))


def suite(
    norm: Norm, *, version: Literal["standard", "plus"] = "standard", num_steps: int = 100, num_queries: int = 5000,
) -> dict[str, Attack]:
    """Lists the attacks of AutoAttack by name, in their order.

    standard: APGD-CE, APGD-T and FAB-T with nine targets, Square; for l1 five restarts of APGD-CE and five targets of
    APGD-T, both from larger radii. plus: APGD-CE, APGD-DLR and FAB with five restarts, Square, APGD-T and FAB-T.
    Targets are capped by the number of classes.

    Source: Croce & Hein (2020, arXiv:2003.01690, Sec. 5); for l1 (2021, arXiv:2103.01208, Sec. 4).

    Args:
        norm: the ball's norm.
        version: "standard" or "plus".
        num_steps: steps of the gradient-based attacks.
        num_queries: queries of Square.

    Returns:
        Attacks of the common signature, for `cascade` or `rdx.evaluate.evaluate`; each stops examples at success.

    Raises:
        ValueError: on an unknown norm or version.
    """
    norms.check(norm)
    if version not in ("standard", "plus"):
        raise ValueError(f"Unknown version {version!r}: use 'standard' or 'plus', or autoattack_rand.")
    stopping, wide = partial(_stopping, num_steps=num_steps), {"larger_radii": True} if norm == "l1" else {}
    num_targets = 5 if norm == "l1" else 9
    squares = partial(_stopping, attack=square, num_steps=num_queries, goal=goals.misclassify(losses.margin))
    targeted = {
        "apgd-t": partial(stopping, attack=apgd_targeted, num_targets=num_targets, **wide),
        "fab-t": partial(stopping, attack=fab_targeted),
    }
    num_restarts = 5 if version == "plus" or norm == "l1" else 1
    ce = partial(stopping, attack=apgd, num_restarts=num_restarts, **wide)
    if version == "standard":
        return {"apgd-ce": ce, **targeted, "square": squares}
    dlr = partial(stopping, attack=apgd, num_restarts=5, goal=goals.misclassify(losses.dlr), **wide)
    boundary = partial(stopping, attack=fab, num_restarts=5)
    return {"apgd-ce": ce, "apgd-dlr": dlr, "fab": boundary, "square": squares, **targeted}


def autoattack(
    key: Key, logits_fn: LogitsFn, x: ArrayLike, labels: ArrayLike, *, ball: Ball, index: ArrayLike | None = None,
    version: Literal["standard", "plus"] = "standard", num_steps: int = 100, num_queries: int = 5000,
    loop: driver.Loop = driver.AUTO,
) -> AttackResult:
    """Runs the attacks of `suite` one after the other, each on what still stands: an example falls if any succeeds.

    Source: Croce & Hein (2020, arXiv:2003.01690, Sec. 5). For a table by attack use `cascade(key, suite(...), ...)`.
    Where the released code differs: success is judged at the point returned, restarts and targets stop at success, and
    Square draws a window of its own for each example, which may reach the last row and column: that made one point of
    difference on an MNIST net. `partial(suite(norm)["square"], spare_last=True)` has the code's windows.

    Args:
        key: one key; every attack folds its name, example `i` folds `index[i]`.
        logits_fn: `x [B, ...] -> logits [B, K]`; for random models see `autoattack_rand`.
        x: clean inputs, shape `[B, ...]`.
        labels: shape `[B]`, int.
        ball: the threat model, of any norm.
        index: places in the data set, shape `[B]`, int; `0..B-1` by default.
        version: "standard" or "plus".
        num_steps: steps of the gradient-based attacks.
        num_queries: queries of Square.
        loop: see `cascade`.

    Returns:
        The attack's result; an example that stands to the end costs some 1,900 gradients and 6,000 forward passes.

    Raises:
        ValueError: on unusable inputs or options, or NaN logits.
    """
    attacks = suite(ball.norm, version=version, num_steps=num_steps, num_queries=num_queries)
    return cascade(key, attacks, logits_fn, x, labels, ball=ball, index=index, loop=loop).result


def autoattack_rand(
    key: Key, random_fn: RandomLogitsFn, x: ArrayLike, labels: ArrayLike, *, ball: Ball,
    index: ArrayLike | None = None, num_steps: int = 100, num_samples: int = 20, num_draws: int = 20,
    loop: driver.Loop = driver.AUTO,
) -> AttackResult:
    """Attacks a random model by APGD-CE and APGD-DLR on the expected loss, and judges by fresh draws.

    Each attack's input is given `num_draws` draws that no attack has seen. Only where clearly most of them are wrong,
    by two standard errors, is an example spared the next attack; nobody stops on the draws of the search, on some of
    which any example near the boundary succeeds by luck. Of the clean input and those found the one with the most
    wrong draws counts, and has fallen where most of as many further draws are wrong, which had no part in the choice.

    Source: Croce & Hein (2020, arXiv:2003.01690, Sec. 5, version "rand"); gradients of expectations after Athalye et
    al. (2018, arXiv:1802.00420). The released code averages gradients, but believes one draw for the loss, and one for
    success, so that long attacks succeed by luck; here the same draws give loss and gradient. For a table by attack
    use `cascade_rand`.

    Args:
        key: one key.
        random_fn: `(keys [B], x [B, ...]) -> logits [B, K]`.
        x: clean inputs, shape `[B, ...]`.
        labels: shape `[B]`, int.
        ball: the threat model, of any norm.
        index: places in the data set, shape `[B]`, int; `0..B-1` by default.
        num_steps: steps of each attack.
        num_samples: draws for each gradient.
        num_draws: fresh draws of each verdict.
        loop: see `cascade`; its `max_queries` counts passes of `num_samples` draws.

    Returns:
        The attack's result, whose loss is the share of the last draws that are wrong; passes are counted by draws.

    Raises:
        ValueError: on unusable inputs or options, NaN logits, or a loop that stops.
    """
    return cascade_rand(
        key, random_fn, x, labels, ball=ball, index=index, num_steps=num_steps, num_samples=num_samples,
        num_draws=num_draws, loop=loop,
    ).result


def cascade_rand(
    key: Key, random_fn: RandomLogitsFn, x: ArrayLike, labels: ArrayLike, *, ball: Ball,
    index: ArrayLike | None = None, num_steps: int = 100, num_samples: int = 20, num_draws: int = 20,
    loop: driver.Loop = driver.AUTO,
) -> Cascade:
    """Runs `autoattack_rand`, whose arguments and errors it has, and tells which attack broke what.

    Source: Croce & Hein (2020, arXiv:2003.01690, Sec. 5, version "rand").
    """
    if loop.stop:
        raise ValueError("Who stops at success on the draws of the search stops by luck: leave out stop=True.")
    draws_key, attack_key, choice_key, judge_key = jax.random.split(key, 4)
    search_fn = adaptive.eot(draws_key, random_fn, num_samples)
    climbed = {"apgd-ce": losses.cross_entropy, "apgd-dlr": losses.dlr}
    attacks = {
        name: partial(
            _on_other_draws, search_fn=search_fn, num_samples=num_samples, num_draws=num_draws, num_steps=num_steps,
            goal=goals.expected(goals.misclassify(loss)),
        )
        for name, loss in climbed.items()
    }
    found = cascade(
        attack_key, attacks, adaptive.eot(choice_key, random_fn, num_draws), x, labels, ball=ball,
        goal=goals.expected(goals.misclassify(_as_loss), _clearly), index=index,
        loop=dataclasses.replace(loop, stop=False),
    )
    result = found.result
    share = adaptive.stochastic_success(
        judge_key, random_fn, result.x_adv, jnp.asarray(labels), num_draws=num_draws, index=index
    )
    # The verdict on the clean input was counted as one pass, the last one not at all.
    forwards = result.forwards + (2 * num_draws - 1)
    return found._replace(result=result._replace(success=share > 0.5, loss=share, forwards=forwards))


def _as_loss(logits: Array, labels: Array) -> Array:
    return losses.is_wrong(logits, labels).astype(logits.dtype)


def _clearly(flags: Array, axis: int) -> Array:
    """Tells whether more than half of the flags are true, by two standard errors `0.5 / sqrt(n)` of their share."""
    num = flags.shape[axis]
    return flags.mean(axis=axis) > 0.5 + num**-0.5


def _on_other_draws(
    key: Key, judged_fn: LogitsFn, x: ArrayLike, labels: ArrayLike, *, search_fn: LogitsFn, num_samples: int,
    num_draws: int, **options: Any,
) -> AttackResult:
    """Searches on draws of its own, so that those by which the cascade judges stay unseen; counts passes by draws."""
    del judged_fn
    found = apgd(key, search_fn, x, labels, **options)
    # The cascade adds one pass for its verdict.
    forwards = num_samples * found.forwards + (num_draws - 1)
    return found._replace(forwards=forwards, gradients=num_samples * found.gradients)


def cascade(
    key: Key, attacks: Mapping[str, Attack], logits_fn: LogitsFn, x: ArrayLike, labels: ArrayLike, *, ball: Ball,
    goal: Goal | None = None, index: ArrayLike | None = None, loop: driver.Loop = driver.AUTO,
) -> Cascade:
    """Runs attacks one after the other, each on the examples that still stand: the pointwise worst case.

    Args:
        key: one key; every attack folds its name, so that what it finds does not depend on which others run.
        attacks: by name, weakest first, each `(key, logits_fn, x, labels, *, ball, index, loop) -> AttackResult`, of
            which it need not take `key`, `index` and `loop`. Settings that differ from example to example cannot be
            bound to an attack, but for the data of its `goal`.
        logits_fn: what they attack.
        x: clean inputs, shape `[B, ...]`.
        labels: shape `[B]`, int.
        ball: the threat model.
        goal: what counts as success, and the loss that orders what fails; `goals.misclassify()` by default. What an
            attack climbs is its own affair, by its bound `goal` or default; only a goal with data, such as targets, is
            given to those attacks to which `functools.partial` has bound none.
        index: places in the data set, shape `[B]`, int; `0..B-1` by default.
        loop: given to every attack. With a `checkpoint`, what finished attacks found is kept there, and the state of
            the one that runs beside it; see `driver.Loop`. Traces belong to single attacks.

    Returns:
        The strongest inputs, and which attack broke what. An example pays for what ran on it and for one forward pass
        after each attack, which judges.

    Raises:
        ValueError: on unusable inputs, no attacks, or a wish for a trace.
    """
    if loop.trace or not attacks:
        raise ValueError("A cascade needs at least one attack, and traces belong to a single one: run it on its own.")
    problem, found = base.begin(logits_fn, x, labels, ball, goal)
    places = jnp.arange(len(problem.labels)) if index is None else jnp.asarray(index)
    is_traced = base.is_traced((key, found))
    # By arithmetic, which keeps how an array is sharded.
    done = _Progress(found, 0 * found.forwards - 1, np.full(len(attacks), np.nan), np.int32(0))
    store = None if loop.checkpoint is None or is_traced else Path(loop.checkpoint)
    settings = (tuple(attacks.items()), loop.stop, loop.max_queries)
    fingerprint = "" if store is None else resumption.digest(settings, key, problem, places)
    if store is not None and store.exists():
        done = resumption.load(store, fingerprint, done)
    for name, attack in list(attacks.items())[int(done.num_finished):]:
        beside = None if store is None else store.with_suffix(f".{name}.npz")
        own_key = jax.random.fold_in(key, zlib.crc32(name.encode()))
        call = _Call(attack, own_key, dataclasses.replace(loop, checkpoint=beside))
        done = _advance(call, problem, done, places, is_timed=not is_traced)
        if store is not None:
            resumption.save(store, fingerprint, done)
    if store is not None:
        store.unlink(missing_ok=True)
    seconds = OrderedDict(zip(attacks, done.seconds.tolist(), strict=True))
    return Cascade(base.report(problem, done.found), done.found_by, seconds)


class _Call(NamedTuple):
    """An attack and what it is called with, whatever examples stand."""

    attack: Attack
    key: Key
    loop: driver.Loop


class _Progress(NamedTuple):
    """What the attacks that have finished found, which of them found it, and how long each took."""

    found: base.Found
    found_by: Array  # [B], int32
    seconds: np.ndarray  # [number of attacks]
    num_finished: np.int32


def _advance(call: _Call, problem: base.Problem, done: _Progress, index: Array, *, is_timed: bool) -> _Progress:
    """Runs the next attack."""
    started, place = time.perf_counter(), int(done.num_finished)
    found = _run_on_standing(call, problem, done.found, index)
    is_new = (found.best.x != done.found.best.x).reshape(len(index), -1).any(axis=1)
    found_by, seconds = jnp.where(is_new, place, done.found_by), done.seconds.copy()
    if is_timed:
        seconds[place] = time.perf_counter() - started
    return _Progress(found, found_by, seconds, np.int32(place + 1))


def _run_on_standing(call: _Call, problem: base.Problem, found: base.Found, index: Array) -> base.Found:
    """Runs one attack on the examples without success, and judges what it found by a forward pass."""
    if base.is_traced((problem, found)) or len(found.best.x.devices()) > 1:
        # Nobody can be left out of an array whose values are not known, nor without a device that would be idle: all
        # take part, those that stand count.
        return base.choose(found.best.success, found, _run_on_all(call, problem, found, index))
    standing = np.flatnonzero(~np.asarray(found.best.success))
    if not len(standing):
        return found
    if len(standing) == len(index):
        return _run_on_all(call, problem, found, index)
    rows = np.resize(standing, min(len(index), driver.size_for(len(standing))))
    call = call._replace(attack=signatures.restrict(call.attack, rows, len(index)))
    before = jax.tree.map(lambda leaf: leaf[rows], found)
    after = _run_on_all(call, base.take(problem, rows), before, index[rows])
    return jax.tree.map(
        lambda old, new: old.at[standing].set(new[: len(standing)]), found, after,
    )


def _run_on_all(call: _Call, problem: base.Problem, found: base.Found, index: Array) -> base.Found:
    attack, options = signatures.keyed(call.attack), {}
    if problem.goal.data and signatures.bound_goal(call.attack) is None:
        options["goal"] = problem.goal
    given = (call.key, problem.logits_fn, problem.x, problem.labels)
    result = attack(*given, ball=problem.ball, index=index, loop=call.loop, **options)
    seen = base.call(base.evaluate, problem, result.x_adv)
    return base.spend(found, seen, forwards=1 + result.forwards, gradients=result.gradients)


def _stopping(
    key: Key, logits_fn: LogitsFn, x: ArrayLike, labels: ArrayLike, *, attack: Attack, loop: driver.Loop = driver.AUTO,
    **options: Any,
) -> AttackResult:
    """Runs an attack whose examples stop at success, unless `loop` says otherwise."""
    loop = dataclasses.replace(loop, stop=True if loop.stop is None else loop.stop)
    return attack(key, logits_fn, x, labels, loop=loop, **options)
