"""The evaluation against closed forms, spies and deliberately broken certifiers and attacks."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

from rdx import attacks, bounds
from rdx.balls import Ball
from rdx.evaluate import ContradictionError, Diagnosis, Evaluation, check, diagnose, evaluate, records
from rdx.types import AttackResult

N, BALL = 37, Ball("linf", 0.1)
PGD = functools.partial(attacks.pgd, num_steps=10)
APGD = functools.partial(attacks.apgd, num_steps=10)


def _linear(parameters, x):
    weight, bias = parameters
    return x.reshape(x.shape[0], -1) @ weight + bias[None]


def _mlp(parameters, x):
    first, second = parameters
    return jax.nn.relu(2.0 * (x.reshape(x.shape[0], -1) - 0.5) @ first) @ second


def _model(kind, num_classes):
    first, second = jax.random.split(jax.random.key(7))
    shape = (12, num_classes) if kind is _linear else (12, 16)
    other = 0.1 * jnp.ones(num_classes) if kind is _linear else jax.random.normal(second, (16, num_classes))
    return Partial(kind, (jax.random.normal(first, shape), other))


@functools.cache
def _data(kind, num_classes):
    """Inputs partly on the faces of the box; some labels are wrong."""
    x = jnp.clip(1.4 * jax.random.uniform(jax.random.key(1), (N, 2, 3, 2)) - 0.2, 0.0, 1.0)
    labels = np.array(_model(kind, num_classes)(x).argmax(axis=1))
    labels[::9] = (labels[::9] + 1) % num_classes
    return x, labels


def _run(kind=_mlp, num_classes=4, attack_set=None, **options):
    x, labels = _data(kind, num_classes)
    attack_set = {"pgd": PGD, "apgd": APGD} if attack_set is None else attack_set
    return evaluate(jax.random.key(3), _model(kind, num_classes), x, labels, **{
        "ball": BALL, "attacks": attack_set, "batch_size": 16, "diagnose": None, **options
    })


def _closed_form(num_classes):
    """The least margin of the linear model over ball and box, one per wrong class, in float64."""
    x, labels = _data(_linear, num_classes)
    weight, bias = (np.asarray(leaf, np.float64) for leaf in _model(_linear, num_classes).args[0])
    flat = np.asarray(x, np.float64).reshape(N, -1)
    lower, upper = np.clip(flat - 0.1, 0.0, 1.0), np.clip(flat + 0.1, 0.0, 1.0)
    slopes = weight[:, labels].T[:, :, None] - weight[None]
    worst = np.where(slopes > 0, lower[..., None], upper[..., None])
    margins = (slopes * worst).sum(axis=1) + bias[labels][:, None] - bias[None]
    margins[np.arange(N), labels] = np.inf
    return margins, worst


def _corner(key, logits_fn, x, labels, *, ball, index):
    """The exact attack on the linear model: the corner of the worst class."""
    margins, worst = _closed_form(4)
    rows = np.asarray(index)
    x_adv = jnp.asarray(worst[rows, :, margins[rows].argmin(axis=1)].reshape(x.shape), x.dtype)
    return _result(x, x_adv)


def _result(x, x_adv, *, success=False):
    counts = jnp.ones(len(x), jnp.int32)
    return AttackResult(x_adv, jnp.full(len(x), success), BALL.distance(x_adv, x), jnp.zeros(len(x)), counts, counts)


@pytest.mark.parametrize("method", [bounds.ibp, bounds.crown_ibp])
@pytest.mark.parametrize(("num_classes", "attack"), [(2, PGD), (2, APGD), (4, _corner)])
def test_on_a_linear_model_attacks_and_certificates_meet_the_closed_form(num_classes, attack, method):
    margins, _ = _closed_form(num_classes)
    robust = margins.min(axis=1) > 0
    assert 5 < robust.sum() < N - 10
    result = _run(_linear, num_classes, {"attack": attack}, method=method)
    np.testing.assert_array_equal(result.certified, robust)
    np.testing.assert_array_equal(result.broken, ~robust)
    np.testing.assert_allclose(result.margin_lower, margins.min(axis=1), rtol=1e-4, atol=1e-4)
    clean = result.prediction != result.label
    assert clean.sum() < result.broken.sum()
    np.testing.assert_array_equal(clean, np.arange(N) % 9 == 0)


def test_methods_take_turns_with_what_is_open():
    stages = []
    alone = {method: _run(attack_set={}, method=method) for method in (bounds.ibp, bounds.crown)}
    weak, strong = alone.values()
    found = _run(attack_set={}, method=(bounds.ibp, bounds.crown), on_progress=lambda *row: stages.append(row))
    assert 0 < weak.certified.sum() < strong.certified.sum() < N
    np.testing.assert_array_equal(found.certified, strong.certified)
    np.testing.assert_array_equal(found.certified_by, np.where(weak.certified, 0, np.where(strong.certified, 1, -1)))
    is_open = ~weak.certified & (weak.prediction == weak.label)
    assert ("certify", is_open.sum(), is_open.sum()) in stages
    wanted = np.where(is_open, strong.margin_lower, weak.margin_lower)
    np.testing.assert_allclose(found.margin_lower, wanted, rtol=1e-4, atol=1e-5)


class Spy:
    """Leaves inputs as they are and notes what it is given."""

    def __init__(self, move=None):
        self.keys, self.seen, self.sizes, self.move = [], [], [], move

    def __call__(self, key, logits_fn, x, labels, *, ball, index):
        self.keys.append(jax.random.key_data(key))
        self.seen.extend(dict.fromkeys(np.asarray(index).tolist()))
        self.sizes.append(len(x))
        return _result(x, x if self.move is None else self.move(x))


def test_only_correct_uncertified_examples_are_attacked_besides_the_cross_check():
    spy = Spy()
    index = 100 + np.arange(N)
    result = _run(attack_set={"spy": spy}, cross_check=3, num_attacked=25, index=index)
    correct = result.prediction == result.label
    in_subset = np.arange(N) < 25
    wanted = correct & ~result.certified & in_subset
    checked = np.flatnonzero(result.certified & in_subset)[:3]
    assert wanted.sum() > 5
    assert len(checked) == 3
    assert spy.seen == np.union1d(index[wanted], index[checked]).tolist()
    np.testing.assert_array_equal(result.index[result.attacked], spy.seen)
    np.testing.assert_array_equal(result.counted, in_subset)
    np.testing.assert_array_equal(result.broken, ~correct)
    assert set(spy.sizes) <= {1, 2, 4, 8, 16}
    np.testing.assert_array_equal(result.forwards, result.attacked)
    np.testing.assert_array_equal(result.gradients, result.attacked)


def test_a_later_attack_meets_only_what_stands():
    spy = Spy()
    result = _run(attack_set={"pgd": PGD, "spy": spy}, cross_check=0)
    correct = result.prediction == result.label
    assert set(np.unique(result.broken_by[result.broken & correct])) == {0}
    assert (result.broken_by[~result.broken | ~correct] == -1).all()
    np.testing.assert_array_equal(spy.seen, np.flatnonzero(correct & ~result.certified & ~result.broken))
    assert spy.seen
    np.testing.assert_array_equal(result.gradients, np.where(result.attacked, 10, 0) + np.isin(np.arange(N), spy.seen))


@pytest.mark.parametrize("batch_size", [5, 64])
def test_results_do_not_depend_on_the_batch_size(batch_size):
    wanted, found = _run(), _run(batch_size=batch_size)
    assert 3 < (wanted.broken & (wanted.prediction == wanted.label)).sum() < N - 3
    exact = {"index", "label", "prediction", "certified", "attacked", "broken", "counted", "broken_by", "gradients"}
    for name in exact:
        np.testing.assert_array_equal(getattr(found, name), getattr(wanted, name), err_msg=name)
        assert getattr(found, name).shape == (N,)
    np.testing.assert_allclose(found.margin_lower, wanted.margin_lower, rtol=1e-4, atol=1e-5)


def _optimist(fn, region, *args):
    found = bounds.ibp(fn, region, *args)
    return bounds.Interval(found.lower + 100.0, found.upper + 100.0)


def test_too_high_bounds_are_contradicted_by_a_real_attack():
    x, labels = _data(_mlp, 4)
    right = np.asarray(_model(_mlp, 4)(x).argmax(axis=1)) == labels
    with pytest.raises(ContradictionError, match="certified and broken by an attack"):
        evaluate(
            jax.random.key(0), _model(_mlp, 4), x[right], labels[right], ball=BALL,
            diagnose=None, attacks={"pgd": PGD}, method=_optimist,
        )


def test_too_high_bounds_are_contradicted_by_a_wrong_prediction():
    with pytest.raises(ContradictionError, match="misclassified without an attack"):
        _run(attack_set={}, method=_optimist)


def test_without_the_cross_check_and_wrong_labels_the_broken_certifier_would_pass():
    # The two tests above can fail: neither attack nor prediction speaks here.
    x, labels = _data(_mlp, 4)
    right = np.asarray(_model(_mlp, 4)(x).argmax(axis=1)) == labels
    result = evaluate(
        jax.random.key(0), _model(_mlp, 4), x[right], labels[right], ball=BALL,
        diagnose=None, attacks={"pgd": PGD}, method=_optimist, cross_check=0,
    )
    assert result.certified.all()
    assert not result.attacked.any()


def test_success_is_judged_by_a_fresh_forward_pass():
    def boast(key, logits_fn, x, labels, *, ball, index):
        return _result(x, x, success=True)

    def understate(*args, **options):
        return PGD(*args, **options)._replace(success=jnp.zeros(len(args[2]), bool))

    idle = _run(attack_set={"boast": boast})
    np.testing.assert_array_equal(idle.broken, idle.prediction != idle.label)
    np.testing.assert_array_equal(idle.adversarial_prediction, idle.prediction)
    honest, quiet = _run(attack_set={"pgd": PGD}), _run(attack_set={"pgd": understate})
    np.testing.assert_array_equal(quiet.broken, honest.broken)
    np.testing.assert_array_equal(honest.broken, honest.adversarial_prediction != honest.label)


def test_an_attack_that_leaves_the_ball_is_refused():
    for move in (lambda x: jnp.clip(x + 0.11, 0.0, 1.0), lambda x: x + 0.05, lambda x: x * jnp.nan):
        with pytest.raises(ValueError, match=r"'wild' left the ball or the box"):
            _run(attack_set={"wild": Spy(move)})
    _run(attack_set={"tame": Spy(lambda x: jnp.clip(x + 0.1, 0.0, 1.0))}, cross_check=0)


def test_the_key_of_an_attack_depends_on_its_name_alone():
    alone, other, second = Spy(), Spy(), Spy()
    _run(attack_set={"a": alone})
    _run(attack_set={"b": other, "a": second})
    assert len({tuple(key.tolist()) for key in (*alone.keys, *second.keys)}) == 1
    assert tuple(other.keys[0].tolist()) != tuple(alone.keys[0].tolist())


def test_sizes_of_the_subset_and_the_cross_check():
    nothing = _run(num_attacked=0)
    assert not nothing.attacked.any()
    assert not nothing.counted.any()
    everything = _run(num_attacked=10 * N, cross_check=10 * N)
    assert everything.counted.all()
    np.testing.assert_array_equal(everything.attacked, (everything.prediction == everything.label))
    unchecked = _run(cross_check=0)
    assert not (unchecked.attacked & unchecked.certified).any()
    np.testing.assert_array_equal(unchecked.broken, everything.broken)
    certified_only = _run(attack_set={})
    assert not certified_only.attacked.any()
    np.testing.assert_array_equal(certified_only.adversarial_prediction, certified_only.prediction)
    assert all(getattr(nothing, name).shape == (N,) for name in Evaluation.__dataclass_fields__ if name != "diagnosis")


@pytest.mark.parametrize(("what", "message"), [
    ("label", "4 classes"), ("last image", "outside the box"), ("dtype", "integers"), ("length", "do not fit"),
    ("eps", "give a scalar"), ("negative", "at least 0"),
])
def test_bad_inputs_are_refused_before_any_work(what, message):
    x, labels = _data(_mlp, 4)
    ball = {"eps": Ball("linf", jnp.full(N, 0.1)), "negative": Ball("linf", -0.1)}.get(what, BALL)
    labels = {"label": np.where(np.arange(N) == N - 1, 4, labels), "dtype": labels + 0.5, "length": labels[1:]}.get(
        what, labels
    )
    x = x.at[-1, 0, 0, 0].set(1.5) if what == "last image" else x

    def never(*args):
        raise AssertionError("work began")

    with pytest.raises(ValueError, match=message):
        evaluate(
            jax.random.key(0), _model(_mlp, 4), x, labels, ball=ball,
            diagnose=None, attacks={"pgd": PGD}, batch_size=8, method=never, on_progress=never,
        )


def test_nan_logits_are_wrong_and_never_certified():
    inner = _model(_mlp, 4)

    def model(x):
        overflow = jax.nn.relu(x[:, 0, 0, :1] - 0.6) * 1e30 * 1e30
        return inner(x) + (overflow - overflow)

    x, labels = _data(_mlp, 4)
    bad = np.asarray(x[:, 0, 0, 0] > 0.6)
    result = evaluate(
        jax.random.key(0), model, x, labels, ball=BALL,
        diagnose=None, attacks={"spy": Spy()}, batch_size=16, method=bounds.ibp,
    )
    assert 3 < bad.sum() < N - 3
    np.testing.assert_array_equal(result.prediction[bad], -1)
    assert result.broken[bad].all()
    assert not result.certified[bad].any()


def test_progress_covers_every_stage():
    rows = []
    result = _run(attack_set={"pgd": PGD}, on_progress=lambda *row: rows.append(row))
    assert [row for row in rows if row[0] == "certify"] == [("certify", done, N) for done in (16, 32, N)]
    assert rows[-1] == ("pgd", result.attacked.sum(), result.attacked.sum())


class _KilledError(Exception):
    pass


@pytest.mark.parametrize("after", [("confirm", 0), ("pgd", 0), ("pgd", 1), ("apgd", 0)])
def test_an_interrupted_evaluation_goes_on(after, tmp_path):
    expected, path, calls, again = _run(batch_size=4), tmp_path / "evaluation.npz", [], []

    def kill(name, *_):
        calls.append(name)
        if (name, calls.count(name) - 1) == after:
            raise _KilledError

    with pytest.raises(_KilledError):
        _run(batch_size=4, on_progress=kill, checkpoint=path)
    found = _run(batch_size=4, on_progress=lambda name, *_: again.append(name), checkpoint=path)
    for field in dataclasses.fields(Evaluation)[:-1]:  # without diagnosis
        np.testing.assert_array_equal(getattr(found, field.name), getattr(expected, field.name), field.name)
        assert getattr(found, field.name).dtype == getattr(expected, field.name).dtype
    # Only what had not been finished was done: the batch that was killed had not been written.
    assert ("certify" in again) == (after in (("confirm", 0), ("pgd", 0)))
    assert not list(tmp_path.iterdir())


def test_the_checkpoint_of_another_evaluation_is_refused(tmp_path):
    path = tmp_path / "evaluation.npz"

    def kill(name, *_):
        if name == "apgd":
            raise _KilledError

    with pytest.raises(_KilledError):
        _run(on_progress=kill, checkpoint=path)
    others = {"pgd": functools.partial(attacks.pgd, num_steps=11), "apgd": APGD}
    for options in ({"ball": Ball("linf", 0.2)}, {"attack_set": others}):
        with pytest.raises(ValueError, match="delete it or name"):
            _run(checkpoint=path, **options)
    # As once: whether, not by which method, an example is certified. Read as places all would be certified.
    with np.load(path) as file:
        leaves = dict(file)
    leaves["leaf1"] = leaves["leaf1"] >= 0
    np.savez(path, **leaves)
    with pytest.raises(ValueError, match="another version"):
        _run(checkpoint=path)


def test_the_number_comes_with_a_diagnosis(tmp_path):
    result = _run(diagnose=functools.partial(diagnose, substitute=_model(_linear, 4)))
    assert result.diagnosis["num_examples"] == 32
    status = {told["name"]: told["status"] for told in result.diagnosis["checks"]}
    assert status["certificates"] == "ok"
    assert status["gradients"] == status["knowledge"] == "ok"
    records.write(tmp_path, "cell", {}, result)
    record, again = records.read(tmp_path, "cell")
    assert again.diagnosis == record["diagnosis"] == json.loads(json.dumps(result.diagnosis))


def test_a_random_model_is_diagnosed_as_one():
    asked = []

    def spy(key, model, x, labels, **options):
        asked.append((model, options))
        return Diagnosis((), 0)

    _run(attack_set={}, diagnose=spy)
    _run(attack_set={}, diagnose=spy, random_fn=_random)
    assert [options["is_random"] for _, options in asked] == [False, True]
    assert asked[1][0] is _random
    # The certificates are not of the random model.
    assert asked[0][1]["certified"] is not None
    assert asked[1][1]["certified"] is None


def _random(keys, x):
    return x[:, :2] + jax.random.normal(keys[0], (len(x), 2))


def test_a_certificate_that_only_the_diagnosis_contradicts_is_no_certificate():
    told = {"name": "certificates", "status": "fail", "evidence": "1 example is both", "try_next": "find out"}
    result = dataclasses.replace(_run(attack_set={}), diagnosis={"checks": [told]})
    with pytest.raises(ContradictionError, match="1 example is both"):
        check(result)
