"""ONNX networks: every operator against the reference evaluator of the package onnx, and bounds of what was read."""

import dataclasses
import gzip
import sys

import jax
import jax.numpy as jnp
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator
from onnx_cases import CASES, IMAGE, NORM, VECTOR, Case, build, node, numbers, one, option

from rdx import bounds, models
from rdx.balls import Ball
from rdx.models.onnx_node import UnsupportedOperatorError
from rdx.models.onnx_ops import OPERATORS

# Both sides compute in float32, in another order: a few units in the last place of sums of at most 50 terms near 10.
TOLERANCE = {"rtol": 1e-5, "atol": 2e-5}


def _reference(x, case, path):
    """Evaluates one example at a time, as the file has it."""
    case = case.same_as or case
    evaluator = ReferenceEvaluator(build(case, path / "reference.onnx"))
    rows = [row if case.batch is None else row[None] for row in np.asarray(x)]
    return np.stack([np.asarray(evaluator.run(None, {"x": row})[0]).reshape(-1) for row in rows])


def _inputs(case, batch):
    return jnp.asarray(numbers(batch, *case.shape, seed=7))


@pytest.mark.parametrize("name", CASES)
def test_operators_agree_with_the_reference(name, tmp_path):
    case = CASES[name]
    build(case, tmp_path / "net.onnx")
    network = models.onnx.read(tmp_path / "net.onnx")
    assert network.input_shape == case.shape
    assert network.logits_fn.args[0].keeps_batch == case.keeps_batch
    for batch in (1, 3):
        x = _inputs(case, batch)
        expected = _reference(x, case, tmp_path)
        assert np.abs(expected).max() > 1e-3  # nothing is compared with zeros
        out = jax.jit(network.logits_fn)(x)
        assert out.dtype == jnp.float32
        np.testing.assert_allclose(out, expected, **TOLERANCE)


@pytest.mark.parametrize("name", CASES)
def test_bounds_contain_samples(name, tmp_path):
    case = CASES[name]
    fn = _network(case, tmp_path)
    x = _inputs(case, 2)
    ball = Ball("linf", 0.1, low=-np.inf, high=np.inf)
    points = jnp.stack([ball.sample(jax.random.split(jax.random.key(i), 2), x) for i in range(16)])
    values = jax.vmap(fn)(points)
    for method in (bounds.ibp, bounds.crown):
        found = jax.jit(method)(fn, ball.region(x))
        slack = 1e-5 * (1.0 + jnp.abs(values).max())  # the allowance of bounds.certify
        assert bool((found.lower - slack <= values.min(axis=0)).all())
        assert bool((values.max(axis=0) <= found.upper + slack).all())
        assert bool((found.upper - found.lower < 100.0).all())


def test_every_operator_is_tested():
    used = {node.op_type for case in CASES.values() for node in case.nodes}
    assert used >= set(OPERATORS)


def _network(case, tmp_path):
    build(case, tmp_path / "net.onnx")
    return models.onnx.read(tmp_path / "net.onnx").logits_fn


def test_weights_are_leaves_and_equal_architectures_are_compiled_once(tmp_path):
    case = CASES["ACAS Xu"]
    traces = []

    @jax.jit
    def call(fn, x):
        traces.append(1)
        return fn(x)

    first = _network(case, tmp_path)
    second = _network(dataclasses.replace(case, arrays={k: 2.0 * v for k, v in case.arrays.items()}), tmp_path)
    x = _inputs(case, 2)
    assert not np.allclose(call(first, x), call(second, x))
    assert len(traces) == 1
    assert {leaf.shape for leaf in jax.tree.leaves(first)} == {value.shape for value in case.arrays.values()}


def test_everything_is_computed_in_the_dtype_of_the_input(tmp_path):
    case = CASES["constants"]
    fn = _network(case, tmp_path)
    with jax.enable_x64(True):
        out = fn(jnp.asarray(_inputs(case, 3), jnp.float64))
        assert out.dtype == jnp.float64
        np.testing.assert_allclose(out, _reference(_inputs(case, 3), case, tmp_path), **TOLERANCE)


def test_compressed_files(tmp_path):
    case = CASES["gemm"]
    build(case, tmp_path / "net.onnx")
    (tmp_path / "net.onnx.gz").write_bytes(gzip.compress((tmp_path / "net.onnx").read_bytes()))
    plain, packed = (models.onnx.read(tmp_path / name).logits_fn for name in ("net.onnx", "net.onnx.gz"))
    np.testing.assert_array_equal(plain(_inputs(case, 2)), packed(_inputs(case, 2)))


@pytest.mark.parametrize(("case", "words"), [
    (one("Erf"), r"'Erf' of node 'Erf_y' \(opset 21\)"),
    (one("Relu", domain="com.example"), "domain 'com.example'"),
    (one("Relu", opset=6), "operator set 6: convert"),
    (one("MaxPool", shape=IMAGE, kernel_shape=[2, 2], out=["p", "y"]), "'MaxPool' .* first output only"),
    (Case([node("Cast", "x", out="n", to=TensorProto.INT64), node("Cast", "n", to=TensorProto.FLOAT)]), "'Cast'"),
    (Case([node("Reshape", "x", "x")]), "'Reshape' .* constant shapes"),
    (one("BatchNormalization", "x", *NORM, shape=IMAGE, arrays=NORM, training_mode=1), "inference mode"),
    (option("Dropout", VECTOR, [np.float32(0.3), np.bool_(True)]), "inference mode"),
    (option("Gather", VECTOR, [np.int64(6)], axis=1), "index 6 of an axis of size 6"),
])
def test_what_is_not_read_is_named(case, words, tmp_path):
    build(case, tmp_path / "net.onnx")
    with pytest.raises((UnsupportedOperatorError, ValueError), match=words):
        models.onnx.read(tmp_path / "net.onnx")


def test_shapes_that_do_not_fit(tmp_path):
    fn = _network(CASES["gemm"], tmp_path)
    with pytest.raises(ValueError, match=r"\(2, 5\) do not fit the network: give \('B', 6\)"):
        fn(jnp.zeros((2, 5)))
    with pytest.raises(ValueError, match="no fixed shape"):
        _network(dataclasses.replace(CASES["Relu"], shape=("N", 3)), tmp_path)
    with pytest.raises(TypeError) as raised:
        _network(dataclasses.replace(CASES["gemm"], shape=(5,)), tmp_path)
    assert "'Gemm' of node 'Gemm_y'" in str(raised.value.__notes__)


def test_several_outputs_are_an_error(tmp_path):
    model = build(CASES["Relu"], tmp_path / "net.onnx")
    model.graph.output.append(helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 6]))
    onnx.save(model, tmp_path / "net.onnx")
    with pytest.raises(ValueError, match="1 inputs and 2 outputs"):
        models.onnx.read(tmp_path / "net.onnx")


def test_without_the_package_the_extra_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(ImportError, match=r"rdx\[vnncomp\]"):
        models.onnx.read(tmp_path / "net.onnx")


def test_agrees_with_onnxruntime(tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    for name, case in CASES.items():
        build(case, tmp_path / "net.onnx")
        x = np.asarray(_inputs(case, 1))
        found = models.onnx.read(tmp_path / "net.onnx").logits_fn(jnp.asarray(x))
        session = runtime.InferenceSession(tmp_path / "net.onnx", providers=["CPUExecutionProvider"])
        expected = session.run(None, {"x": x[0] if case.batch is None else x})[0].reshape(1, -1)
        np.testing.assert_allclose(found, expected, **TOLERANCE, err_msg=name)
