"""Verifies a network against a property, in the forms of the verification competition VNN-COMP.

    python -m experiments.verify --onnx net.onnx --vnnlib prop.vnnlib --timeout 60

It prints one word, as the competition has it (Brix et al. 2023, arXiv:2312.16760): `unsat` where no input of the
property's boxes leads to an unsafe output, `sat` and below it such an input with its output, `unknown`, or `timeout`.
Files may be compressed, .onnx.gz and .vnnlib.gz. The package onnx comes with `pip install 'rdx[vnncomp]'`.

Each box is attacked by PGD and then searched by branch and bound, over halves of the box where at most ten inputs vary
and over signs of neurons otherwise. `unsat` is about the boxes rounded outwards to float32. The input that `sat` comes
with lies in its box exactly: the numbers printed are within the bounds that were read, without any tolerance, and of
float32 wherever the box holds one; the network reaches the unsafe set there when it is computed in float64.
"""

import dataclasses
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from experiments import command_line
from rdx import attacks, bounds, models
from rdx.balls import Ball, Region
from rdx.bounds import Verdict
from rdx.data import vnnlib
from rdx.goals import Goal
from rdx.types import Array, LogitsFn

# Boxes with more inputs that vary are not worth halving.
_MOST_HALVED = 10


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Command line.

    Attributes:
        onnx: the network's file.
        vnnlib: the property's file.
        timeout: seconds for everything but the start of Python, looked at between steps.
    """

    onnx: str = ""
    vnnlib: str = ""
    timeout: str = "60"


class Answer(NamedTuple):
    """What is known of a property.

    Attributes:
        word: "unsat", "sat", "unknown" or "timeout".
        x: for "sat" the input, flattened, float64.
        y: for "sat" its output in float64, flattened.
    """

    word: str
    x: np.ndarray | None = None
    y: np.ndarray | None = None

    def __str__(self) -> str:
        """Writes the answer in the competition's format; the numbers read back as they are."""
        if self.x is None or self.y is None:
            return self.word
        named = [(f"{name}_{i}", v) for name, row in (("X", self.x), ("Y", self.y)) for i, v in enumerate(row.tolist())]
        pairs = "\n".join(f"({name} {value!r})" for name, value in named)
        return f"{self.word}\n({pairs})"


def main(arguments: Arguments) -> Answer:
    """Reads both files, prints the answer and returns it."""
    if not (arguments.onnx and arguments.vnnlib):
        raise SystemExit("Give a network and a property: --onnx net.onnx --vnnlib prop.vnnlib")
    answer = verify(Path(arguments.onnx), vnnlib.read(arguments.vnnlib), timeout_s=float(arguments.timeout))
    print(answer)
    return answer


def verify(path: Path, prop: vnnlib.Property, *, timeout_s: float) -> Answer:
    """Verifies the network in a file, case by case: each has an equal share of the time that is left.

    Raises:
        ValueError: if network and property differ in the number of inputs or outputs.
    """
    deadline = time.monotonic() + timeout_s
    network = models.onnx.read(path)
    _check_sizes(network, prop)
    words = set()
    for i, case in enumerate(prop.cases):
        share = (deadline - time.monotonic()) / (len(prop.cases) - i)
        answer = _verify_case(path, network, case, timeout_s=share)
        if answer.word == "sat":
            return answer
        words.add(answer.word)
    return Answer(next(word for word in ("timeout", "unknown", "unsat") if word in words))


def _check_sizes(network: models.onnx.Network, prop: vnnlib.Property) -> None:
    x = jax.ShapeDtypeStruct((1, *network.input_shape), jnp.float32)
    found = math.prod(network.input_shape), jax.eval_shape(network.logits_fn, x).shape[1]
    wanted = prop.num_inputs, prop.num_outputs
    if found != wanted:
        raise ValueError(f"The network has {found} inputs and outputs, the property {wanted}: do the files belong?")


def _verify_case(path: Path, network: models.onnx.Network, case: vnnlib.Case, *, timeout_s: float) -> Answer:
    sizes = [len(unsafe.bound) for unsafe in case.unsafe]
    ends = np.cumsum(sizes).tolist()
    clauses = [tuple(range(end - size, end)) for size, end in zip(sizes, ends, strict=True)]
    num_varying = int((case.lower < case.upper).sum())
    found = bounds.verify(
        _margins_fn(network.logits_fn, case), _region(case, network.input_shape), clauses=clauses,
        split="input" if num_varying <= _MOST_HALVED else "relu", attack=_attack(clauses), timeout_s=timeout_s,
    )
    if found.verdict is Verdict.CERTIFIED:
        return Answer("unsat")
    if found.verdict is Verdict.FALSIFIED:
        # What lies within a rounding of the unsafe set, or of the box, is no counterexample.
        return _confirmed(path, case, np.asarray(found.counterexample, np.float64)) or Answer("unknown")
    return Answer("timeout" if found.is_timeout else "unknown")


def _margins_fn(logits_fn: LogitsFn, case: vnnlib.Case) -> Partial:
    """Builds `x -> A y - b` for the rows of all unsafe sets: a set is avoided where one of its rows is positive."""
    matrix = np.concatenate([unsafe.matrix for unsafe in case.unsafe])
    bound = np.concatenate([unsafe.bound for unsafe in case.unsafe])
    return Partial(_margins, logits_fn, jnp.asarray(matrix, jnp.float32), jnp.asarray(bound, jnp.float32))


def _margins(logits_fn: LogitsFn, matrix: Array, bound: Array, x: Array) -> Array:
    y = logits_fn(x)
    # The terms stand beside the sums, in no clause: rounding is allowed for relative to the largest output, and sums
    # may be small where their terms are not.
    return jnp.concatenate([y @ matrix.T - bound[None], y * jnp.abs(matrix).max(axis=0)[None]], axis=1)


def _region(case: vnnlib.Case, shape: tuple[int, ...]) -> Region:
    """Makes the smallest float32 box around a case."""
    lower, upper = (end.astype(np.float32) for end in (case.lower, case.upper))
    lower = np.where(lower > case.lower, np.nextafter(lower, np.float32(-np.inf)), lower)
    upper = np.where(upper < case.upper, np.nextafter(upper, np.float32(np.inf)), upper)
    center = np.clip(lower + (upper - lower) / 2, lower, upper)
    parts = center, np.maximum(upper - center, center - lower), lower, upper
    return Region(*(jnp.asarray(part.reshape(1, *shape)) for part in parts), norm="linf")


def _attack(clauses: list[tuple[int, ...]]) -> Callable[[LogitsFn, Region], Array]:
    """Builds the attack that tries each unsafe set for itself, all at once."""
    num_rows = clauses[-1][-1] + 1
    mask = jnp.asarray([[row in clause for row in range(num_rows)] for clause in clauses])
    goal = Goal(Partial(_nearness, mask), Partial(_is_reached, mask))

    def attack(fn: LogitsFn, region: Region) -> Array:
        center = jnp.repeat(region.center, len(clauses), axis=0)
        # A ball's box has no sides of length 0; where the radius is 0, none is needed.
        is_free = region.radius > 0
        low, high = jnp.where(is_free, region.lower, -jnp.inf), jnp.where(is_free, region.upper, jnp.inf)
        ball = Ball("linf", region.radius, low=low, high=high)
        labels = jnp.arange(len(clauses))
        return attacks.pgd(jax.random.key(0), fn, center, labels, ball=ball, goal=goal, num_restarts=3).x_adv

    return attack


def _largest(mask: Array, outputs: Array, labels: Array) -> Array:
    return jnp.where(mask[labels], outputs[:, : mask.shape[1]], -jnp.inf).max(axis=1)


def _nearness(mask: Array, outputs: Array, labels: Array) -> Array:
    return -_largest(mask, outputs, labels)


def _is_reached(mask: Array, outputs: Array, labels: Array) -> Array:
    return _largest(mask, outputs, labels) <= 0.0


def _confirmed(path: Path, case: vnnlib.Case, x: np.ndarray) -> Answer | None:
    """Checks a counterexample in float64 at the very numbers that are printed, against the box as it was read."""
    narrow = _narrowed(case, x.reshape(-1))
    with jax.enable_x64(True):
        # Read again, with float64 weights as they are.
        network = models.onnx.read(path)
        with jax.default_matmul_precision("highest"):
            y = jax.jit(network.logits_fn)(jnp.asarray(narrow.reshape(1, *network.input_shape), jnp.float64))[0]
    y = np.asarray(y)
    is_inside = ((narrow >= case.lower) & (narrow <= case.upper)).all()
    is_unsafe = any((unsafe.matrix @ y <= unsafe.bound).all() for unsafe in case.unsafe)
    return Answer("sat", narrow, y) if is_inside and is_unsafe else None


def _narrowed(case: vnnlib.Case, x: np.ndarray) -> np.ndarray:
    """Moves a point into the box, to float32 numbers where there are any between the bounds."""
    lower, upper = (end.astype(np.float32) for end in (case.lower, case.upper))
    lower = np.where(lower < case.lower, np.nextafter(lower, np.float32(np.inf)), lower)
    upper = np.where(upper > case.upper, np.nextafter(upper, np.float32(-np.inf)), upper)
    nearest = np.clip(x.astype(np.float32), lower, upper).astype(np.float64)
    return np.where(lower <= upper, nearest, np.clip(x, case.lower, case.upper))


if __name__ == "__main__":
    main(command_line.parse(Arguments))
