"""Nodes of ONNX networks: what an operator is given besides its inputs."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np

from rdx.types import Array

# A NumPy array where it is known when the network is traced.
Value: TypeAlias = Array | np.ndarray
Operator: TypeAlias = Callable[..., Value | Sequence[Value]]


class UnsupportedOperatorError(ValueError):
    """A network has an operator, or a form of one, that is not read."""


@dataclasses.dataclass(frozen=True)
class Node:
    """One application of an operator; hashable.

    Attributes:
        operator: its name, such as "Conv".
        name: the node's own name, for errors.
        inputs: names of its inputs, "" for one that is left out.
        outputs: names of its outputs.
        attributes: names and values; arrays are `Constant`s.
        opset: version of the operator set.
    """

    operator: str
    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: tuple[tuple[str, Any], ...]
    opset: int

    def get(self, attribute: str, default: Any = None) -> Any:
        """Looks up an attribute."""
        return dict(self.attributes).get(attribute, default)

    def __str__(self) -> str:
        return f"operator {self.operator!r} of node {self.name!r} (opset {self.opset})"


@dataclasses.dataclass(frozen=True)
class Constant:
    """An array as hashable data."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes

    @classmethod
    def of(cls, array: np.ndarray) -> "Constant":
        """Copies an array."""
        return cls(array.dtype.str, array.shape, array.tobytes())

    def array(self) -> np.ndarray:
        """Makes the array again."""
        return np.frombuffer(self.data, self.dtype).reshape(self.shape)
