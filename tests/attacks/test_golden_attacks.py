"""The original AutoAttack's numbers, from tests/golden/ (scripts/make_golden_attacks.py wrote them), in float64."""

import importlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.tree_util import Partial

from rdx import goals, losses
from rdx.attacks import base, minimal
from rdx.attacks.apgd import prepare, start_from, step
from rdx.attacks.hyperplane import project_onto_hyperplane
from rdx.balls import Ball

# Modules that share their names with the functions that the package shows.
fab, square = (importlib.import_module(f"rdx.attacks.{name}") for name in ("fab", "square"))
FOLDER = Path(__file__).resolve().parents[1] / "golden"
LOSSES = {"ce": losses.cross_entropy, "dlr": losses.dlr, "targeted": losses.targeted_dlr}
# Both sides round in float64 in another order; fifty steps amplify that, and projections bisect to 1e-12 of the gap.
RTOL = 1e-9


def _load(part):
    with np.load(FOLDER / f"attacks_{part}.npz") as file:
        return dict(file)


def _dense(w, name, x):
    return x.reshape(len(x), -1) @ w[f"{name}.weight"].T + w[f"{name}.bias"][None]


def _mlp(w, x):
    return _dense(w, "dense2", jax.nn.relu(_dense(w, "dense1", x)))


def _conv(w, x):
    layout = ("NCHW", "OIHW", "NCHW")
    x = lax.conv_general_dilated(x, w["conv1.weight"], (1, 1), "VALID", dimension_numbers=layout)
    return _dense(w, "dense1", jax.nn.relu(x + w["conv1.bias"][None, :, None, None]))


def _of_images(w, x):
    return _mlp(w, x.transpose(0, 3, 1, 2))


NETS = {"mlp": _mlp, "conv": _conv}
CASES = {
    "mlp": [(loss, num_steps) for loss in LOSSES for num_steps in (20, 50)],
    "conv": [("ce", 50), ("targeted", 50)],
}
EACH = [
    (net, norm, *case, wide) for net, cases in CASES.items() for norm in ("linf", "l2", "l1") for case in cases
    for wide in ((False, True) if norm == "l1" else (False,))
]


# Module-level, so that searches of several lengths share a compilation.
_move = jax.jit(step)
_fab_move = jax.jit(fab._step)
_evaluate = jax.jit(lambda context, state: context.climbed(
    context.problem.logits_fn(state.point), context.problem.labels, *state.aim
))


def _padded(schedule, length=53):
    return jax.tree.map(lambda leaf: jnp.pad(leaf, (0, length - len(leaf)), mode="edge"), schedule)


def _search(net, norm, loss, num_steps, wide):
    """Runs Auto-PGD as the code does; gives the loss of every point, and the step sizes in units of the radius."""
    golden = _load(f"apgd_{net}")
    place = "middle" if norm == "l2" else "box"
    weights = {key: jnp.asarray(value, float) for key, value in golden.items() if key.endswith(("weight", "bias"))}
    x, noise = (jnp.asarray(golden[key], float) for key in (f"x.{place}", f"noise.{norm}"))
    labels, targets = (jnp.asarray(golden[f"{key}.{place}"]) for key in ("labels", "targets"))
    aim = (targets,) if loss == "targeted" else ()
    ball = Ball(norm, golden[f"eps.{norm}"])
    problem, found = base.begin(Partial(NETS[net], weights), x, labels, ball, goals.misclassify())
    context = prepare(problem, Partial(LOSSES[loss]), num_steps, larger_radii=wide)
    length, context = context.schedule.num_steps, context._replace(schedule=_padded(context.schedule))
    state, values, shares = start_from(context, noise, found, aim), [], []
    for i in range(length):
        values.append(_evaluate(context, state))
        state = _move(context, state, i)
        if i == 0 and norm != "l1":
            # The code compares the first iterate not with the starting point but with a row of zeros.
            state = state._replace(memory=state.memory._replace(last_loss=jnp.zeros(len(x))))
        if not context.schedule.is_first[i + 1]:
            shares.append(state.share)
    values.append(_evaluate(context, state))
    name = f"{norm}.{loss}.{num_steps}{'.wide' if wide else ''}"
    return np.array(values), np.array(shares), golden[f"{name}.loss"], golden[f"{name}.share"]


@pytest.mark.parametrize(("net", "norm", "loss", "num_steps", "wide"), EACH)
def test_auto_pgd_takes_the_same_steps(net, norm, loss, num_steps, wide):
    with jax.enable_x64(True):
        values, shares, their_values, their_shares = _search(net, norm, loss, num_steps, wide)
    np.testing.assert_allclose(shares, their_shares, rtol=1e-12)
    np.testing.assert_allclose(values, their_values, rtol=RTOL, atol=RTOL)
    # The comparison covers what the attack decides: step sizes change, and several times.
    assert (np.unique(their_shares).size > 2) | (num_steps == 20)


def test_dlr_values_with_ties():
    golden = _load("dlr")
    with jax.enable_x64(True):
        logits, labels, targets = (jnp.asarray(golden[key]) for key in ("logits", "labels", "targets"))
        np.testing.assert_allclose(losses.dlr(logits, labels), golden["dlr"], rtol=RTOL, atol=1e-15)
        targeted = losses.targeted_dlr(logits, labels, targets)
        np.testing.assert_allclose(targeted, golden["targeted"], rtol=RTOL, atol=1e-15)


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_fab_projects_onto_the_same_point(norm):
    golden = _load("fab")
    with jax.enable_x64(True):
        points, w, b = (jnp.asarray(golden[key]) for key in ("points", "w", "b"))
        found = np.array(project_onto_hyperplane(points, w, b, 0.0, 1.0, norm)) - golden["points"]
    np.testing.assert_allclose(found, golden[norm], rtol=RTOL, atol=RTOL)


# In l1 the box has a say in which boundary is nearest, which the code ignores.
@pytest.mark.parametrize(("norm", "kind"), [
    *((norm, "targeted") for norm in ("linf", "l2", "l1")), ("linf", "all"), ("l2", "all"),
])
@pytest.mark.parametrize("net", ["mlp", "conv"])
def test_fab_takes_the_same_steps(net, norm, kind):
    golden, points = _load(f"apgd_{net}"), _load("fab_steps")[f"{net}.{norm}.{kind}.points"]
    place = "box" if kind == "targeted" else "middle"
    with jax.enable_x64(True):
        weights = {key: jnp.asarray(value, float) for key, value in golden.items() if key.endswith(("weight", "bias"))}
        x, labels = jnp.asarray(golden[f"x.{place}"], float), jnp.asarray(golden[f"labels.{place}"])
        goal = goals.misclassify(losses.margin)
        problem, found = base.begin(Partial(NETS[net], weights), x, labels, Ball(norm, golden[f"eps.{norm}"]), goal)
        classes = minimal.other_classes(problem)[:, : 1 if kind == "targeted" else None]
        context = fab._context(problem, found, classes, 0.1, 1.05, 0.9, 20)
        state, mine, is_tie = fab._State(x, classes, found), [], []
        for theirs in points:
            mine.append(state.point)
            is_tie.append(np.abs(base.evaluate(problem, jnp.asarray(theirs)).loss) < 1e-12)
            state = _fab_move(context, state, 0)
    # From a point on the boundary itself each side goes where its rounding sends it.
    same = ~np.maximum.accumulate(is_tie, axis=0)[:-1]
    np.testing.assert_allclose(np.array(mine)[1:][same], points[1:][same], rtol=RTOL, atol=RTOL)
    assert same.mean() > 0.75
    assert np.abs(np.diff(points, axis=0)[same]).max() > 0.01


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_square_makes_the_same_of_the_same_draws(norm, monkeypatch):
    golden, drawn, margins = _load("square_steps"), {}, []
    windows, signs, turned, their_margins = (golden[f"{norm}.{key}"] for key in ("windows", "signs", "turned", "loss"))

    def place(key, shape, side, spared):
        row, column = next(drawn["windows"])
        return square._Patch(row, column, side, side)

    def evaluate(problem, x, evaluate=base.evaluate):
        seen = evaluate(problem, x)
        margins.append(-seen.loss)
        return seen

    monkeypatch.setattr(square, "_place", place)
    monkeypatch.setattr(jax.random, "rademacher", lambda key, shape, dtype: jnp.reshape(drawn["signs"], shape))
    monkeypatch.setattr(jax.random, "bernoulli", lambda key: drawn["turned"])
    with jax.enable_x64(True):
        weights = {key: jnp.asarray(value) for key, value in golden.items() if key.endswith(("weight", "bias"))}
        x, start = (jnp.asarray(golden[key]).transpose(0, 2, 3, 1) for key in ("x", f"{norm}.start"))
        problem, found = base.begin(
            Partial(_of_images, weights), x, jnp.asarray(golden["labels"]), Ball(norm, golden[f"eps.{norm}"]),
            goals.misclassify(losses.margin),
        )
        sides = square.schedule(np.arange(len(signs)), *x.shape[1:3], norm=norm)[1]
        context = square._Context(problem, jnp.asarray(sides), jnp.asarray(1))
        keys = jax.random.split(jax.random.key(0), len(x))
        state = square._State(keys, base.evaluate(problem, start), found)
        monkeypatch.setattr(base, "evaluate", evaluate)
        for i in range(len(signs)):
            drawn.update(windows=iter(windows[i]), signs=signs[i], turned=norm != "linf" and turned[i])
            state = square._step(context, state, i)
    # The code's ball of l1 is smaller by a millionth.
    tolerance = 1e-5 if norm == "l1" else RTOL
    np.testing.assert_allclose(np.array(margins), their_margins, rtol=tolerance, atol=tolerance)
    is_better = their_margins[1:] < np.minimum.accumulate(their_margins)[:-1]
    assert 5 < is_better.any(axis=1).sum() < len(signs) - 5  # what is kept depends on the margins


@pytest.mark.parametrize("side", [8, 28, 32])
@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_square_has_the_same_schedule(norm, side):
    golden = _load("square")
    shares, sides = square.schedule(np.arange(9000), side, side, norm=norm)
    np.testing.assert_array_equal(sides[:2100], golden[f"{norm}.{side}"])
    np.testing.assert_array_equal(shares, golden["p"])
    rescaled, _ = square.schedule(np.arange(1000) * 10_000 // 1000, side, side, norm=norm)
    np.testing.assert_array_equal(rescaled, golden["p.rescaled"])
