import numpy as np
import pytest

from rdx.detect import metric_spaces


def test_continuous_boxes_have_midpoints():
    assert all(metric_spaces.Box(norm).has_midpoints(eps) for norm in ("linf", "l2", "l1") for eps in (0.1, 3 / 255))


def test_lattices_agree_with_brute_force_on_small_ones():
    points = np.stack(np.meshgrid(*[np.arange(5)] * 2), axis=-1).reshape(-1, 2)
    deltas = np.abs(points[:, None] - points[None])
    for norm, distances in (("linf", deltas.max(axis=-1)), ("l1", deltas.sum(axis=-1))):
        for eps in (0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 4.0):
            lattice = metric_spaces.Lattice(norm, num_levels=4, high=4.0)
            assert lattice.has_midpoints(eps) == metric_spaces.has_midpoints(distances, eps), (norm, eps)


def test_l2_lattices_deny_midpoints_and_are_right_in_many_dimensions():
    corners = np.stack(np.meshgrid(*[np.arange(3)] * 5), axis=-1).reshape(-1, 5)
    distances = np.sqrt(np.square(corners[:, None] - corners[None]).sum(axis=-1))
    lattice = metric_spaces.Lattice("l2", num_levels=2, high=2.0)
    for eps in (0.5, 1.0, 1.5, 2.0):
        assert lattice.has_midpoints(eps) == metric_spaces.has_midpoints(distances, eps)


def test_levels_do_not_round_down():
    assert metric_spaces.Lattice("linf").has_midpoints(8 / 255)
    assert not metric_spaces.Lattice("linf").has_midpoints(7 / 255)


@pytest.mark.parametrize(("distances", "text"), [
    (np.zeros((2, 3)), "one for every pair"), (np.array([[0.0, -1], [-1, 0]]), "at least 0"),
    (np.array([[0.0, 1], [2, 0]]), "symmetric"), (np.zeros((0, 0)), "point at least"),
])
def test_what_is_no_metric(distances, text):
    with pytest.raises(ValueError, match=text):
        metric_spaces.finite_space(distances)


def test_hamming_cubes():
    cube = metric_spaces.hamming_cube(3)
    assert cube.distances[0b101, 0b010] == 3
    assert metric_spaces.finite_space(cube.distances).has_midpoints(2.0)
    assert not cube.has_midpoints(1.0)
    with pytest.raises(ValueError, match="1 to 12 bits"):
        metric_spaces.hamming_cube(20)
