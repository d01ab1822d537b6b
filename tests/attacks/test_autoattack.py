"""AutoAttack: what the cascade does with its attacks, its versions, few classes, resumption, random models."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

from rdx import attacks, losses
from rdx.attacks import base
from rdx.balls import Ball

EPS = {"linf": 0.05, "l2": 0.15, "l1": 0.4}
FEW = {"num_steps": 8, "num_queries": 30}


def _mlp(parameters, x):
    first, second = parameters
    return jnp.tanh(3.0 * (x.reshape(x.shape[0], -1) - 0.5) @ first) @ second


def _model(num_classes=5):
    first, second = jax.random.split(jax.random.key(7))
    return Partial(_mlp, (jax.random.normal(first, (18, 12)), jax.random.normal(second, (12, num_classes))))


def _batch(model, num=24):
    x = jax.random.uniform(jax.random.key(1), (num, 3, 3, 2))
    labels = model(x).argmax(axis=1)
    return x, labels.at[:2].set((labels[:2] + 1) % 2)


@pytest.mark.parametrize(("version", "norm"), [
    ("standard", "linf"), pytest.param("standard", "l2", marks=pytest.mark.slow), ("standard", "l1"), ("plus", "linf"),
])
def test_an_example_falls_to_the_first_attack_that_breaks_it(norm, version, key):
    model = _model()
    (x, labels), ball = _batch(model), Ball(norm, EPS[norm])
    suite = attacks.suite(norm, version=version, **FEW)
    assert list(suite) == {
        "standard": ["apgd-ce", "apgd-t", "fab-t", "square"],
        "plus": ["apgd-ce", "apgd-dlr", "fab", "square", "apgd-t", "fab-t"],
    }[version]
    cascade = attacks.cascade(key, suite, model, x, labels, ball=ball)
    result, broken_by = cascade.result, cascade.broken_by
    assert ball.contains(result.x_adv, x).all()
    np.testing.assert_array_equal(result.success, losses.is_wrong(model(result.x_adv), labels))
    np.testing.assert_array_equal(broken_by == -1, losses.is_wrong(model(x), labels))
    np.testing.assert_array_equal(broken_by < len(suite), result.success)
    assert 3 < result.success.sum() < len(x)
    if (version, norm) == ("standard", "linf"):
        together = attacks.autoattack(key, model, x, labels, ball=ball, version=version, **FEW)
        np.testing.assert_array_equal(together.x_adv, result.x_adv)
    # What stands has paid for every attack, what was wrong before for none.
    assert (result.forwards[broken_by == -1] == 1).all()
    assert (result.forwards[broken_by == len(suite)] > result.forwards[broken_by == 0].max()).all()


def _breaking(key, logits_fn, x, labels, *, ball, index, loop, rows, seen):
    """Succeeds on the examples of given places only, and notes whom it met."""
    del key, loop
    seen.append(sorted(set(np.asarray(index).tolist())))
    is_hit = jnp.isin(index, jnp.asarray(rows))
    x_adv = jnp.where(is_hit[:, None], jnp.clip(x + 2.0 * ball.eps, 0.0, 1.0), x)
    counts = jnp.ones(len(x), jnp.int32)
    return base.AttackResult(x_adv, is_hit, ball.distance(x_adv, x), jnp.zeros(len(x)), 10 * counts, counts)


def test_each_attack_meets_what_still_stands_and_is_judged_by_the_model(key):
    # Class 1 where the first element exceeds 0.5: what moves by 0.2 crosses.
    model = Partial(lambda x: jnp.stack([0.5 - x[:, 0], x[:, 0] - 0.5], axis=1))
    x, labels, seen = jnp.full((20, 3), 0.4), jnp.zeros(20, jnp.int32), {name: [] for name in "abc"}
    rows = {"a": [0, 1, 5], "b": list(range(2, 14)), "c": [19]}
    suite = {name: partial(_breaking, rows=rows[name], seen=seen[name]) for name in rows}
    found = attacks.cascade(key, suite, model, x, labels, ball=Ball("linf", 0.1))
    result, broken_by = found.result, found.broken_by
    expected = np.full(20, 3)
    expected[[19]], expected[2:14], expected[[0, 1, 5]] = 2, 1, 0
    np.testing.assert_array_equal(broken_by, expected)
    assert [seen[name] for name in "abc"] == [
        [list(range(20))], [sorted(set(range(20)) - {0, 1, 5})], [list(range(14, 20))],
    ]
    # One forward pass of the clean input, then ten of each attack and one that judges.
    np.testing.assert_array_equal(result.forwards, 1 + 11 * np.minimum(expected + 1, 3))
    np.testing.assert_array_equal(result.gradients, np.minimum(expected + 1, 3))


@pytest.mark.parametrize("num_classes", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_few_classes(num_classes, key):
    model = _model(num_classes)
    x, labels = _batch(model)
    result = attacks.autoattack(key, model, x, labels, ball=Ball("linf", 0.1), **FEW)
    assert result.success.sum() > 2


def test_it_is_at_least_as_strong_as_its_attacks_and_the_batch_changes_nothing(key):
    model = _model()
    (x, labels), ball = _batch(model), Ball("linf", EPS["linf"])
    suite = attacks.suite("linf", **FEW)
    together = attacks.autoattack(key, model, x, labels, ball=ball, **FEW)
    for attack in suite.values():
        alone = attack(key, model, x, labels, ball=ball)
        assert (together.success | ~alone.success).mean() > 0.95  # their keys differ
    rows = np.array([20, 3, 7])
    apart = attacks.autoattack(key, model, x[rows], labels[rows], ball=ball, index=jnp.asarray(rows), **FEW)
    np.testing.assert_array_equal(apart.success, together.success[rows])
    traced = jax.jit(lambda x: attacks.autoattack(key, model, x, labels, ball=ball, **FEW))(x)
    np.testing.assert_array_equal(traced.success, together.success)


class _KilledError(Exception):
    pass


@pytest.mark.parametrize("after", [1, 3, 8])
def test_it_goes_on_where_it_was_interrupted(after, tmp_path, key):
    model = _model()
    x, labels = _batch(model)
    run = partial(attacks.autoattack, key, model, x, labels, ball=Ball("linf", 0.03), **FEW)
    path, calls, again = tmp_path / "autoattack.npz", [], []

    def kill(*numbers):
        calls.append(numbers)
        if len(calls) > after:
            raise _KilledError

    with pytest.raises(_KilledError):
        run(loop=attacks.Loop(chunk=4, checkpoint=path, progress=kill))
    if path.exists():  # the first attack has finished
        other = Partial(_mlp, tuple(2.0 * leaf for leaf in model.args[0]))
        for options in ({"num_steps": 9}, {"logits_fn": other}):
            with pytest.raises(ValueError, match="delete it or name"):
                attacks.autoattack(**{
                    "key": key, "logits_fn": model, "x": x, "labels": labels, "ball": Ball("linf", 0.03), **FEW,
                    "loop": attacks.Loop(chunk=4, checkpoint=path), **options,
                })
    found = run(loop=attacks.Loop(chunk=4, checkpoint=path, progress=lambda *numbers: again.append(numbers)))
    expected = run(loop=attacks.Loop(chunk=4, progress=lambda *numbers: calls.append(numbers)))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(a, b)
    assert again == calls[after + 1 + after:]
    assert not list(tmp_path.iterdir())


def _noisy(model, scale, keys, x):
    logits = model(x)
    return logits + scale * jax.vmap(lambda key: jax.random.normal(key, logits.shape[1:]))(keys)


def test_random_models_fall_where_most_draws_do(key):
    model = _model()
    (x, labels), ball = _batch(model), Ball("linf", EPS["linf"])
    plain = attacks.autoattack_rand(
        key, Partial(_noisy, model, 0.0), x, labels, ball=ball, num_steps=8, num_samples=2, num_draws=5
    )
    np.testing.assert_array_equal(plain.success, losses.is_wrong(model(plain.x_adv), labels))
    assert plain.success.sum() > 2
    # Under noise far larger than any margin, most labels are right by chance only, whatever an attack does.
    noise = attacks.autoattack_rand(
        key, Partial(_noisy, model, 100.0), x, labels, ball=Ball("linf", 0.0), num_steps=2, num_samples=2, num_draws=101
    )
    assert noise.success.mean() > 0.9
    assert ball.contains(plain.x_adv, x).all()


def _noisy_by_keys(model, keys, x):
    noise = (jax.random.key_data(keys) >> 8).astype(jnp.float32) / 2**24 - 0.5
    return model(x) + 6.0 * jnp.concatenate([noise, -noise], axis=1)


def test_luck_on_the_draws_of_the_search_spares_nobody():
    model, ball = _model(4), Ball("linf", EPS["linf"])
    x = jax.random.uniform(jax.random.key(1), (200, 3, 3, 2))
    labels, random_fn = model(x).argmax(axis=1), Partial(_noisy_by_keys, model)
    found = attacks.cascade_rand(
        jax.random.key(1), random_fn, x, labels, ball=ball, num_steps=10, num_samples=4, num_draws=21
    )
    result, broken_by = found.result, found.broken_by
    rate = attacks.stochastic_success(jax.random.key(99), random_fn, result.x_adv, labels, num_draws=500)
    # Were searches to stop, and examples to leave, by the draws of the search, 0.54 would fall.
    assert (rate > 0.5).mean() > 0.65
    np.testing.assert_allclose(result.success.mean(), (rate > 0.5).mean(), atol=0.04)
    np.testing.assert_allclose(result.loss.mean(), rate.mean(), atol=0.02)
    np.testing.assert_array_equal(result.success, broken_by < 2)
    # 21 draws judge the clean input and what each attack found, and 21 the best of them; each draw counts.
    num_attacks = result.gradients // (4 * 10)
    assert set(num_attacks.tolist()) == {0, 1, 2}
    assert (num_attacks >= np.asarray(found.found_by) + 1).all()
    np.testing.assert_array_equal(result.forwards, 42 + num_attacks * (4 * 2 + 21))
    with pytest.raises(ValueError, match="stops by luck"):
        attacks.autoattack_rand(jax.random.key(1), random_fn, x, labels, ball=ball, loop=attacks.Loop(stop=True))


def test_unusable_settings_name_the_cure(key):
    model = _model()
    x, labels = _batch(model)
    ball = Ball("linf", 0.1)
    with pytest.raises(ValueError, match="autoattack_rand"):
        attacks.autoattack(key, model, x, labels, ball=ball, version="rand")
    with pytest.raises(ValueError, match="run it on its own"):
        attacks.autoattack(key, model, x, labels, ball=ball, loop=attacks.Loop(trace=True))
    with pytest.raises(ValueError, match="at least one attack"):
        attacks.cascade(key, {}, model, x, labels, ball=ball)
