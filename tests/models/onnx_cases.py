"""ONNX networks of one operator, or of few, by name."""

import dataclasses

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

VECTOR, IMAGE = (6,), (2, 5, 6)
INT64_MAX, INT64_MIN = 2**63 - 1, -(2**63)


@dataclasses.dataclass(frozen=True)
class Case:
    """Nodes from "x" to "y"; arrays are initializers, by name."""

    nodes: list
    shape: tuple[int, ...] = VECTOR
    arrays: dict = dataclasses.field(default_factory=dict)
    opset: int = 21
    batch: int | str = 1
    keeps_batch: bool = True
    same_as: "Case | None" = None  # computes the same, for what the reference evaluator gets wrong or does not have


def numbers(*shape, seed=0, low=-1.0, high=1.0):
    return np.random.default_rng(seed).uniform(low, high, shape).astype(np.float32)


def ints(*values):
    return np.asarray(values, np.int64)


def node(operator, *inputs, out="y", **attributes):
    outputs = [out] if isinstance(out, str) else out
    inputs = inputs or (() if operator == "Constant" else ("x",))
    return helper.make_node(operator, inputs, outputs, name=f"{operator}_{outputs[0]}", **attributes)


def one(operator, *inputs, shape=VECTOR, opset=21, keeps_batch=True, arrays=None, same_as=None, **attributes):
    """A single node."""
    nodes = [node(operator, *inputs, **attributes)]
    return Case(nodes, shape, arrays or {}, opset, keeps_batch=keeps_batch, same_as=same_as)


def build(case, path):
    shape = [case.batch, *case.shape] if case.batch is not None else list(case.shape)
    graph = helper.make_graph(
        case.nodes, "net", [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.asarray(array), name) for name, array in case.arrays.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", case.opset)], ir_version=8)
    onnx.save(model, path)
    return model


def conv(operator="Conv", shape=IMAGE, weight=(4, 2, 3, 3), bias=4, opset=21, **attributes):
    arrays = {"w": numbers(*weight, seed=1), "b": numbers(bias, seed=2)}
    return one(operator, "x", "w", "b", shape=shape, arrays=arrays, opset=opset, **attributes)


def transposed(weight=(2, 4, 3, 3), **options):
    return conv("ConvTranspose", weight=weight, **options)


def with_constant(operator, array=None, **options):
    return one(operator, "x", "c", arrays={"c": numbers(6, seed=3) if array is None else array}, **options)


def option(operator, shape, inputs, **options):
    """A node whose further inputs are constants; "" leaves one out."""
    names = ["" if value is None else f"i{i}" for i, value in enumerate(inputs)]
    arrays = {name: value for name, value in zip(names, inputs, strict=True) if name}
    return one(operator, "x", *names, shape=shape, arrays=arrays, **options)


def constant(name, value):
    return node("Constant", out=name, value=numpy_helper.from_array(np.asarray(value)))


def flatten_by_shape():
    """As PyTorch exports `x.view(x.shape[0], -1)`."""
    return Case([
        node("Shape", "x", out="s"), constant("zero", np.int64(0)), node("Gather", "s", "zero", out="n", axis=0),
        constant("axes", ints(0)), node("Unsqueeze", "n", "axes", out="n1"), constant("rest", ints(-1)),
        node("Concat", "n1", "rest", out="target", axis=0), node("Reshape", "x", "target"),
    ], IMAGE, batch="N")


def expand_by_shape():
    """As PyTorch exports `c.expand(x.shape[0], -1)`, with arithmetic on shapes; integers divide towards 0."""
    return Case([
        node("Shape", "x", out="s"), node("Mul", "s", "minus", out="negative"), node("Div", "negative", "two", out="d"),
        node("Shape", "x", out="n", start=1), node("Mul", "n", "minus", out="m"), node("Div", "m", "two", out="half"),
        node("Cast", "half", out="f", to=TensorProto.FLOAT), node("Equal", "d", "d", out="same"),
        node("ConstantOfShape", "two_entries", out="ones", value=numpy_helper.from_array(np.asarray([1], np.int64))),
        node("Where", "same", "s", "ones", out="target"), node("Expand", "c", "target", out="e"),
        node("Add", "e", "f", out="g"), node("Add", "x", "g"),
    ], (3,), {"minus": np.int64(-3), "two": np.int64(2), "c": numbers(1, 3), "two_entries": ints(2)})


def softmax_of_rows(first):
    """Softmax over the last axes from `first` on, flattened."""
    return Case([
        node("Reshape", "x", "rows", out="r"), node("Softmax", "r", out="s", axis=1), node("Flatten", "s", axis=0),
    ], (3, 2, 2), {"rows": ints(1 if first == 1 else 3, -1)})


def transposed_groups():
    """A transposed convolution in two groups, as one of each half."""
    weight, bias = (conv(weight=(2, 3, 3, 3), bias=6).arrays[name] for name in ("w", "b"))
    halves = [node("ConvTranspose", f"x{i}", f"w{i}", f"b{i}", out=f"y{i}", strides=[2, 2]) for i in range(2)]
    split = node("Split", "x", out=["x0", "x1"], axis=1, num_outputs=2)
    return Case(
        [split, *halves, node("Concat", "y0", "y1", axis=1)], IMAGE,
        {"w0": weight[:1], "w1": weight[1:], "b0": bias[:3], "b1": bias[3:]},
    )


NORM = {name: numbers(2, seed=i, low=0.5) for i, name in enumerate(("scale", "bias", "mean", "var"))}
MATRIX = {"w": numbers(6, 4, seed=4), "b": numbers(4, seed=5)}
CASES = {
    **{name: one(name) for name in ("Abs", "Cos", "Exp", "Identity", "Neg", "Relu", "Sigmoid", "Sin", "Tanh")},
    "sqrt": Case([node("Exp", "x", out="e"), node("Sqrt", "e")]),
    **{name: with_constant(name) for name in ("Add", "Mul", "Sub", "Max", "Min")},
    "div": with_constant("Div", numbers(6, low=0.5)),
    "constant first": one("Sub", "c", "x", arrays={"c": numbers(1, 6)}),
    "add number": with_constant("Add", np.float32(0.5)),
    "add ranks": with_constant("Add", numbers(2, 1, 1), shape=IMAGE),
    "add itself": one("Add", "x", "x"),
    "product": Case([node("Mul", "x", "x")]),
    "division of values": Case([node("Exp", "x", out="e"), node("Div", "x", "e")]),
    **{f"pow {value}": with_constant("Pow", np.float32(value)) for value in (2, 3, 1)},
    "pow integer": with_constant("Pow", np.int64(2)), "pow in axes": with_constant("Pow", numbers(1, 1) * 0 + 4),
    "pow 1.5": Case([node("Exp", "x", out="e"), node("Pow", "e", "c")], arrays={"c": np.float32(1.5)}),
    "pow 0.5": Case([node("Exp", "x", out="e"), node("Pow", "e", "c")], arrays={"c": np.float32(0.5)}),
    "pow -1": Case([node("Exp", "x", out="e"), node("Pow", "e", "c")], arrays={"c": np.float32(-1)}),
    "pow by element": Case([node("Exp", "x", out="e"), node("Pow", "e", "c")], arrays={"c": numbers(6, low=1, high=2)}),
    "leaky relu": one("LeakyRelu", alpha=0.2), "leaky relu, default": one("LeakyRelu"),
    "clip": option("Clip", VECTOR, [np.float32(-0.2), np.float32(0.4)]),
    "clip above": option("Clip", VECTOR, [None, np.float32(0.4)]),
    "clip below": option("Clip", VECTOR, [np.float32(0.1)]),
    "clip 6": one("Clip", opset=6 + 1, min=-0.2, max=0.4),
    "softmax": one("Softmax", shape=(2, 6)), "softmax axis": one("Softmax", shape=(3, 2, 2), axis=1),
    "softmax 11": one("Softmax", shape=(3, 2, 2), opset=11, same_as=softmax_of_rows(1)),
    "softmax 11 axis": one("Softmax", shape=(3, 2, 2), opset=11, axis=2, same_as=softmax_of_rows(2)),
    "cast": Case([node("Cast", "x", out="d", to=TensorProto.DOUBLE), node("Cast", "d", to=TensorProto.FLOAT)]),
    # Layers.
    "gemm": one("Gemm", "x", "w", "b", arrays=MATRIX),
    "gemm options": one("Gemm", "x", "w", "b", arrays={**MATRIX, "w": MATRIX["w"].T}, transB=1, alpha=0.5, beta=2.0),
    "gemm bare": one("Gemm", "x", "w", arrays={"w": MATRIX["w"]}),
    "gemm transposed": Case([node("Transpose", "x", out="t"), node("Gemm", "t", "w", "b", transA=1)], arrays=MATRIX,
                            keeps_batch=False),
    "matmul": one("MatMul", "x", "w", arrays={"w": MATRIX["w"]}),
    "matmul ranks": one("MatMul", "x", "w", arrays={"w": MATRIX["w"]}, shape=(2, 3, 6)),
    "matmul left": one("MatMul", "w", "x", arrays={"w": numbers(5, 6)}, shape=(6, 2)),
    "matmul of values": Case([node("Transpose", "x", out="t", perm=[0, 2, 1]), node("MatMul", "x", "t")], (2, 3)),
    "conv": conv(), "conv bare": one("Conv", "x", "w", shape=IMAGE, arrays={"w": numbers(4, 2, 3, 3)}),
    "conv padded": conv(pads=[1, 0, 2, 1], strides=[2, 1]), "conv dilated": conv(dilations=[2, 1]),
    "conv grouped": conv(weight=(4, 1, 3, 3), group=2), "conv depthwise": conv(weight=(2, 1, 2, 2), bias=2, group=2),
    **{f"conv {pad}": conv(auto_pad=pad, strides=[2, 2], weight=(4, 2, 4, 3)) for pad in
       ("SAME_UPPER", "SAME_LOWER", "VALID")},
    "conv 1d": conv(shape=(2, 7), weight=(4, 2, 3), strides=[2]),
    "conv 3d": conv(shape=(2, 3, 4, 3), weight=(4, 2, 2, 2, 2)),
    "transposed": transposed(), "transposed strides": transposed(strides=[2, 3], pads=[1, 0, 1, 2]),
    "transposed extra": transposed(strides=[2, 2], output_padding=[1, 0], dilations=[1, 2]),
    "transposed grouped": transposed(
        weight=(2, 3, 3, 3), bias=6, group=2, strides=[2, 2], same_as=transposed_groups()
    ),
    "transposed shape": transposed(
        strides=[2, 2], output_shape=[10, 12], same_as=transposed(strides=[2, 2], pads=[1, 1, 0, 0])
    ),
    "transposed same": transposed(strides=[2, 2], auto_pad="SAME_UPPER"),
    "transposed 1d": transposed(shape=(2, 5), weight=(2, 4, 3), strides=[2]),
    "batch norm": one("BatchNormalization", "x", *NORM, shape=IMAGE, arrays=NORM, epsilon=1e-3),
    "batch norm 9": one("BatchNormalization", "x", *NORM, shape=IMAGE, arrays=NORM, opset=9, same_as=one(
        "BatchNormalization", "x", *NORM, shape=IMAGE, arrays=NORM
    )),
    "batch norm of vectors": one("BatchNormalization", "x", *NORM, shape=(2,), arrays=NORM),
    "dropout": one("Dropout"), "dropout 10": one("Dropout", opset=10, ratio=0.3),
    "dropout ratio": option("Dropout", VECTOR, [np.float32(0.3), np.bool_(False)]),
    # Pools and means.
    "max pool": one("MaxPool", shape=IMAGE, kernel_shape=[2, 3], strides=[2, 1]),
    "max pool padded": one("MaxPool", shape=IMAGE, kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1]),
    "max pool ceil": one("MaxPool", shape=IMAGE, kernel_shape=[2, 2], strides=[2, 4], ceil_mode=1),
    "max pool same": one("MaxPool", shape=IMAGE, kernel_shape=[2, 2], strides=[2, 2], auto_pad="SAME_UPPER"),
    "max pool dilated": one("MaxPool", shape=IMAGE, kernel_shape=[2, 2], dilations=[2, 3]),
    "average pool": one("AveragePool", shape=IMAGE, kernel_shape=[2, 3], strides=[2, 1]),
    "average pool padded": one("AveragePool", shape=IMAGE, kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1]),
    "average pool counted": one(
        "AveragePool", shape=IMAGE, kernel_shape=[3, 3], pads=[1, 1, 1, 1], count_include_pad=1
    ),
    "average pool ceil": one("AveragePool", shape=IMAGE, kernel_shape=[2, 2], strides=[2, 2], ceil_mode=1),
    "average pool ceil padded": one(
        "AveragePool", shape=IMAGE, kernel_shape=[3, 2], strides=[2, 4], pads=[1, 0, 1, 1], ceil_mode=1
    ),
    "average pool ceil counted": one(
        "AveragePool", shape=(2, 6, 6), kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 0, 0], ceil_mode=1,
        count_include_pad=1,
    ),
    "average pool dilated": one("AveragePool", shape=IMAGE, kernel_shape=[2, 2], dilations=[2, 3]),
    "average pool 1d": one("AveragePool", shape=(2, 6), kernel_shape=[2], strides=[2]),
    "global average pool": one("GlobalAveragePool", shape=IMAGE),
    "mean 13": one("ReduceMean", shape=IMAGE, opset=13, axes=[2, 3], keepdims=0),
    "mean": option("ReduceMean", IMAGE, [ints(-1)]),
    "mean of all": one("ReduceMean", shape=IMAGE, keepdims=0, keeps_batch=False),
    "sum 11": one("ReduceSum", shape=IMAGE, opset=11, axes=[1]),
    "sum": option("ReduceSum", IMAGE, [ints(1, -1)], keepdims=0),
    "sum of nothing": one("ReduceSum", noop_with_empty_axes=1),
    # Shapes.
    "flatten": one("Flatten", shape=IMAGE), "flatten all": one("Flatten", shape=IMAGE, axis=0, keeps_batch=False),
    "flatten back": one("Flatten", shape=IMAGE, axis=-3),
    **{f"reshape {shape}": option("Reshape", IMAGE, [ints(*shape)]) for shape in
       ((1, -1), (-1, 60), (0, 0, -1), (1, 2, 30), (0, 5, 12), (-1, 3, 4, 5))},
    "reshape fixed batch of two": option("Reshape", IMAGE, [ints(2, -1)], keeps_batch=False),
    "reshape without batch": option("Reshape", IMAGE, [ints(-1)], keeps_batch=False),
    "flatten by shape": flatten_by_shape(), "expand by shape": expand_by_shape(),
    "transpose": one("Transpose", shape=IMAGE, perm=[0, 3, 1, 2]),
    "transpose default": one("Transpose", shape=(3, 1), keeps_batch=False),
    "squeeze": option("Squeeze", (1, 3, 1), [ints(1, -1)]),
    "squeeze 11": one("Squeeze", shape=(1, 3), axes=[1], opset=11),
    "squeeze all": one("Squeeze", shape=(1, 3), keeps_batch=False),
    "unsqueeze": option("Unsqueeze", (3,), [ints(1, -1)]),
    "unsqueeze 11": one("Unsqueeze", shape=(3,), axes=[2], opset=11),
    "concat": one("Concat", "x", "x", shape=(2, 3), axis=-1),
    "concat a constant": one(
        "Concat", "x", "c", shape=(2, 3), arrays={"c": numbers(1, 2, 2)}, axis=2, keeps_batch=False
    ),
    "slice": option("Slice", IMAGE, [ints(1, -5), ints(INT64_MAX, -1), ints(2, 3), ints(1, 2)]),
    "slice backwards": option("Slice", IMAGE, [ints(-1), ints(INT64_MIN), ints(3), ints(-2)]),
    "slice 9": one("Slice", shape=IMAGE, opset=9, starts=[0, 1], ends=[1, 4], axes=[1, 2]),
    "slice all axes": option("Slice", VECTOR, [ints(0, 2), ints(1, 5)], keeps_batch=False),
    "slice batch backwards": option("Slice", VECTOR, [ints(-1), ints(INT64_MIN), ints(0), ints(-1)], keeps_batch=False),
    "gather": option("Gather", IMAGE, [np.asarray([[0, -1], [2, 2]], np.int64)], axis=2),
    "gather one": option("Gather", IMAGE, [np.int64(-2)], axis=1),
    "gather batch": option("Gather", IMAGE, [np.int64(0)], axis=0, keeps_batch=False),
    "split": Case([node("Split", "x", "s", out=["a", "b"], axis=1), node("Sub", "a", "b")], arrays={"s": ints(3, 3)}),
    "split 11": Case([node("Split", "x", out=["a", "b"], axis=1, split=[5, 1]), node("Add", "a", "b")], opset=11),
    "split even": Case([node("Split", "x", out=["a", "b", "c"], axis=1, num_outputs=3), node("Max", "a", "b", "c")]),
    "split rest": Case([node("Split", "x", out=["a", "b"], axis=1, num_outputs=2), node("Identity", "b")], (5,)),
    "pad": option("Pad", IMAGE, [ints(0, 0, 1, 2, 0, 0, 0, 1), np.float32(0.5)]),
    "pad axes": option("Pad", IMAGE, [ints(1, 2), None, ints(-1)]),
    "pad cut": option("Pad", VECTOR, [ints(0, -2, 0, 1)], same_as=Case(
        [node("Pad", "x", "p", out="z"), node("Slice", "z", "s", "e", "a")],
        arrays={"p": ints(0, 0, 0, 1), "s": ints(2), "e": ints(7), "a": ints(1)},
    )),
    "pad 9": one("Pad", shape=VECTOR, opset=9, pads=[0, 1, 0, 2], value=0.25),
    **{f"pad {mode}": option("Pad", VECTOR, [ints(0, 2, 0, 1)], mode=mode) for mode in ("reflect", "edge")},
    "expand": option("Expand", (3, 1), [ints(2, 1, 1, 4)], keeps_batch=False),
    "expand in place": option("Expand", (3, 1), [ints(1, 4)]),
    "constants": Case([
        node("Constant", out="a", value_float=0.5), node("Constant", out="b", value_floats=[1.0, 2.0, 3.0]),
        node("Constant", out="s", value_ints=[0, 3]), node("Constant", out="k", value_int=1),
        node("Gather", "x", "k", out="v", axis=1), node("Mul", "v", "a", out="w"),
        node("Unsqueeze", "w", "k1", out="u"),
        node("Add", "u", "b", out="z"), node("Reshape", "z", "s"),
    ], arrays={"k1": ints(1)}),
    # Inputs without a batch axis, and with a free one.
    "no batch": Case([node("MatMul", "x", "w")], arrays={"w": MATRIX["w"]}, batch=None, keeps_batch=False),
    "image without batch": Case([node("Flatten", "x", axis=0)], (3, 4), batch=None, keeps_batch=False),
    "free batch": Case([node("MatMul", "x", "w")], arrays={"w": MATRIX["w"]}, batch="N"),
    "ACAS Xu": Case([
        node("Sub", "x", "mean", out="c"), node("Flatten", "c", out="f"), node("MatMul", "f", "w", out="h"),
        node("Add", "h", "b", out="g"), node("Relu", "g", out="r"), node("MatMul", "r", "v"),
    ], (1, 1, 6), {"mean": numbers(1, 1, 1, 6), **MATRIX, "v": numbers(4, 5)}),
    "residual": Case([
        node("Conv", "x", "w", "b", out="c", pads=[1, 1, 1, 1]), node("BatchNormalization", "c", *NORM, out="n"),
        node("Relu", "n", out="r"), node("Add", "r", "x", out="s"), node("GlobalAveragePool", "s", out="p"),
        node("Flatten", "p", out="f"), node("Gemm", "f", "v", transB=1),
    ], IMAGE, {"w": numbers(2, 2, 3, 3), "b": numbers(2), **NORM, "v": numbers(3, 2)}),
}
