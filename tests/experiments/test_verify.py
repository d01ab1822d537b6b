"""Networks and properties from files to answers, in the formats of VNN-COMP."""

import dataclasses
import re
import subprocess
import sys

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from experiments import verify
from rdx.bounds import Verdict
from rdx.data import vnnlib

# y = (relu(x0 + x1) - relu(x0 - x1), relu(x0 + x1)): over the box [-1, 1]^2 the first lies in [-2, 2].
TINY = {"w": [[1.0, 1.0], [1.0, -1.0]], "b": [0.0, 0.0], "v": [[1.0, 1.0], [-1.0, 0.0]]}


def build(path, weights, shape=None):
    """Writes a net of dense layers with relu between them: w, b, v, ... alternate matrices and biases."""
    arrays = {name: np.asarray(value, np.float32) for name, value in weights.items()}
    size = arrays["w"].shape[0]
    nodes, last = [helper.make_node("Flatten", ["x"], ["h"], name="flat")], "h"
    for name, array in arrays.items():
        operator, out = ("MatMul", f"m_{name}") if array.ndim == 2 else ("Add", f"a_{name}")
        nodes.append(helper.make_node(operator, [last, name], [out], name=out))
        if operator == "Add":
            nodes.append(helper.make_node("Relu", [out], [f"r_{name}"], name=f"r_{name}"))
        last = nodes[-1].output[0]
    graph = helper.make_graph(
        nodes, "net", [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape or [1, size])],
        [helper.make_tensor_value_info(last, TensorProto.FLOAT, None)],
        [numpy_helper.from_array(array, name) for name, array in arrays.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8), path)
    return path


def write(path, box, num_outputs, constraints):
    names = [f"X_{i}" for i in range(len(box))] + [f"Y_{j}" for j in range(num_outputs)]
    lines = [f"(declare-const {name} Real)" for name in names]
    lines += [f"(assert (>= X_{i} {low}))\n(assert (<= X_{i} {high}))" for i, (low, high) in enumerate(box)]
    path.write_text("\n".join([*lines, *constraints]))
    return path


def answer(tmp_path, weights, box, constraints, timeout="60", shape=None):
    net = build(tmp_path / "net.onnx", weights, shape)
    prop = write(tmp_path / "p.vnnlib", box, np.shape(list(weights.values())[-1])[-1], constraints)
    return verify.main(verify.Arguments(str(net), str(prop), timeout))


def check(tmp_path, printed):
    """Reads the printed counterexample and checks it with another evaluator, without tolerance in the box."""
    word, *rest = printed.strip().split("\n", 1)
    assert word == "sat"
    values = re.findall(r"\(([XY])_(\d+) ([^()]+)\)", rest[0])
    assert rest[0].startswith("((X_0 ")
    assert rest[0].endswith("))")
    x, y = ([float(v) for name, _, v in values if name == letter] for letter in "XY")
    assert [int(i) for _, i, _ in values] == [*range(len(x)), *range(len(y))]
    evaluator = ReferenceEvaluator(str(tmp_path / "net.onnx"))
    shape = [axis.dim_value for axis in evaluator.input_types_[0].tensor_type.shape.dim]
    (expected,) = evaluator.run(None, {"x": np.asarray(x, np.float32).reshape(shape)})
    # The evaluator computes in float32 from inputs rounded to it.
    np.testing.assert_allclose(y, expected.reshape(-1), rtol=1e-5, atol=1e-5)
    prop = vnnlib.read(tmp_path / "p.vnnlib")
    assert any(
        (case.lower <= x).all() and (x <= case.upper).all()
        and any((unsafe.matrix @ np.asarray(y) <= unsafe.bound).all() for unsafe in case.unsafe)
        for case in prop.cases
    )
    return np.asarray(x), np.asarray(y)


BOX = ((-1, 1), (-1, 1))


@pytest.mark.parametrize(("constraints", "word"), [
    (["(assert (>= Y_0 2.01))"], "unsat"),
    (["(assert (>= Y_0 1.99))"], "sat"),
    (["(assert (<= Y_0 -2.01))"], "unsat"),
    (["(assert (<= Y_0 -1.99))"], "sat"),
    # Both rows together: the second output is 0 or more wherever the first is, and at most 2.
    (["(assert (>= Y_0 1.5))", "(assert (<= Y_1 1.25))"], "unsat"),
    (["(assert (>= Y_0 1.5))", "(assert (<= Y_1 1.75))"], "sat"),
    (["(assert (or (and (>= Y_0 1.5) (<= Y_1 1.25)) (<= Y_1 -0.01)))"], "unsat"),
    (["(assert (or (and (>= Y_0 1.5) (<= Y_1 1.25)) (and (>= Y_1 1.9) (>= (- Y_1 Y_0) 0.01))))"], "sat"),
])
def test_answers(constraints, word, tmp_path, capsys):
    found = answer(tmp_path, TINY, BOX, constraints)
    assert found.word == word
    printed = capsys.readouterr().out
    if word == "sat":
        check(tmp_path, printed)
    else:
        assert printed == f"{word}\n"


def test_several_boxes(tmp_path, capsys):
    """The first box is safe and the second is not; the answer is found in the second."""
    boxes = "(assert (or (and (>= X_0 -1) (<= X_0 0)) (and (>= X_0 0.5) (<= X_0 1))))"
    box = ((-5, 5), (-1, 1))
    assert answer(tmp_path, TINY, box, [boxes, "(assert (>= Y_0 1.5))"]).word == "sat"
    x, _ = check(tmp_path, capsys.readouterr().out)
    assert 0.5 <= x[0] <= 1.0
    assert answer(tmp_path, TINY, box, [boxes, "(assert (>= Y_0 2.1))"]).word == "unsat"


def test_a_counterexample_at_the_edge_lies_in_the_box_as_it_is_written(tmp_path, capsys):
    """Only the corner is unsafe; neither 0.1 nor 0.7 is a number of float32, which would be 0.1 + 1.5e-9."""
    assert float(np.float32(0.1)) > 0.1
    box = ((0.1, 0.1), (0.0, 0.7))
    assert answer(tmp_path, TINY, box, ["(assert (>= Y_1 0.7999999))"]).word == "sat"
    x, _ = check(tmp_path, capsys.readouterr().out)
    assert x[0] == 0.1
    assert 0.6999 < x[1] <= 0.7
    assert x[1] == np.float32(x[1])  # what a checker in float32 computes with


def test_what_touches_within_rounding_is_not_decided_wrongly(tmp_path):
    """The outputs reach 2 and no more: at 2 the answer is sat, a float64 step above it is never sat."""
    assert answer(tmp_path, TINY, BOX, ["(assert (>= Y_0 2.0))"]).word == "sat"
    above = float(np.nextafter(2.0, 3.0))
    found = answer(tmp_path, TINY, BOX, [f"(assert (>= Y_0 {above!r}))"], timeout="5")
    assert found.word in ("unknown", "timeout")


def test_a_point_that_only_rounding_makes_unsafe_is_not_believed(tmp_path):
    """In float32 the tiny weight vanishes beside the large one."""
    weights = {"w": [[1.0, 1.0]], "b": [16777216.0, 0.5], "v": [[1.0], [1.0]]}
    found = answer(tmp_path, weights, ((0.0, 0.0),), ["(assert (<= Y_0 16777216.25))"], timeout="5")
    assert found.word == "unknown"


def test_a_counterexample_that_float64_refuses_is_not_printed(tmp_path, monkeypatch):
    def decide(fn, region, **options):
        return verify.bounds.Verification(Verdict.FALSIFIED, "", False, 0.0, 0, region.center, None)

    monkeypatch.setattr(verify.bounds, "verify", decide)
    above = float(np.nextafter(0.0, 1.0))  # the outputs are 0 in the middle of the box
    assert answer(tmp_path, TINY, BOX, [f"(assert (>= Y_0 {above!r}))"]).word == "unknown"
    assert answer(tmp_path, TINY, BOX, ["(assert (>= Y_0 0.0))"]).word == "sat"


def test_images_are_split_by_neurons(tmp_path, capsys, monkeypatch):
    rng = np.random.default_rng(0)
    weights = {
        "w": rng.normal(size=(16, 6)) / 4, "b": rng.normal(size=6) / 4, "v": rng.normal(size=(6, 5)) / 2,
        "c": rng.normal(size=5) / 4, "u": rng.normal(size=(5, 3)),
    }
    splits = []
    real = verify.bounds.verify

    def spy(*args, **options):
        splits.append(options["split"])
        return real(*args, **options)

    monkeypatch.setattr(verify.bounds, "verify", spy)
    box = [(low, low + 0.2) for low in rng.uniform(size=16).round(3).tolist()]
    shape = [1, 1, 4, 4]
    net = ReferenceEvaluator(str(build(tmp_path / "net.onnx", weights, shape)))
    points = rng.uniform(*np.transpose(box), size=(2000, 16)).astype(np.float32)
    outputs = np.concatenate([net.run(None, {"x": x.reshape(shape)})[0] for x in points])
    reached = float(outputs[:, 0].max())
    assert answer(tmp_path, weights, box, [f"(assert (>= Y_0 {reached - 1e-3}))"], shape=shape).word == "sat"
    check(tmp_path, capsys.readouterr().out)
    spread = float(outputs[:, 0].max() - outputs[:, 0].min())
    assert answer(tmp_path, weights, box, [f"(assert (>= Y_0 {reached + spread}))"], shape=shape).word == "unsat"
    assert splits == ["relu", "relu"]


def test_timeout(tmp_path, capsys):
    """The search looks at the clock before it bounds anything; the attack comes first and finds nothing."""
    assert answer(tmp_path, TINY, BOX, ["(assert (>= Y_0 2.0001))"], timeout="0").word == "timeout"
    assert capsys.readouterr().out == "timeout\n"


@pytest.mark.parametrize(("verdicts", "word"), [
    (("certified", "certified"), "unsat"), (("unknown", "certified"), "unknown"), (("certified", "timeout"), "timeout"),
    (("timeout", "unknown"), "timeout"), (("unknown", "falsified"), "sat"), (("timeout", "falsified"), "sat"),
])
def test_answers_of_several_cases_are_put_together(verdicts, word, tmp_path, monkeypatch):
    found = iter(verdicts)
    shares = []

    def decide(fn, region, *, timeout_s, **options):
        shares.append(timeout_s)
        name = next(found)
        verdict = Verdict.UNKNOWN if name == "timeout" else Verdict(name)
        x = region.upper if name == "falsified" else None
        return verify.bounds.Verification(verdict, "", name == "timeout", 0.0, 0, x, None)

    monkeypatch.setattr(verify.bounds, "verify", decide)
    boxes = "(assert (or (and (>= X_0 -1) (<= X_0 0)) (and (>= X_0 0.5) (<= X_0 1))))"
    found_word = answer(tmp_path, TINY, ((-5, 5), (1, 1)), [boxes, "(assert (>= Y_0 1.5))"], timeout="100").word
    assert found_word == word
    assert 45.0 < shares[0] <= 50.0  # half, and what the first leaves over is for the second
    assert 90.0 < shares[1] <= 100.0


def test_files_that_do_not_belong_together(tmp_path):
    with pytest.raises(ValueError, match=r"the property \(3, 2\): do the files belong"):
        answer(tmp_path, TINY, (*BOX, (0, 1)), ["(assert (>= Y_0 2.0))"])
    with pytest.raises(SystemExit, match="--onnx net"):
        verify.main(dataclasses.replace(verify.Arguments(), onnx="net.onnx"))


def test_the_command_line(tmp_path):
    net = build(tmp_path / "net.onnx", TINY)
    prop = write(tmp_path / "p.vnnlib", BOX, 2, ["(assert (>= Y_0 1.99))"])
    words = ["--onnx", str(net), "--vnnlib", str(prop), "--timeout", "60"]
    run = subprocess.run(
        [sys.executable, "-m", "experiments.verify", *words], capture_output=True, text=True, check=True
    )
    check(tmp_path, run.stdout)
