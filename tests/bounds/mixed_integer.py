"""The least output of a small piecewise-linear net as a mixed-integer program; shares no code with the library.

A neuron `r = relu(z)` with `l <= z <= u` is `r >= 0, r >= z, r <= z - l (1 - a), r <= u a` with `a` in {0, 1} (Tjeng et
al. 2019, arXiv:1711.07356). Bounds `l, u` come from interval arithmetic.
"""

import numpy as np
import scipy.optimize


class Encoding:
    """Variables and constraints; the input's box comes first."""

    def __init__(self, lower, upper):
        self.lower, self.upper = [np.ravel(end).astype(float).tolist() for end in (lower, upper)]
        self.is_integer = [0] * len(self.lower)
        self.constraints = []  # (coefficients by variable, limit): at most the limit
        self.x = Affine(self, np.eye(len(self.lower)), np.zeros(len(self.lower)))

    def relu(self, z):
        rows = np.pad(z.rows, ((0, 0), (0, len(self.lower) - z.rows.shape[1])))
        lower, upper = (
            z.offset + np.maximum(rows, 0.0) @ first + np.minimum(rows, 0.0) @ second
            for first, second in ((self.lower, self.upper), (self.upper, self.lower))
        )
        start, num = len(self.lower), len(rows)
        self.lower += [0.0] * num + [float(end > 0.0) for end in lower]
        self.upper += [max(end, 0.0) for end in upper] + [float(end > 0.0) for end in upper]
        self.is_integer += [0] * num + [1] * num
        for j, row in enumerate(rows):
            given = dict(enumerate(row))
            value, phase = start + j, start + num + j
            self.constraints.append(({**given, value: -1.0}, -z.offset[j]))
            negative = {i: -c for i, c in given.items()}
            self.constraints.append(({**negative, value: 1.0, phase: -lower[j]}, z.offset[j] - lower[j]))
            self.constraints.append(({value: 1.0, phase: -max(upper[j], 0.0)}, 0.0))
        return Affine(self, np.eye(num, start + num, start), np.zeros(num))

    def minimum(self, z, index):
        matrix = np.zeros((len(self.constraints), len(self.lower)))
        for row, (coefficients, _) in zip(matrix, self.constraints, strict=True):
            row[list(coefficients)] = list(coefficients.values())
        limits = scipy.optimize.LinearConstraint(matrix, ub=[limit for _, limit in self.constraints])
        cost = np.pad(z.rows[index], (0, len(self.lower) - z.rows.shape[1]))
        found = scipy.optimize.milp(
            cost, constraints=limits, integrality=self.is_integer,
            bounds=scipy.optimize.Bounds(self.lower, self.upper), options={"mip_rel_gap": 1e-9},
        )
        assert found.success, found.message
        return found.fun + z.offset[index]


class Affine:
    """Affine functions of an encoding's variables, one per row; those that are younger have coefficient 0."""

    def __init__(self, encoding, rows, offset):
        self.encoding, self.rows, self.offset = encoding, rows, offset

    def dense(self, kernel, bias):
        kernel, bias = np.asarray(kernel, float), np.asarray(bias, float)
        return Affine(self.encoding, kernel.T @ self.rows, self.offset @ kernel + bias)

    def __add__(self, other):
        size = max(self.rows.shape[1], other.rows.shape[1])
        first, second = (np.pad(part.rows, ((0, 0), (0, size - part.rows.shape[1]))) for part in (self, other))
        return Affine(self.encoding, first + second, self.offset + other.offset)

    def __mul__(self, factor):
        return Affine(self.encoding, self.rows * factor, self.offset * factor)

    def relu(self):
        return self.encoding.relu(self)
