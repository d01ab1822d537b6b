"""Elementwise functions of one value, such as `x * logistic(x)`: many operations of the user's, one of ours."""

import dataclasses
from collections.abc import Callable, Sequence

import jax.numpy as jnp

from rdx.bounds.arithmetic import RULES
from rdx.bounds.graph import ELEMENTWISE, PIECEWISE_LINEAR, Graph, Node, Op, reachable

COMPOSITE = "composite"
# How a function of one value bends, in ascending order.
_AFFINE, _KINKED, _CURVED = range(3)


def fuse(graph: Graph, has_rule: Callable[[Op], bool]) -> Graph:
    """Fuses elementwise operations of one perturbed value where a rule for each would forget that it is one value.

    Args:
        graph: a traced function.
        has_rule: whether a nonlinear operation has a relaxation of its own, which it keeps unless its inputs are
            functions of one and the same value.

    Returns:
        The graph with operations named `COMPOSITE`, whose parameter `graph` is what they stand for.
    """
    roots: dict[Node, Node] = {}
    bends: dict[Node, int] = {}
    ops = []
    for i, op in enumerate(graph.ops):
        nodes = {roots.get(node, node) for node in op.nodes}
        if len(nodes) == 1 and _is_elementwise(op):
            (root,) = nodes
            parts = [bends.get(node, _AFFINE) for node in op.nodes]
            (output,) = op.outputs
            roots[output], bends[output] = root, max(*parts, _bend(op))
            if _is_better_whole(op, parts, has_rule=op.is_affine or has_rule(op)):
                op = composite(root, graph.ops[: i + 1])
        ops.append(op)
    return dataclasses.replace(graph, ops=tuple(reachable(ops, graph.output, *graph.assumed)))


def composite(root: Node, ops: Sequence[Op]) -> Op:
    """Makes one operation of those that lead from a node to the last of them."""
    last, between, needed = ops[-1], [], set(ops[-1].outputs)
    for op in reversed(ops):
        if needed.intersection(op.outputs) and root not in op.outputs:
            between.append(op)
            needed.update(op.nodes)
    inner = Graph((root,), tuple(reversed(between)), last.outputs[0])
    return Op(COMPOSITE, lambda x: (inner.evaluate(x),), (root,), last.outputs, {"graph": inner}, last.source)


def _bend(op: Op) -> int:
    return _AFFINE if op.is_affine else _KINKED if op.name == PIECEWISE_LINEAR else _CURVED


def _is_better_whole(op: Op, parts: Sequence[int], *, has_rule: bool) -> bool:
    if not jnp.issubdtype(op.outputs[0].dtype, jnp.floating):
        return False
    if not op.is_affine:
        return len(op.nodes) > 1 or not has_rule
    # A sum of nonlinear functions. Those with kinks alone keep the slopes that relaxations of relu may choose.
    return len(parts) > 1 and min(parts) > _AFFINE and max(parts) == _CURVED


def _is_elementwise(op: Op) -> bool:
    shapes = {jnp.shape(value) for value in op.inputs if isinstance(value, Node) or jnp.shape(value)}
    return (op.name in RULES or (op.name in ELEMENTWISE and op.is_affine)) and shapes == {op.outputs[0].shape}

