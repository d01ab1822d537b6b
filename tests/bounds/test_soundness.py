"""A slice of the soundness campaign (scripts/soundness_campaign.py): points against bounds of random functions."""

import dataclasses

import jax
import numpy as np
import pytest
import random_functions as rf
from hypothesis import given, settings
from hypothesis import strategies as st

from rdx.bounds import Interval

NUM_POINTS = 4000


@settings(max_examples=12, deadline=None, derandomize=True, database=None)
@given(number=st.integers(0, 10 * len(rf.CASES)), variant=st.integers(0, rf.VARIANTS - 1))
def test_no_point_leaves_the_bounds(number, variant):
    seed = rf.VARIANTS * number + variant
    problem, count, verdicts = rf.study(seed, NUM_POINTS)
    assert count > 0.99 * NUM_POINTS
    for method, verdict in verdicts.items():
        told = f"seed {seed}, {problem.description}: {method} {verdict}"
        assert verdict["excess"] <= rf.ROUNDING, told
        assert verdict["is_ordered"] or not verdict["is_finite"], told


def with_norm(problem, norm):
    structure, ball = (dataclasses.replace(part, norm=norm) for part in (problem.structure, problem.ball))
    return dataclasses.replace(problem, structure=structure, ball=ball)


@pytest.fixture(scope="module")
def relu_problem():
    number = next(i for i in range(9999) if rf.name_of(i) == "jax.nn.relu")
    variants = (rf.draw(rf.VARIANTS * number + variant) for variant in range(rf.VARIANTS))
    # The places of cases, and so the draws, depend on how many layers the installed flax has.
    return next(problem for problem in variants if np.all(problem.ball.eps > 0.0))


def test_bounds_that_are_too_narrow_are_noticed(relu_problem):
    problem = relu_problem
    found = jax.tree.map(np.asarray, problem.structure.bound(problem.weights, problem.ball, problem.x))
    visited = rf.points(problem, 0, NUM_POINTS)
    _, verdicts = rf.judge(problem, visited, found)
    assert all(verdict["excess"] <= rf.ROUNDING and verdict["is_ordered"] for verdict in verdicts.values())
    values = visited[1].astype(np.float64)
    step = 1e-4 * (1.0 + np.abs(values).max())
    narrow = Interval(values.min(axis=0) + step, values.max(axis=0) - step)
    _, verdicts = rf.judge(problem, visited, found | {"crown": narrow})
    assert verdicts["crown"]["excess"] == pytest.approx(1e-4, rel=0.1)
    wide = Interval(found["ibp"].lower - 1.0, found["ibp"].upper)
    assert not rf.judge(problem, visited, found | {"crown": wide})[1]["crown"]["is_ordered"]


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_points_lie_in_the_region_and_on_its_border(relu_problem, norm):
    problem = with_norm(relu_problem, norm)
    inputs, values = rf.points(problem, 1, NUM_POINTS)
    assert inputs.shape[0] * rf.BATCH >= NUM_POINTS
    assert values.shape[:2] == inputs.shape[:2]
    # Apart from the rounding of the points themselves to float32.
    moved = np.maximum(np.abs(inputs.astype(np.float64) - problem.x) - 1.2e-7, 0.0) / problem.ball.eps
    assert np.linalg.norm(moved, {"linf": np.inf, "l2": 2, "l1": 1}[norm], axis=2).max() <= 1.0 + 1e-6
    assert ((inputs >= problem.ball.low) & (inputs <= problem.ball.high)).all()
    region = problem.ball.region(problem.x)
    for end, reached in ((region.lower, inputs.min(axis=0)), (region.upper, inputs.max(axis=0))):
        np.testing.assert_allclose(reached, end, rtol=0.0, atol=1e-6)
