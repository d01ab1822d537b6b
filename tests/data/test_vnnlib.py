"""Properties in VNN-LIB form: those of ACAS Xu and of robustness, disjunctions of boxes, and what cannot be read."""

import gzip
import itertools

import numpy as np
import pytest

from rdx.data import vnnlib
from rdx.data.vnnlib import VnnlibError

# The input boxes of ACAS Xu, scaled (Katz et al. 2017, arXiv:1702.01135, Appendix), and what is unsafe in each.
BOX_1 = ((0.6, 0.6798577687), (-0.5, 0.5), (-0.5, 0.5), (0.45, 0.5), (-0.5, -0.45))
BOX_3 = ((-0.3035311561, -0.2985528119), (-0.0095492966, 0.0095492966), (0.4933803236, 0.5), (0.3, 0.5), (0.3, 0.5))
ACAS = {
    "prop_1": (BOX_1, "(assert (>= Y_0 3.991125645861615))", [([[-1, 0, 0, 0, 0]], [-3.991125645861615])]),
    "prop_2": (BOX_1, "\n".join(f"(assert (<= Y_{j} Y_0))" for j in range(1, 5)),
               [([[-1.0 * (i == 0) + (i == j) for i in range(5)] for j in range(1, 5)], [0, 0, 0, 0])]),
    "prop_3": (BOX_3, "\n".join(f"(assert (<= Y_0 Y_{j}))" for j in range(1, 5)),
               [([[1.0 * (i == 0) - (i == j) for i in range(5)] for j in range(1, 5)], [0, 0, 0, 0])]),
    # Another advisory than the wanted one is least.
    "prop_5": (BOX_3, "(assert (or " + "\n  ".join(f"(and (<= Y_{j} Y_4))" for j in range(4)) + "))",
               [([[1.0 * (i == j) - (i == 4) for i in range(5)]], [0]) for j in range(4)]),
    "prop_7": (BOX_3, "(assert (or\n" + "\n".join(
        "  (and " + " ".join(f"(<= Y_{k} Y_{j})" for j in range(3)) + ")" for k in (3, 4)) + "))",
        [([[1.0 * (i == k) - (i == j) for i in range(5)] for j in range(3)], [0, 0, 0]) for k in (3, 4)]),
}


def declared(num_inputs, num_outputs):
    names = [f"X_{i}" for i in range(num_inputs)] + [f"Y_{j}" for j in range(num_outputs)]
    return "".join(f"(declare-const {name} Real)\n" for name in names)


def boxed(box):
    return "".join(f"(assert (<= X_{i} {high}))\n(assert (>= X_{i} {low}))\n" for i, (low, high) in enumerate(box))


HEAD = declared(2, 2) + boxed(((0, 1), (-1, 2)))


def equal(found, expected):
    assert len(found) == len(expected)
    for unsafe, (matrix, bound) in zip(found, expected, strict=True):
        np.testing.assert_array_equal(unsafe.matrix, np.asarray(matrix, float))
        np.testing.assert_array_equal(unsafe.bound, np.asarray(bound, float))


@pytest.mark.parametrize("name", ACAS)
def test_properties_of_acas_xu(name):
    box, constraints, expected = ACAS[name]
    found = vnnlib.parse(f"; ACAS Xu {name}\n\n{declared(5, 5)}\n; inputs\n{boxed(box)}\n; unsafe\n{constraints}\n")
    assert (found.num_inputs, found.num_outputs) == (5, 5)
    (case,) = found.cases
    # As text has them, to the last bit.
    np.testing.assert_array_equal(case.lower, [low for low, _ in box])
    np.testing.assert_array_equal(case.upper, [high for _, high in box])
    assert case.lower.dtype == case.upper.dtype == np.float64
    equal(case.unsafe, expected)


def test_a_disjunction_of_boxes():
    """As ACAS Xu's prop_6: two boxes, and over either of them another advisory than the first is least."""
    boxes = (((-0.1, 0.7), (0.1, 0.5)), ((-0.1, 0.7), (-0.5, -0.1)))
    either = " ".join(
        "(and " + " ".join(f"(>= X_{i} {low}) (<= X_{i} {high})" for i, (low, high) in enumerate(box)) + ")"
        for box in boxes
    )
    found = vnnlib.parse(declared(2, 3) + f"(assert (or {either}))\n(assert (or (<= Y_1 Y_0) (<= Y_2 Y_0)))")
    assert len(found.cases) == 2
    for case, box in zip(found.cases, boxes, strict=True):
        np.testing.assert_array_equal(np.stack([case.lower, case.upper], axis=1), box)
        equal(case.unsafe, [([[-1, 1, 0]], [0]), ([[-1, 0, 1]], [0])])


def test_boxes_with_their_own_outputs():
    """One `or` of conjunctions over inputs and outputs; equal boxes become one case, and shared bounds cut them."""
    found = vnnlib.parse(declared(1, 2) + """
    (assert (<= X_0 5.0))
    (assert (or
      (and (>= X_0 0.0) (<= X_0 1.0) (<= Y_0 Y_1))
      (and (>= X_0 2.0) (<= X_0 9.0) (>= Y_0 7.0))
      (and (>= X_0 0.0) (<= X_0 1.0) (>= Y_1 4.0))))
    """)
    assert [(case.lower[0], case.upper[0]) for case in found.cases] == [(0.0, 1.0), (2.0, 5.0)]
    equal(found.cases[0].unsafe, [([[1, -1]], [0]), ([[0, -1]], [-4])])
    equal(found.cases[1].unsafe, [([[-1, 0]], [-7])])


def test_robustness_of_a_classifier():
    """The form of the image benchmarks: a box in pixels, and `or` over the other classes."""
    pixels = np.random.default_rng(0).uniform(size=(784, 2)).astype(np.float32)
    box = [(min(row), max(row)) for row in pixels.tolist()]
    text = declared(784, 10) + boxed(box) + "(assert (or " + " ".join(
        f"(and (>= Y_{j} Y_3))" for j in range(10) if j != 3) + "))"
    (case,) = vnnlib.parse(text).cases
    np.testing.assert_array_equal(np.stack([case.lower, case.upper], axis=1), box)
    equal(case.unsafe, [([np.eye(10)[3] - np.eye(10)[j]], [0]) for j in range(10) if j != 3])


@pytest.mark.parametrize(("constraint", "matrix", "bound"), [
    ("(<= (+ Y_0 Y_1) 3)", [[1, 1]], [3]),
    ("(>= (- Y_0 Y_1 0.5) -2.5e-1)", [[-1, 1]], [-0.25]),
    ("(<= (- Y_0) (- 3.0))", [[-1, 0]], [-3]),
    ("(<= (+ (* 2.0 Y_0) (* Y_1 -3 0.5) 1) (* 2 (+ Y_1 1)))", [[2, -3.5]], [1]),
    ("(<= Y_0 (+ Y_0 (- Y_1 1.0)))", [[0, -1]], [-1]),
    ("(and (<= Y_0 .5) (and (>= Y_1 +1.)))", [[1, 0], [0, -1]], [0.5, -1]),
])
def test_linear_terms(constraint, matrix, bound):
    (case,) = vnnlib.parse(f"{HEAD}(assert {constraint})").cases
    equal(case.unsafe, [(matrix, bound)])


def test_bounds_of_inputs_may_be_scaled_and_repeated():
    (case,) = vnnlib.parse(declared(1, 1) + """(assert (and (<= (* -2 X_0) 1) (>= 3.0 X_0)))
    (assert (<= X_0 (+ 0.25 0.5))) (assert (<= Y_0 0))""").cases
    assert (case.lower[0], case.upper[0]) == (-0.5, 0.75)


def _holds(formula, y):
    """Evaluates a formula, given as nested tuples, at a point."""
    head, *parts = formula
    if head in ("and", "or"):
        return (all if head == "and" else any)(_holds(part, y) for part in parts)
    name, bound = parts
    value = y[int(name[2:])]
    return value <= bound if head == "<=" else value >= bound


def _text(formula):
    return f"({' '.join(_text(part) if isinstance(part, tuple) else str(part) for part in formula)})"


def test_nested_formulas_mean_the_same_in_normal_form():
    rng = np.random.default_rng(1)

    def draw(depth):
        if depth == 0:
            return (rng.choice(["<=", ">="]).item(), f"Y_{rng.integers(2)}", int(rng.integers(3)))
        return (rng.choice(["and", "or"]).item(), *(draw(depth - 1) for _ in range(rng.integers(1, 4))))

    for _ in range(30):
        formulas = [draw(3), draw(1)]
        text = HEAD + "".join(f"(assert {_text(formula)})\n" for formula in formulas)
        (case,) = vnnlib.parse(text).cases
        for y in itertools.product(np.arange(-0.5, 3.0, 0.5), repeat=2):
            is_unsafe = any((unsafe.matrix @ np.asarray(y) <= unsafe.bound).all() for unsafe in case.unsafe)
            assert is_unsafe == all(_holds(formula, y) for formula in formulas)


def test_files(tmp_path):
    text = HEAD + "(assert (<= Y_0 Y_1))"
    (tmp_path / "p.vnnlib").write_text(text)
    (tmp_path / "p.vnnlib.gz").write_bytes(gzip.compress(text.encode()))
    for name in ("p.vnnlib", "p.vnnlib.gz"):
        (case,) = vnnlib.read(tmp_path / name).cases
        equal(case.unsafe, [([[1, -1]], [0])])


@pytest.mark.parametrize(("text", "line", "words"), [
    (declared(1, 1) + "(assert (<= X_0 1))\n(assert (<= Y_0 1))", 1, r"X_0 is unbounded: assert \(>= X_0 ...\)"),
    (declared(1, 1) + "(assert (>= X_0 1))\n(assert (<= Y_0 1))", 1, r"X_0 is unbounded: assert \(<= X_0 ...\)"),
    (HEAD + "(assert (<= X_0 Y_0))", 9, "relates inputs with outputs"),
    (HEAD + "(assert (or (<= Y_0 1)\n(<= X_0 Y_0)))", 10, "relates inputs with outputs"),
    (HEAD + "(assert (<= (+ X_0 X_1) 1))", 9, "several inputs: only boxes"),
    (HEAD + "(assert (<=\n(* Y_0 Y_1) 1))", 10, "not linear"),
    (HEAD + "(assert (<= (/ Y_0 2) 1))", 9, "'/' is no operator"),
    (HEAD + "(assert (<= Y_0 Y_2))", 9, "'Y_2' is not declared"),
    (HEAD + "(assert (<= Y_0 nan))", 9, "'nan' is not declared"),
    (HEAD + "(assert (<= Y_0 inf))", 9, "'inf' is not declared"),
    (HEAD + "(assert (< Y_0 1))", 9, "'<' is no formula: use"),
    (HEAD + "(assert (not (<= Y_0 1)))", 9, "'not' is no formula"),
    (HEAD + "(assert (<= Y_0 1 2))", 9, "'<=' is no formula"),
    (HEAD + "(assert (or))", 9, "'or' is no formula"),
    (HEAD + "(assert (or Y_0 (<= Y_0 1)))", 9, "'Y_0' is no formula"),
    (HEAD + "(assert (<= 0 1))", 9, "compares constants"),
    (HEAD + "(assert (<= Y_0 Y_0))", 9, "compares constants"),
    (HEAD, 8, "nothing is asserted of the outputs"),
    (HEAD + "(assert (<= X_0 -3))\n(assert (<= Y_0 1))", 9, r"X_0 would lie in \[0.0, -3.0\], which is empty"),
    (HEAD + "(assert (<= Y_0 1)", 9, r"never closed: add a \)"),
    (HEAD + "(assert (<= Y_0 1)))", 9, r"this \) closes nothing"),
    (HEAD + "; comment (\n\nassert", 11, "'assert' stands outside"),
    (HEAD + "(check-sat)", 9, "only .* are read"),
    (HEAD + "(assert Y_0)", 9, "only .* are read"),
    (HEAD + "(declare-const Y_1 Real)", 9, "declare each constant once"),
    (HEAD + "(declare-const Z_1 Real)", 9, "declare each constant once"),
    (HEAD + "(declare-const Y_2 Int)", 9, "declare each constant once"),
    (HEAD + "(declare-const Y_3 Real)", 9, "Y_2 is not declared: number the variables"),
    (declared(1, 0) + "(assert (<= X_0 1))", 1, "Y_0 is not declared"),
])
def test_errors_name_line_and_cure(text, line, words):
    with pytest.raises(VnnlibError, match=f"^Line {line}: .*{words}"):
        vnnlib.parse(text)


def test_too_many_disjuncts_are_an_error():
    choices = "(assert (or (<= Y_0 0) (<= Y_1 0)))\n" * 20
    with pytest.raises(VnnlibError, match="a choice of 1048576 conjunctions: split"):
        vnnlib.parse(HEAD + choices)
