"""The paper's numbers: spot checks against the printed tables, shapes, and the order that they must keep."""

import pytest

from experiments import a5_paper

PIXEL = 1 / 255


def _mnist(recipe, attack, classifier, defense=0.0):
    return a5_paper.quote("mnist", recipe, eps_attack=attack, eps_classifier=classifier,
                          eps_robustify=0.0 if recipe == "base" else attack, eps_defense=defense)


def _cifar(recipe, robustify, defense, *, attack=8, classifier=8):
    return a5_paper.quote("cifar10", recipe, eps_attack=attack * PIXEL, eps_classifier=classifier * PIXEL,
                          eps_robustify=robustify * PIXEL, eps_defense=defense * PIXEL)


def test_spot_checks_on_mnist():
    assert _mnist("base", 0.1, 0.1) == (0.92, 2.0, 5.41)
    assert _mnist("base", 0.3, 0.4) == (2.58, 7.03, 7.68)
    assert _mnist("offline", 0.3, 0.3, 0.2) == (1.32, 3.21, 3.77)
    assert _mnist("offline", 0.1, 0.1, 0.3) == (0.51, 0.57, 0.7)
    assert _mnist("online", 0.3, 0.3, 0.3) == (1.32, 1.86, 1.99)
    assert _mnist("joint", 0.3, 0.1, 0.3) == (0.84, 0.96, 1.38)
    assert _mnist("joint", 0.1, 0.0, 0.05) == (88.66, 88.66, 88.66)


def test_spot_checks_on_cifar10():
    assert _cifar("base", 0, 0) == (54.6, 66.34, 67.11)
    assert _cifar("offline", 8, 8) == (52.36, 59.24, 59.58)
    assert _cifar("online", 16, 32) == (54.05, 58.39, 58.73)
    assert _cifar("joint", 8, 16) == (39.15, 41.33, 44.22)
    assert _cifar("joint", 4, 32) == (35.26, 37.13, 42.76)


def test_radii_that_were_computed_find_their_cell():
    assert _mnist("online", 0.1 + 0.2, 0.3, 0.30000001) == (1.32, 1.86, 1.99)
    assert _cifar("joint", 8.0000001, 16) == (39.15, 41.33, 44.22)


def test_what_the_paper_lacks_is_none():
    assert _mnist("base", 0.2, 0.1) is None
    assert _mnist("online", 0.1, 0.15, 0.1) is None
    assert _mnist("online", 0.1, 0.1, 0.15) is None
    assert a5_paper.quote("mnist", "online", eps_attack=0.1, eps_classifier=0.1, eps_robustify=0.3,
                          eps_defense=0.1) is None
    assert _cifar("joint", 8, 16, attack=2) is None
    assert _cifar("joint", 5, 16) is None
    assert _cifar("offline", 8, 2) is None
    assert a5_paper.quote("digits", "base", eps_attack=0.1, eps_classifier=0.1, eps_robustify=0.0,
                          eps_defense=0.0) is None


def test_shapes():
    attacks, defenses = (0.1, 0.3), (0.05, 0.1, 0.2, 0.3, 0.4)
    assert a5_paper.MNIST_COLUMNS == (0.0, 0.1, 0.2, 0.3, 0.4)
    assert set(a5_paper.MNIST_BASE) == set(attacks)
    assert set(a5_paper.MNIST) == set(a5_paper.CIFAR10) == {"offline", "online", "joint"}
    for table in a5_paper.MNIST.values():
        assert set(table) == {(attack, defense) for attack in attacks for defense in defenses}
    for recipe, table in a5_paper.CIFAR10.items():
        assert set(table) == {4, 8, 16, 32} | ({0} if recipe != "offline" else set())
    assert all(len(row) == 5 for row in _rows(a5_paper.MNIST_BASE, *a5_paper.MNIST.values()))
    assert all(len(row) == 3 for row in _rows(*a5_paper.CIFAR10.values()))


def _rows(*tables):
    return [row for table in tables for row in table.values()]


def test_errors_rise_but_for_one_slip_as_printed():
    slips = []
    for row in _rows(a5_paper.MNIST_BASE, *a5_paper.MNIST.values(), *a5_paper.CIFAR10.values()):
        for clean, attacked, certified in row:
            assert 0 < clean <= 100
            if not clean <= attacked <= certified <= 100:
                slips.append((clean, attacked, certified))
    # Table 3, eps_A = 0.1, eps_D = 0.2: a certified error below the attacked one, impossible on the same examples.
    assert slips == [(2.4, 2.55, 2.52)]


@pytest.mark.parametrize("recipe", ["offline", "online"])
def test_a_larger_defender_certifies_more_on_a_robust_classifier(recipe):
    errors = [_mnist(recipe, 0.3, 0.3, defense)[2] for defense in (0.05, 0.1, 0.2, 0.3, 0.4)]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] < _mnist("base", 0.3, 0.3)[2]
