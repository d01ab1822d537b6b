"""The worst case over attacks beside a certificate, example by example, and the check that they do not contradict.

Per example and at the same radius, nothing is both certified and attacked; so the clean error is at most the attacked
error, and that is at most the certified error, all counted on the same examples. A violation is a bug in the bounds, in
an attack or in the bookkeeping, and no table is made of it.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from rdx import bounds, compilation
from rdx.attacks import resumption, signatures
from rdx.attacks.signatures import Attack
from rdx.balls import Ball
from rdx.evaluate import shared
from rdx.evaluate.diagnostics import Diagnosis, diagnose
from rdx.types import Array, ArrayLike, Key, LogitsFn, RandomLogitsFn

# A method of `rdx.bounds`, `(fn, region, *args) -> Interval`.
Method: TypeAlias = Callable[..., bounds.Interval]


class ContradictionError(AssertionError):
    """A certificate and an attack, or a certificate and the clean prediction, contradict each other."""


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Per-example results over `N` examples.

    Attributes:
        index: place in the data set, int32.
        label: true class.
        prediction: class predicted for the (defended) input; -1 where a logit is NaN, which is always wrong.
        certified: certified at the attacker's radius, by `bounds.certify` and by `bounds.certify_in_float64`.
        margin_lower: the least certified margin, by the best of the methods that were tried on the example.
        attacked: whether any attack was run on the example.
        broken: wrong clean, or made wrong by some attack; meaningful where `counted`.
        adversarial_prediction: class predicted for the strongest input found, -1 where a logit is NaN; the clean one
            where none was tried.
        distance: norm of the strongest perturbation tried.
        forwards: forward passes spent by all attacks.
        gradients: gradients spent by all attacks.
        counted: whether the example belongs to the subset on which all three errors are counted.
        broken_by: index into the attacks, -1 where the example is wrong already or stands.
        certified_by: index into the methods, -1 where it is not certified; None in records from before this was kept.
        diagnosis: whether the attacked error can be trusted, from `diagnostics.diagnose`; None where nobody asked.
    """

    index: np.ndarray
    label: np.ndarray
    prediction: np.ndarray
    certified: np.ndarray
    margin_lower: np.ndarray
    attacked: np.ndarray
    broken: np.ndarray
    adversarial_prediction: np.ndarray
    distance: np.ndarray
    forwards: np.ndarray
    gradients: np.ndarray
    counted: np.ndarray
    broken_by: np.ndarray
    certified_by: np.ndarray | None = None
    diagnosis: Mapping[str, Any] | None = None


def evaluate(
    key: Key, logits_fn: LogitsFn, x: Array, labels: ArrayLike, *, ball: Ball, attacks: Mapping[str, Attack],
    method: Method | Sequence[Method] = bounds.crown_ibp, num_attacked: int | None = None, cross_check: int = 100,
    batch_size: int = 500, index: np.ndarray | None = None, on_progress: Callable[[str, int, int], None] | None = None,
    checkpoint: str | Path | None = None, random_fn: RandomLogitsFn | None = None,
    diagnose: Callable[..., Diagnosis] | None = diagnose,
) -> Evaluation:
    """Evaluates a classifier on inputs that may have been defended already.

    All examples are predicted and certified. The first `num_attacked` are counted for the attacked error: among them
    every correct, uncertified example is attacked, each attack meeting only what still stands; a certified one cannot
    be broken, and `cross_check` of them are attacked nevertheless, to test the certificate.

    Args:
        key: the run's key; per-example keys are folded from `index`.
        logits_fn: `x [B, ...] -> logits [B, K]`; a `Partial`, so that compilations are shared.
        x: inputs, shape `[N, ...]`.
        labels: shape `[N]`, int.
        ball: the attacker's ball; one `eps` for all examples.
        attacks: by name, weakest first, each `(key, logits_fn, x, labels, *, ball, index) -> AttackResult`, of which it
            need not take `key` and `index`. Settings that differ from example to example cannot be bound to an attack,
            but for the data of its `goal`; whatever that is, broken is what is misclassified.
        method: how to certify; or several methods, the cheapest first, of which each is tried on the correct examples
            that those before left open, such as `(bounds.ibp, bounds.crown_ibp, bounds.crown)`.
        num_attacked: size of the counted subset; all by default.
        cross_check: how many certified examples of the subset are attacked as well.
        batch_size: examples per compiled call; the last batch is filled up, never dropped.
        index: place of each example in the data set, shape `[N]`; 0..N-1 by default.
        on_progress: called with a stage's name, the examples done and their total.
        checkpoint: a file in which certificates and every finished batch of attacks are kept; an evaluation that was
            interrupted goes on from there, and the file disappears at the end. That of another evaluation is refused,
            as far as they can be told apart: not by what a plain closure holds, see
            `rdx.attacks.resumption.digest`.
        random_fn: `(keys [B], x) -> logits`, a random model that `logits_fn` stands for, by the mean of some draws say.
            It is diagnosed in its place, but for the certificates, which are of `logits_fn`.
        diagnose: searches the first examples for signs that the attacked error is an illusion, as `evaluate.diagnose`
            does; `partial(evaluate.diagnose, substitute=other, is_thorough=True)` asks more. None to leave it out.

    Returns:
        Per-example results.

    Raises:
        ContradictionError: where an example is certified and broken.
        ValueError: on inputs, labels or a ball that do not fit, an attack that leaves the ball, or the checkpoint of
            another evaluation.
    """
    report = on_progress or (lambda *_: None)
    label, logits_fn = np.asarray(labels), compilation.as_partial(logits_fn)
    shared.check_inputs(logits_fn, x, label, ball)
    index = np.arange(len(label), dtype=np.int32) if index is None else np.asarray(index, np.int32)
    methods = (method,) if callable(method) else tuple(method)
    settings = (tuple(attacks.items()), methods, num_attacked, cross_check, batch_size)
    given = (settings, key, logits_fn, x, label, index, ball)
    store = _Store(checkpoint, "" if checkpoint is None else resumption.digest(*given))
    if (saved := store.load()) is None:
        certificates = _certify(logits_fn, x, label, ball, methods, batch_size, report)
        saved = _Progress(*certificates, _nothing_found(len(label)), np.array([0, 0]))
    prediction, certified_by, margin_lower = saved[:3]
    certified = certified_by >= 0
    counted = np.arange(len(label)) < (len(label) if num_attacked is None else num_attacked)
    is_correct = prediction == label
    checked = counted & certified & (np.cumsum(counted & certified) <= cross_check)
    attacked = ((counted & is_correct & ~certified) | checked) & bool(attacks)
    found = _attack(
        key, logits_fn, x, label, ball, attacks, np.flatnonzero(attacked), index, batch_size, report, saved, store
    )
    diagnosis = None
    if diagnose is not None:
        report("diagnose", 0, 1)
        told = diagnose(
            shared.key_of(key, "diagnosis"), logits_fn if random_fn is None else random_fn, x, label, ball=ball,
            is_random=random_fn is not None, certified=certified if random_fn is None else None,
        )
        diagnosis = told.summary()
        report("diagnose", 1, 1)
    store.clear()
    result = Evaluation(
        index=index, label=label, prediction=prediction, certified=certified, certified_by=certified_by,
        margin_lower=margin_lower, attacked=attacked, broken=~is_correct | found.pop("success"), counted=counted,
        adversarial_prediction=np.where(attacked, found.pop("adversarial_prediction"), prediction),
        diagnosis=diagnosis, **found,
    )
    check(result)
    return result


def check(result: Evaluation) -> None:
    """Raises where a certificate is contradicted.

    Raises:
        ContradictionError: naming the examples.
    """
    wrong = np.flatnonzero(result.certified & (result.prediction != result.label))
    broken = np.flatnonzero(result.certified & result.broken)
    for what, rows in (("misclassified without an attack", wrong), ("broken by an attack", broken)):
        if rows.size:
            raise ContradictionError(
                f"{rows.size} examples are certified and {what}, the first at index {result.index[rows[:5]].tolist()}: "
                "bounds, attack or labels are wrong; no table is written from this evaluation."
            )
    for told in result.diagnosis["checks"] if result.diagnosis else ():
        if told["name"] == "certificates" and told["status"] == "fail":
            raise ContradictionError(f"The diagnosis says that {told['evidence']}: {told['try_next']}.")


def _certify(
    logits_fn: LogitsFn, x: Array, labels: np.ndarray, ball: Ball, methods: Sequence[Method], batch_size: int,
    report: Callable,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Predicts and certifies: every method has its turn with the correct examples that are not certified yet."""
    rows = np.arange(len(labels))
    predicted = [
        np.asarray(shared.predict_compiled(logits_fn, x[filled]))[: len(taken)]
        for taken, filled in shared.walk(rows, batch_size)
    ]
    prediction = np.concatenate(predicted)
    certified_by, margin_lower = np.full(len(labels), -1), np.full(len(labels), np.nan, np.float32)
    for number, method in enumerate(methods):
        done, certified = 0, np.zeros(len(labels), bool)
        for taken, filled in shared.walk(rows, batch_size):
            found = _compiled_certify(logits_fn, x[filled], labels[filled], ball=ball, method=method)
            certified[taken] = np.asarray(found.certified)[: len(taken)]
            margins_lower = np.asarray(found.margins_lower)[: len(taken)].min(axis=1)
            margin_lower[taken] = np.fmax(margin_lower[taken], margins_lower)
            done += len(taken)
            report("certify", done, len(rows))
        proposed = np.flatnonzero(certified)
        is_confirmed = _confirm(logits_fn, x, labels, ball, method, proposed, batch_size, report)
        certified_by[proposed[is_confirmed]] = number
        rows = np.flatnonzero((certified_by < 0) & (prediction == labels))
    return prediction, certified_by, margin_lower


def _confirm(
    logits_fn: LogitsFn, x: Array, labels: np.ndarray, ball: Ball, method: Method, rows: np.ndarray, batch_size: int,
    report: Callable,
) -> np.ndarray:
    """Tells which certificates of some rows float64 confirms: no verdict rests on the rounding of float32."""
    kept = [np.zeros(0, bool)]
    for taken, filled in shared.walk(rows, batch_size):
        given = jnp.asarray(labels[filled])
        proof = bounds.certify_in_float64(logits_fn, x[filled], given, ball=ball, method=method)
        kept.append(np.asarray(proof.certified)[: len(taken)])
        report("confirm", sum(map(len, kept)), len(rows))
    return np.concatenate(kept)


_compiled_certify = jax.jit(bounds.certify, static_argnames="method")


def _attack(
    key: Key, logits_fn: LogitsFn, x: Array, labels: np.ndarray, ball: Ball, attacks: Mapping[str, Attack],
    rows: np.ndarray, index: np.ndarray, batch_size: int, report: Callable, saved: "_Progress", store: "_Store",
) -> dict[str, Any]:
    found, (first, begun) = saved.found, saved.place
    for number, (name, attack) in list(enumerate(attacks.items()))[first:]:
        # An attack that was interrupted meets again whom it broke before.
        standing = rows[np.isin(found["broken_by"][rows], (-1, number))]
        done, attack_key = begun if number == first else 0, shared.key_of(key, name)
        for taken, filled in shared.walk(standing[done:], batch_size):
            run = signatures.keyed(signatures.restrict(attack, filled, len(x)))
            result = run(attack_key, logits_fn, x[filled], labels[filled], ball=ball, index=index[filled])
            shared.check_attacked(name, result.x_adv, x[filled], ball)
            predicted = np.asarray(shared.predict_compiled(logits_fn, result.x_adv))[: len(taken)]
            # Success is what a fresh forward pass at full precision says, not what the attack believes.
            success = predicted != labels[taken]
            found["success"][taken] = success
            found["broken_by"][taken] = np.where(success, number, -1)
            found["adversarial_prediction"][taken] = predicted
            found["distance"][taken] = np.asarray(result.distance)[: len(taken)]
            for count in ("forwards", "gradients"):
                found[count][taken] += np.asarray(getattr(result, count))[: len(taken)]
            done += len(taken)
            report(name, done, len(standing))
            store.save(saved._replace(place=np.array([number, done])))
    return found


class _Progress(NamedTuple):
    """What an evaluation has done: certificates, what attacks found, and the attack and example that come next."""

    prediction: np.ndarray
    certified_by: np.ndarray
    margin_lower: np.ndarray
    found: dict[str, np.ndarray]
    place: np.ndarray


class _Store:
    """Keeps the progress in a file, where one is named."""

    def __init__(self, path: str | Path | None, fingerprint: str) -> None:
        self.path, self.fingerprint = path, fingerprint

    def load(self) -> _Progress | None:
        if self.path is None or not Path(self.path).exists():
            return None
        places, margins = np.zeros(0, int), np.zeros(0, np.float32)
        like = _Progress(places, places, margins, _nothing_found(0), places)
        return resumption.load(self.path, self.fingerprint, like)

    def save(self, progress: _Progress) -> None:
        if self.path is not None:
            resumption.save(self.path, self.fingerprint, progress)

    def clear(self) -> None:
        if self.path is not None:
            Path(self.path).unlink(missing_ok=True)


def _nothing_found(total: int) -> dict[str, np.ndarray]:
    return {
        "success": np.zeros(total, bool), "adversarial_prediction": np.zeros(total, np.int64),
        "distance": np.zeros(total, np.float32), "forwards": np.zeros(total, np.int64),
        "gradients": np.zeros(total, np.int64), "broken_by": np.full(total, -1, np.int64),
    }
