"""What tells runs apart, and what the files of others say."""

import functools
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

from rdx import attacks, goals, losses, models
from rdx.attacks import resumption
from rdx.balls import Ball


def _affine(weights, x):
    return x @ weights


def _settings():
    """Pairs of which the second differs from the first in one respect."""
    model, eye = Partial(_affine, jnp.eye(2)), jnp.eye(2)
    net = models.MLP((3,), 2)
    first, second = (net.init(jax.random.key(i), jnp.zeros((1, 4))) for i in range(2))
    return {
        "parameters": (model, Partial(_affine, 2.0 * eye)),
        "flax parameters": (models.logits_fn(net, first), models.logits_fn(net, second)),
        "functions": (Partial(_affine, eye), Partial(jnp.matmul, eye)),
        "bound settings": (functools.partial(attacks.apgd, rho=0.75), functools.partial(attacks.apgd, rho=0.5)),
        "settings in a Partial": (
            Partial(functools.partial(_affine, scale=1.0), eye), Partial(functools.partial(_affine, scale=2.0), eye),
        ),
        "losses": (goals.misclassify(losses.margin), goals.misclassify(losses.dlr)),
        "norms": (Ball("linf", 0.1), Ball("l2", 0.1)),
        "order": ({"a": 1, "b": 2}, {"b": 2, "a": 1}),
        "nesting": (((1,), 2), ((1, 2),)),
        "keys": (jax.random.key(0), jax.random.key(1)),
        "numbers": (np.int32(1), np.int32(2)),
        "nothing": (None, 0),
    }


@pytest.mark.parametrize("what", list(_settings()))
def test_runs_that_differ_in_one_respect_are_told_apart(what):
    first, second = _settings()[what]
    again, _ = _settings()[what]
    assert resumption.digest(first) == resumption.digest(again) != resumption.digest(second)


def test_the_next_process_has_the_same_digest():
    code = (
        "from functools import partial; from jax.tree_util import Partial; import jax; from rdx import attacks, goals;"
        "from rdx.attacks import resumption;"
        "print(resumption.digest(Partial(lambda x: x), partial(attacks.pgd, goal=goals.misclassify(), num_steps=3),"
        "Partial(jax.nn.relu), object()))"
    )
    runs = [subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True) for _ in range(2)]
    assert runs[0].stdout == runs[1].stdout != ""


def test_files_of_others_are_refused(tmp_path):
    path = tmp_path / "state.npz"
    for leaves in ({"leaf0": np.zeros(3)}, {"fingerprint": "of an old version", "leaf0": np.zeros(3)}):
        np.savez(path, **leaves)
        with pytest.raises(ValueError, match="another version of rdx: delete it or name"):
            resumption.load(path, resumption.digest(1), (np.zeros(3),))
