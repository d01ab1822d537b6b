"""The original AutoAttack's numbers, from tests/golden/ (scripts/make_golden_attacks.py wrote them), in float64."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.tree_util import Partial

from rdx import goals, losses
from rdx.attacks import base
from rdx.attacks.apgd import prepare, start_from, step
from rdx.balls import Ball

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
