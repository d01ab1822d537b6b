"""Accuracy and success rate against the radius and against the strength of any attack, from one run each.

Each example has a threshold, the least radius or number of queries at which it falls; a curve is the distribution of
the thresholds, so whoever has them can draw it at any values. Source: Dong et al. (2020, arXiv:1912.11852, Sec. 4.3).
"""

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeAlias

import numpy as np

from rdx import metrics
from rdx.attacks.signatures import Attack
from rdx.balls import Ball
from rdx.evaluate import records
from rdx.evaluate.trials import Outcome, Trials
from rdx.goals import Goal
from rdx.types import Array, ArrayLike, Key, LogitsFn

Axis: TypeAlias = Literal["eps", "queries", "steps"]


@dataclasses.dataclass(frozen=True)
class Curve:
    """How many of `N` examples fall by each value of an axis.

    Attributes:
        axis: "eps", radius in input units; "queries", forward passes and gradients together; "steps" of the attack.
        values: where the curve is drawn, shape `[P]`, increasing.
        threshold: the least value at which each example falls, 0 for those that need no attack and infinity for those
            that stand throughout, shape `[N]`.
        is_correct: whether the clean input is classified correctly, shape `[N]`, bool.
        index: place in the data set, shape `[N]`, int32.
        label: true class, shape `[N]`.
        is_targeted: whether to fall means to be classified as a chosen target.
        details: what else is known of each example, by name, first axis `N`.
    """

    axis: Axis
    values: np.ndarray
    threshold: np.ndarray
    is_correct: np.ndarray
    index: np.ndarray
    label: np.ndarray
    is_targeted: bool = False
    details: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)

    def accuracy(self) -> list[metrics.Rate]:
        """Counts, at each value, the examples that are correct and stand (targeted: are not taken for the target)."""
        return [metrics.rate(self.is_correct & (self.threshold > value)) for value in self.values]

    def success_rate(self) -> list[metrics.Rate]:
        """Counts, at each value, the examples that fall: among those correct before; targeted, among all."""
        among = np.ones_like(self.is_correct) if self.is_targeted else self.is_correct
        return [metrics.attack_success_rate(self.threshold <= value, among) for value in self.values]

    def median(self) -> float:
        """Takes the median threshold over all examples, as Dong et al. (2020) do; infinity where most stand."""
        ordered = np.sort(self.threshold)
        # Of two middle ones the lower: their mean would be infinite where only one is.
        return float(ordered[(len(ordered) - 1) // 2])


def minimal_eps(
    key: Key, logits_fn: LogitsFn, x: Array, labels: ArrayLike, *, attack: Attack, ball: Ball, goal: Goal | None = None,
    is_targeted: bool = False, num_doublings: int = 5, num_bisections: int = 10, grid: Sequence[float] = (),
    values: Sequence[float] | None = None, index: np.ndarray | None = None, batch_size: int = 500,
    on_progress: Callable[[int, int], None] | None = None,
) -> Curve:
    """Searches, example by example, for the smallest radius at which an attack of fixed radius succeeds.

    The radius starts at `ball.eps` and doubles until the attack succeeds, at most `num_doublings` times tried; all
    other runs halve the bracket between failure and success, `num_bisections` at least. Recorded is the length of the
    smallest successful perturbation, never more than the radius that it was found at.

    Success need not be monotone in the radius (FGSM oversteps), and then bisection finds some crossing. So the attack
    is run at the radii of `grid`, too; `details` says how often success is followed by failure, and the threshold is
    the smallest of all that was found.

    Source: Dong et al. (2020, arXiv:1912.11852, Sec. 4.3) and the released code. Differences: examples that succeed
    early go on halving instead of waiting; of all successes the nearest counts, not the last; FGSM is searched like
    the others (the code walks down a list and stops when all examples succeed, in vain if that is at its top).

    Args:
        key: the run's key.
        logits_fn: the model that decides about success, `x [B, ...] -> logits [B, K]`; a `Partial`.
        x: clean inputs, shape `[N, ...]`.
        labels: shape `[N]`, int.
        attack: `(key, logits_fn, x, labels, *, ball, index, goal) -> AttackResult` whose step sizes follow `ball.eps`,
            as they do by default; with or without `key` and `index`.
        ball: norm and box; its radius, a positive scalar, is where the search starts.
        goal: misclassification by default, and then the attack is given none.
        is_targeted: whether the goal is to be taken for a target; success is then counted among all examples.
        num_doublings: radii tried while an example stands.
        num_bisections: radii tried after that.
        grid: more radii, increasing.
        values: where the curve is drawn; `grid`, or 64 radii up to the largest threshold, by default.
        index: place of each example in the data set, shape `[N]`; 0..N-1 by default.
        batch_size: examples attacked together; the last batch is filled up, never dropped.
        on_progress: called with the runs done and their number.

    Returns:
        The curve over "eps". Its details: `searched` and `on_grid`, the distances found either way, infinity for none;
        `grid_success` `[N, len(grid)]`; `is_monotone`, false where a success on the grid is followed by a failure;
        `forwards` and `gradients`, spent in all.

    Raises:
        ValueError: on unusable inputs or settings, and on an attack that leaves its ball.
    """
    radii, start = np.asarray(grid, np.float64), float(np.max(ball.eps))
    if not 0 < start < np.inf or num_doublings < 1 or num_bisections < 0 or np.any(np.diff(radii, prepend=0) <= 0):
        raise ValueError(
            f"ball.eps={start}, where the search starts, num_doublings={num_doublings}, num_bisections="
            f"{num_bisections}, grid={grid}: give a positive radius, at least 1, at least 0, and increasing radii."
        )
    trials = Trials(
        key, logits_fn, x, labels, attack=attack, ball=ball, goal=goal, index=index, batch_size=batch_size
    )
    num_runs = num_doublings + num_bisections + len(radii)

    def trial(number: int, eps: np.ndarray) -> np.ndarray:
        found = trials.distances(number, eps)
        if on_progress is not None:
            on_progress(number + 1, num_runs)
        return found

    searched = _search(trial, np.full(len(trials.label), start), num_doublings, num_bisections)
    first = num_doublings + num_bisections
    lengths = np.empty((len(radii), len(trials.label)))
    for i, eps in enumerate(radii):
        lengths[i] = trial(first + i, np.full_like(searched, eps))
    hits = np.isfinite(lengths)
    details = {
        "searched": searched, "on_grid": lengths.min(axis=0, initial=np.inf), "grid_success": hits.T,
        "is_monotone": ~(hits[:-1] & ~hits[1:]).any(axis=0),
    }
    threshold = np.minimum(searched, details["on_grid"])
    spread = radii if grid else np.linspace(0.0, _largest(threshold), 64)
    return _curve(trials, "eps", threshold, values, spread, details, is_targeted=is_targeted)


def against_strength(
    key: Key, logits_fn: LogitsFn, x: Array, labels: ArrayLike, *, attack: Attack, ball: Ball, goal: Goal | None = None,
    is_targeted: bool = False, within: float | None = None, axis: Axis = "queries",
    values: Sequence[float] | None = None, index: np.ndarray | None = None, batch_size: int = 500,
) -> Curve:
    """Follows one run of an attack and notes after how many queries or steps each example falls.

    Args:
        key: the run's key.
        logits_fn: the model that decides about success; a `Partial`.
        x: clean inputs, shape `[N, ...]`.
        labels: shape `[N]`, int.
        attack: with its settings bound, among them `loop=attacks.Loop(trace=True)`; of an attack without a trace,
            such as FGSM, only the end is known.
        ball: the threat model, of one radius.
        goal: misclassification by default, and then the attack is given none.
        is_targeted: whether the goal is to be taken for a target.
        within: radius of the perturbations that count; that of the ball by default. With `ball.eps = inf`, one run of a
            minimal-norm attack gives this curve and, by `against_eps`, that over all radii.
        axis: "queries", forward passes and gradients together, or "steps".
        values: where the curve is drawn; 64 numbers, evenly on a logarithmic scale, by default.
        index: place of each example in the data set, shape `[N]`; 0..N-1 by default.
        batch_size: examples attacked together.

    Returns:
        The curve. Its details: `queries` and `steps` until each example falls, infinity for never; `distance` of the
        successful perturbation at the end, within or not, infinity for none; `forwards` and `gradients`, spent in all.

    Raises:
        ValueError: on unusable inputs or settings, and on an attack that leaves its ball.
    """
    if axis not in ("queries", "steps"):
        raise ValueError(f"Strength is not measured in {axis!r}: use 'queries' or 'steps'.")
    trials = Trials(
        key, logits_fn, x, labels, attack=attack, ball=ball, goal=goal, index=index, batch_size=batch_size
    )
    eps, counts = float(np.max(ball.eps)), float(np.max(ball.eps)) if within is None else within
    fallen = np.where(trials.is_reached, 0.0, np.full((3, len(trials.label)), np.inf))
    for taken, outcome in trials.run(0, np.full(len(trials.label), eps)):
        fallen[:, taken] = np.stack([*_until_success(outcome, counts), outcome.distance])
    details = {"queries": fallen[0], "steps": fallen[1], "distance": fallen[2]}
    most = (trials.forwards + trials.gradients).max() if axis == "queries" else _largest(details["steps"])
    spread = np.unique(np.geomspace(1, max(most, 1), 64).round())
    return _curve(trials, axis, details[axis], values, spread, details, is_targeted=is_targeted)


def against_eps(curve: Curve, *, values: Sequence[float] | None = None) -> Curve:
    """Turns what `against_strength` found of a minimal-norm attack into the curve over radii.

    Its perturbation is an attack at every radius, `A_eps(x) = x_adv` where `||x_adv - x|| <= eps`, else `x`. Source:
    Dong et al. (2020, arXiv:1912.11852, Sec. 3.2).

    Args:
        curve: from `against_strength`, run in a ball whose radius is infinite, or as large as shall be looked at.
        values: where the curve is drawn; 64 radii up to the largest distance by default.

    Returns:
        The curve over "eps".
    """
    threshold = curve.details["distance"]
    drawn = np.linspace(0.0, _largest(threshold), 64) if values is None else np.asarray(values, np.float64)
    bill = {name: curve.details[name] for name in ("forwards", "gradients")}
    return dataclasses.replace(curve, axis="eps", values=drawn, threshold=threshold, details=bill)


def worst_case(curves: Sequence[Curve]) -> Curve:
    """Lets each example fall where the first of several attacks succeeds.

    Args:
        curves: of the same examples, axis and kind of goal.

    Returns:
        Their worst case, drawn at the values of the first.

    Raises:
        ValueError: on none, or on curves that do not belong together.
    """
    if not curves:
        raise ValueError("The worst case of no attacks: give at least one curve.")
    first = curves[0]
    for other in curves[1:]:
        kinds_agree = (other.axis, other.is_targeted) == (first.axis, first.is_targeted)
        if not (kinds_agree and np.array_equal(other.index, first.index) and np.array_equal(other.label, first.label)):
            raise ValueError("A worst case is taken over curves of the same examples, axis and kind of goal.")
    least = np.min([curve.threshold for curve in curves], axis=0)
    return dataclasses.replace(first, threshold=least, details={})


def write(directory: str | os.PathLike[str], name: str, record: Mapping[str, Any], curve: Curve) -> None:
    """Writes a curve as a record: `name.npz` per example, then `name.json` with the rates and everything else.

    Args:
        directory: where to; made if absent.
        name: the record's name.
        record: configuration, data fingerprint, seed, wall time and the like.
        curve: the curve.
    """
    arrays = {name: getattr(curve, name) for name in ("threshold", "is_correct", "index", "label")}
    shown = {
        "axis": curve.axis, "is_targeted": curve.is_targeted, "median": curve.median(), "values": curve.values,
        "accuracy": curve.accuracy(), "success_rate": curve.success_rate(),
    }
    details = {f"details_{name}": value for name, value in curve.details.items()}
    records.write_arrays(directory, name, {**record, "curve": shown}, {**arrays, **details})


def read(directory: str | os.PathLike[str], name: str) -> tuple[dict[str, Any], Curve] | None:
    """Reads what `write` wrote, or None where nothing is complete."""
    found = records.read_arrays(directory, name)
    if found is None:
        return None
    record, arrays = found
    fields = {name: value for name, value in arrays.items() if not name.startswith("details_")}
    details = {name.removeprefix("details_"): arrays[name] for name in arrays.keys() - fields.keys()}
    shown = record["curve"]
    values = np.asarray(shown["values"], np.float64)
    return record, Curve(shown["axis"], values, is_targeted=shown["is_targeted"], details=details, **fields)


def _search(
    trial: Callable[[int, np.ndarray], np.ndarray], start: np.ndarray, num_doublings: int, num_bisections: int
) -> np.ndarray:
    """Finds the least distance that `trial(number, eps [N]) -> distance [N]` reports; infinity means failure."""
    lower, upper, nearest = np.zeros_like(start), start, np.full_like(start, np.inf)
    for i in range(num_doublings + num_bisections):
        is_doubling = np.isinf(nearest) & (i < num_doublings)
        eps = np.where(is_doubling, upper, 0.5 * (lower + upper))
        distance = trial(i, eps)
        success = np.isfinite(distance)
        nearest = np.minimum(nearest, distance)
        lower = np.where(success, lower, eps)
        upper = np.where(success, eps, np.where(is_doubling, 2.0 * eps, upper))
    return nearest


def _until_success(outcome: Outcome, eps: float) -> tuple[np.ndarray, np.ndarray]:
    """Finds queries and steps until the first success within `eps`, infinity where there is none."""
    successes, spent, last_step = [], [], 1
    room = 1.0001 * eps + 1e-6  # for rounding, as the ball's check has it
    falls = outcome.success & (outcome.distance <= room)
    if (seen := outcome.trace) is not None:
        # Minimal-norm attacks pass through successes that are too long.
        successes, spent = list(seen.success & (seen.distance <= room)), list(seen.forwards + seen.gradients)
        last_step = len(spent)
    # What the trace does not hold, such as the last iterate, is found at the end.
    first = np.stack([*successes, np.ones_like(outcome.success)]).argmax(axis=0)
    queries = np.take_along_axis(np.stack([*spent, outcome.spent]), first[None], axis=0)[0]
    steps = np.minimum(first + 1, last_step)
    return np.where(falls, queries, np.inf), np.where(falls, steps, np.inf)


def _largest(threshold: np.ndarray) -> float:
    return float(threshold[np.isfinite(threshold)].max(initial=0.0))


def _curve(
    trials: Trials, axis: Axis, threshold: np.ndarray, values: Sequence[float] | None, spread: np.ndarray,
    details: Mapping[str, np.ndarray], *, is_targeted: bool,
) -> Curve:
    drawn = spread if values is None else np.asarray(values, np.float64)
    bill = {"forwards": trials.forwards, "gradients": trials.gradients}
    return Curve(
        axis, drawn, threshold, trials.is_correct, trials.index, trials.label, is_targeted, {**details, **bill}
    )
