"""Runs of one attack on many examples, batch by batch, judged by a fresh forward pass."""

import dataclasses
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rdx import compilation, goals
from rdx.attacks import signatures
from rdx.attacks.signatures import Attack
from rdx.balls import Ball
from rdx.evaluate import shared
from rdx.goals import Goal
from rdx.types import Array, ArrayLike, Key, LogitsFn, Trace


class Outcome(NamedTuple):
    """What one run made of one batch of `M` examples."""

    success: np.ndarray  # [M], bool
    distance: np.ndarray  # [M], float64; infinity without success
    spent: np.ndarray  # [M], forward passes and gradients
    trace: Trace | None  # of arrays [T, M]


class Trials:
    """An attack, the examples that it is run on, and what it has cost so far.

    Attributes:
        label: shape `[N]`.
        index: place in the data set, shape `[N]`, int32.
        is_correct: whether the clean input is classified correctly, shape `[N]`, bool.
        is_reached: whether it reaches the goal by itself; such examples are not attacked. Shape `[N]`, bool.
        forwards: forward passes spent by the attack, shape `[N]`.
        gradients: gradients spent by the attack, shape `[N]`.
    """

    def __init__(
        self, key: Key, logits_fn: LogitsFn, x: Array, labels: ArrayLike, *, attack: Attack, ball: Ball,
        goal: Goal | None = None, index: np.ndarray | None = None, batch_size: int = 500,
    ) -> None:
        """Checks everything and evaluates the clean inputs; the arguments are those of `curves.minimal_eps`."""
        self.label = np.asarray(labels)
        self.index = np.arange(len(self.label), dtype=np.int32) if index is None else np.asarray(index, np.int32)
        self._key, self._x, self._ball, self._goal, self._batch_size = key, x, ball, goal, batch_size
        self._logits_fn, self._attack = compilation.as_partial(logits_fn), attack
        self._name = getattr(getattr(attack, "func", attack), "__name__", "attack")
        if np.ndim(ball.eps):
            raise ValueError(f"eps has shape {np.shape(ball.eps)}: a curve has one axis, give a scalar.")
        shared.check_inputs(self._logits_fn, x, self.label, ball)
        num = len(self.label)
        self.is_correct, self.is_reached = np.zeros(num, bool), np.zeros(num, bool)
        self.forwards, self.gradients = np.zeros(num, np.int64), np.zeros(num, np.int64)
        for taken, filled in shared.walk(np.arange(num), batch_size):
            predicted = np.asarray(shared.predict_compiled(self._logits_fn, x[filled]))[: len(taken)]
            self.is_correct[taken] = predicted == self.label[taken]
            self.is_reached[taken] = self._judge(x[filled], filled)[: len(taken)]

    def run(self, number: int, eps: np.ndarray) -> Iterator[tuple[np.ndarray, Outcome]]:
        """Attacks every example that does not reach the goal by itself.

        Args:
            number: of this run; it is folded into the key.
            eps: radii, shape `[N]`.

        Returns:
            An iterator over the places of a batch's examples and what became of them.

        Raises:
            ValueError: if the attack leaves its ball.
        """
        for taken, filled in shared.walk(np.flatnonzero(~self.is_reached), self._batch_size):
            x, labels = self._x[filled], jnp.asarray(self.label[filled])
            ball = dataclasses.replace(self._ball, eps=jnp.asarray(eps[filled], x.dtype))
            options = {} if self._goal is None else {"goal": self._goal_of(filled)}
            key = jax.random.fold_in(self._key, number)
            attack = signatures.keyed(signatures.restrict(self._attack, filled, len(self.label)))
            result = attack(key, self._logits_fn, x, labels, ball=ball, index=self.index[filled], **options)
            shared.check_attacked(self._name, result.x_adv, x, ball)
            success = self._judge(result.x_adv, filled)
            distance = np.where(success, np.asarray(ball.distance(result.x_adv, x), np.float64), np.inf)
            spent, num = np.zeros(len(filled), np.int64), len(taken)
            for name in ("forwards", "gradients"):
                count = np.asarray(getattr(result, name), np.int64)
                getattr(self, name)[taken] += count[:num]
                spent += count
            trace = jax.tree.map(lambda rows, num=num: np.asarray(rows)[:, :num], result.trace)
            yield taken, Outcome(success[:num], distance[:num], spent[:num], trace)

    def distances(self, number: int, eps: np.ndarray) -> np.ndarray:
        """Attacks as `run` does; gives the lengths of successful perturbations, `[N]`, infinity where it fails.

        No length is above the radius, by which it may be surpassed by a rounding.
        """
        found = np.where(self.is_reached, 0.0, np.inf)
        for taken, outcome in self.run(number, eps):
            found[taken] = np.where(outcome.success, np.minimum(outcome.distance, eps[taken]), np.inf)
        return found

    def _judge(self, x: Array, rows: np.ndarray) -> np.ndarray:
        """Success is what a fresh forward pass at full precision says, not what the attack believes."""
        goal = goals.misclassify() if self._goal is None else self._goal_of(rows)
        return np.asarray(_reaches(goal, self._logits_fn, x, jnp.asarray(self.label[rows])))

    def _goal_of(self, rows: np.ndarray) -> Goal:
        assert self._goal is not None
        return self._goal._replace(data=jax.tree.map(lambda leaf: leaf[rows], self._goal.data))


@jax.jit
def _reaches(goal: Goal, logits_fn: LogitsFn, x: Array, labels: Array) -> Array:
    with jax.default_matmul_precision("highest"):
        return goal.success(logits_fn(x), labels)
