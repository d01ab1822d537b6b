"""Properties of networks in VNN-LIB form, the text format of the verification competition VNN-COMP.

    (declare-const X_0 Real)                            ; inputs, flattened
    (declare-const Y_0 Real)                            ; outputs, flattened
    (declare-const Y_1 Real)
    (assert (>= X_0 -0.5))                              ; a box of inputs; several by `or`
    (assert (<= X_0 0.5))
    (assert (or (<= Y_0 Y_1) (>= (+ Y_0 Y_1) 3.0)))     ; the outputs that must not occur

A property holds if no input fulfils all assertions. Read are `<=` and `>=` between linear terms (`+`, `-`, `*`), and
`and` and `or` in any nesting. Numbers are those of float64 that are nearest to the text. Source: Demarchi et al. (2023,
VNN-LIB 1.0).
"""

import dataclasses
import gzip
import itertools
import math
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple, NoReturn, TypeAlias

import numpy as np

_TOKEN = re.compile(r";[^\n]*|\n|[()]|[^\s();]+")
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")
_VARIABLE = re.compile(r"([XY])_(0|[1-9]\d*)")


# Nested disjunctions multiply; no property of the competition comes near this.
_MOST_DISJUNCTS = 1_000_000


class VnnlibError(ValueError):
    """A property cannot be read; the message names line and cure."""


class UnsafeSet(NamedTuple):
    """The outputs `{y : matrix @ y <= bound}`, all rows together, which must not occur.

    Attributes:
        matrix: shape `[m, K]`, float64.
        bound: shape `[m]`, float64.
    """

    matrix: np.ndarray
    bound: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
    """A box of inputs and the outputs that must not occur over it.

    Attributes:
        lower: least value of each input, shape `[n]`, float64.
        upper: greatest value of each input, shape `[n]`, float64.
        unsafe: the forbidden outputs are the union of these sets.
    """

    lower: np.ndarray
    upper: np.ndarray
    unsafe: tuple[UnsafeSet, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Property:
    """What is to be verified: that in no case an unsafe output occurs.

    Attributes:
        num_inputs: number of inputs `n`.
        num_outputs: number of outputs `K`.
        cases: boxes with what is unsafe over them.
    """

    num_inputs: int
    num_outputs: int
    cases: tuple[Case, ...]


def read(path: str | Path) -> Property:
    """Reads a property from a .vnnlib file, or .vnnlib.gz.

    Raises:
        VnnlibError: see `parse`.
    """
    data = Path(path).read_bytes()
    return parse((gzip.decompress(data) if str(path).endswith(".gz") else data).decode())


def parse(text: str) -> Property:
    """Parses a property.

    Args:
        text: declarations and assertions.

    Returns:
        The property, one case for each box; assertions that several disjuncts share are part of each.

    Raises:
        VnnlibError: naming line and cure, on broken syntax, undeclared names, nonlinear terms, constraints that mix
            inputs and outputs or several inputs, unbounded or empty boxes, and boxes over which nothing is unsafe.
    """
    lines: dict[str, int] = {}
    assertions: list[list[_Conjunct]] = []
    for command in _expressions(text):
        match command.items:
            case ["declare-const", str(name), "Real"] if _VARIABLE.fullmatch(name) and name not in lines:
                lines[name] = command.line
            case ["declare-const", *_]:
                _fail(command.line, "declare each constant once, as (declare-const X_0 Real) or Y_0 for outputs")
            case ["assert", _List() as formula]:
                assertions.append(_disjuncts(formula, command.line, lines))
            case _:
                _fail(command.line, "only (declare-const NAME Real) and (assert FORMULA) are read")
    sizes = _size(lines, "X"), _size(lines, "Y")
    return Property(*sizes, tuple(_cases(assertions, *sizes, lines)))


class _List(NamedTuple):
    items: "list[str | _List]"
    line: int


class _Constraint(NamedTuple):
    """`sum_i coefficients[i] v_i <= bound`."""

    coefficients: dict[str, float]
    bound: float
    line: int


_Conjunct: TypeAlias = list[_Constraint]


def _fail(line: int, message: str) -> NoReturn:
    raise VnnlibError(f"Line {line}: {message}.")


def _expressions(text: str) -> Iterator[_List]:
    """Splits a text into its outermost lists."""
    line, stack = 1, [_List([], 0)]
    for match in _TOKEN.finditer(text):
        token = match.group()
        if token == "\n":
            line += 1
        elif token == "(":
            stack.append(_List([], line))
        elif token == ")":
            if len(stack) == 1:
                _fail(line, "this ) closes nothing: remove it")
            done = stack.pop()
            if len(stack) == 1:
                yield done
            else:
                stack[-1].items.append(done)
        elif token[0] != ";":
            if len(stack) == 1:
                _fail(line, f"{token!r} stands outside of any list: put it into parentheses")
            stack[-1].items.append(token)
    if len(stack) > 1:
        _fail(stack[-1].line, "this ( is never closed: add a )")


def _disjuncts(formula: "str | _List", line: int, lines: dict[str, int]) -> list[_Conjunct]:
    """Writes a formula as a disjunction of conjunctions of constraints."""
    match formula:
        case _List(["or", *parts], line) if parts:
            return [conjunct for part in parts for conjunct in _disjuncts(part, line, lines)]
        case _List(["and", *parts], line) if parts:
            return _products([_disjuncts(part, line, lines) for part in parts])
        case _List([("<=" | ">=") as relation, first, second], line):
            low, high = (first, second) if relation == "<=" else (second, first)
            difference = _added(_term(low, line, lines), _term(high, line, lines), -1.0)
            bound = -difference.pop("", 0.0)
            coefficients = {name: value for name, value in difference.items() if value}
            if not coefficients:
                _fail(line, "this compares constants: compare an input or an output with them")
            return [[_Constraint(coefficients, bound, line)]]
        case _:
            parts = formula.items if isinstance(formula, _List) else [formula]
            head = parts[0] if parts and isinstance(parts[0], str) else "()"
            _fail(line, f"{head!r} is no formula: use (<= a b), (>= a b), (and ...) and (or ...) of these")


def _products(factors: list[list[_Conjunct]]) -> list[_Conjunct]:
    """Moves `or` outwards: one conjunction for each choice of a disjunct from every factor."""
    number = math.prod(map(len, factors))
    if number > _MOST_DISJUNCTS:
        raise VnnlibError(f"The property is a choice of {number} conjunctions: split it into several properties.")
    return [list(itertools.chain(*parts)) for parts in itertools.product(*factors)]


def _term(term: "str | _List", line: int, lines: dict[str, int]) -> dict[str, float]:
    """Evaluates a linear term to coefficients, the constant under the name ""."""
    if isinstance(term, str):
        if _NUMBER.fullmatch(term):
            return {"": float(term)}
        if term not in lines:
            _fail(line, f"{term!r} is not declared: add (declare-const {term} Real) before, or write a decimal number")
        return {term: 1.0}
    operator, *operands = term.items or [""]
    if operator not in ("+", "-", "*") or not operands:
        _fail(term.line, f"{operator if isinstance(operator, str) else 'a list'!r} is no operator: use +, - and *")
    first, *rest = (_term(operand, term.line, lines) for operand in operands)
    if operator == "-" and not rest:
        return {name: -value for name, value in first.items()}
    sign = -1.0 if operator == "-" else 1.0
    for other in rest:
        first = _multiplied(first, other, term.line) if operator == "*" else _added(first, other, sign)
    return first


def _added(first: dict[str, float], second: dict[str, float], sign: float) -> dict[str, float]:
    return {**first, **{name: first.get(name, 0.0) + sign * value for name, value in second.items()}}


def _multiplied(first: dict[str, float], second: dict[str, float], line: int) -> dict[str, float]:
    factor, term = (first, second) if set(first) == {""} else (second, first)
    if set(factor) != {""}:
        _fail(line, "this product of variables is not linear: one of the factors must be a number")
    return {name: factor[""] * value for name, value in term.items()}


def _size(lines: dict[str, int], letter: str) -> int:
    """Counts the inputs or the outputs, which are numbered without gaps."""
    names = [name for name in lines if name[0] == letter]
    missing = next((name for i in range(len(names)) if (name := f"{letter}_{i}") not in lines), None)
    if missing is not None or not names:
        line = max((lines[name] for name in names), default=1)
        _fail(line, f"{missing or letter + '_0'} is not declared: number the variables {letter}_0, {letter}_1, ...")
    return len(names)


def _cases(
    assertions: list[list[_Conjunct]], num_inputs: int, num_outputs: int, lines: dict[str, int]
) -> Iterator[Case]:
    """Gathers the unsafe sets of each box."""
    # What is asserted without a choice comes first and once: with many inputs it is nearly everything.
    shared = [constraint for disjuncts in assertions if len(disjuncts) == 1 for constraint in disjuncts[0]]
    box = np.full(num_inputs, -np.inf), np.full(num_inputs, np.inf)
    _restrict(box, shared)
    shared_outputs = [constraint for constraint in shared if not _is_of_inputs(constraint)]
    found: dict[tuple[bytes, bytes], Case] = {}
    for conjunct in _products([disjuncts for disjuncts in assertions if len(disjuncts) > 1]):
        lower, upper = box[0].copy(), box[1].copy()
        _restrict((lower, upper), conjunct)
        _check_box(lower, upper, itertools.chain(shared, conjunct), lines)
        rows = [*shared_outputs, *(constraint for constraint in conjunct if not _is_of_inputs(constraint))]
        if not rows:
            line = max(constraint.line for constraint in itertools.chain(shared, conjunct))
            _fail(line, "nothing is asserted of the outputs over this box: add a constraint on Y_0, ...")
        key = lower.tobytes(), upper.tobytes()
        case = found.get(key, Case(lower, upper, ()))
        found[key] = dataclasses.replace(case, unsafe=(*case.unsafe, _unsafe_set(rows, num_outputs)))
    yield from found.values()


def _is_of_inputs(constraint: _Constraint) -> bool:
    letters = {name[0] for name in constraint.coefficients}
    if letters == {"X", "Y"}:
        _fail(constraint.line, "this relates inputs with outputs: constrain them separately")
    if letters == {"X"} and len(constraint.coefficients) > 1:
        _fail(constraint.line, "this relates several inputs: only boxes are read, (<= X_0 1.0)")
    return letters == {"X"}


def _restrict(box: tuple[np.ndarray, np.ndarray], constraints: Iterable[_Constraint]) -> None:
    lower, upper = box
    for constraint in constraints:
        if _is_of_inputs(constraint):
            ((name, coefficient),) = constraint.coefficients.items()
            place, value = int(name[2:]), constraint.bound / coefficient + 0.0  # no -0.0
            if coefficient > 0:
                upper[place] = min(upper[place], value)
            else:
                lower[place] = max(lower[place], value)


def _check_box(
    lower: np.ndarray, upper: np.ndarray, constraints: Iterable[_Constraint], lines: dict[str, int]
) -> None:
    for place in np.flatnonzero(~(np.isfinite(lower) & np.isfinite(upper))):
        side = "(<= X_{0} ...)" if np.isfinite(lower[place]) else "(>= X_{0} ...)"
        _fail(lines[f"X_{place}"], f"X_{place} is unbounded: assert {side.format(place)}")
    for place in np.flatnonzero(lower > upper):
        line = max(c.line for c in constraints if f"X_{place}" in c.coefficients)
        _fail(line, f"X_{place} would lie in [{lower[place]}, {upper[place]}], which is empty: mend its bounds")


def _unsafe_set(rows: list[_Constraint], num_outputs: int) -> UnsafeSet:
    matrix = np.zeros((len(rows), num_outputs))
    for i, row in enumerate(rows):
        for name, coefficient in row.coefficients.items():
            matrix[i, int(name[2:])] = coefficient
    return UnsafeSet(matrix, np.asarray([row.bound for row in rows]))
