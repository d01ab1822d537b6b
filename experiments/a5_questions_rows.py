"""The questions that A5 leaves open, each with the rows of its table."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import a5_certificates, a5_training
from experiments import a5_questions_presets as presets
from experiments.a5_questions_lab import (
    Lab,
    Row,
    bounded_by,
    certified_by_margin,
    defended,
    distance,
    in_norm,
    made_for,
)
from experiments.a5_questions_presets import Config
from rdx import bounds, data, margins, metrics, robustify
from rdx.balls import Ball
from rdx.bounds import Interval, Verdict
from rdx.evaluate import ContradictionError, Evaluation, report
from rdx.types import Array, LogitsFn, Norm

DEFENCES = {"base": "none", "offline": "A5/O", "online": "A5/R", "joint": "A5/RC"}
# The classifier that A5/RC trains.
_OWN = "A5/RC's own"
_SALMAN, _MOON = "Salman 2021", "Moon 2022"


@dataclasses.dataclass(frozen=True)
class Question:
    """One question and its table.

    Attributes:
        title: what is asked.
        labels: headings of the columns in front.
        rows: builds the rows.
        note: what the reader has to know, made from the settings.
        headings: of the other columns, where a row has one record; empty where its records are its columns.
        show: the cells that a record fills.
    """

    title: str
    labels: tuple[str, ...]
    rows: Callable[[Lab], Iterator[Row]]
    note: Callable[[Config], str]
    headings: tuple[str, ...] = ()
    show: Callable[[Mapping[str, Any]], tuple[str, ...]] = lambda record: (report.cell(record["summary"]),)


def _transfer(lab: Lab) -> Iterator[Row]:
    config = lab.config
    made = [("base", "-"), *((recipe, maker) for recipe in ("offline", "online") for maker in config.makers)]
    for recipe, maker in (*made, ("joint", _OWN)):
        for judge in (*config.judges, _OWN):
            yield Row(
                "transfer", (DEFENCES[recipe], maker), judge, functools.partial(_judged, lab, recipe, maker, judge),
                config.ball, num_images=config.num_transferred,
                against=None if recipe == "base" else ((DEFENCES["base"], "-"), judge),
            )


def _judged(lab: Lab, recipe: str, maker: str, judge: str) -> tuple[LogitsFn, Array]:
    def made(classifier: str, recipe: str) -> tuple[LogitsFn, Array]:
        is_own = classifier == _OWN
        return made_for(lab, presets.CERTIFIED if is_own else classifier, "joint" if is_own else recipe)

    x = data.to_float(lab.run.test.images) if recipe == "base" else made(maker, recipe)[1]
    return made(judge, "base")[0], x


def _norms(lab: Lab) -> Iterator[Row]:
    for norm, eps in lab.config.norms:
        for recipe in DEFENCES:
            make = functools.partial(_in_norm, lab, norm, eps, recipe)
            labels = (norm, f"{eps:g}")
            yield Row("norms", labels, DEFENCES[recipe], make, Ball(norm, eps), against=_undefended(recipe, labels))


def _undefended(recipe: str, labels: tuple[str, ...]) -> tuple[tuple[str, ...], str] | None:
    """Names what a defended cell is compared with: the undefended one in its row."""
    return None if recipe == "base" else (labels, DEFENCES["base"])


def _in_norm(lab: Lab, norm: Norm, eps: float, recipe: str) -> tuple[LogitsFn, Array]:
    return defended(in_norm(lab, norm), lab.config.cell(recipe, eps_classifier=eps, eps=eps))


def _looseness(lab: Lab) -> Iterator[Row]:
    config = lab.config
    methods = {"IBP": bounds.ibp, "CROWN-IBP": bounds.crown_ibp}
    rows = {
        ("base", "-"): functools.partial(made_for, lab, presets.CERTIFIED, "base"),
        **{(recipe, name): functools.partial(_bounded_by, lab, method, recipe)
           for recipe in ("offline", "online", "joint") for name, method in methods.items()},
    }
    for (recipe, trained), make in rows.items():
        against = {"IBP": ((DEFENCES["base"], "-"), ""), "CROWN-IBP": ((DEFENCES[recipe], "IBP"), "")}
        yield Row(
            "looseness", (DEFENCES[recipe], trained), "", make, config.ball, num_images=config.base.num_compared,
            measure=functools.partial(_certify_by_all, config), against=against.get(trained),
        )


def _bounded_by(lab: Lab, method: Callable[..., Interval], recipe: str) -> tuple[LogitsFn, Array]:
    return defended(bounded_by(lab, method), lab.config.cell(recipe))


def _certify_by_all(
    config: Config, logits_fn: LogitsFn, x: Array, labels: np.ndarray, result: Evaluation
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Certifies by every method, and verifies completely what none certifies and no attack broke."""
    flags = a5_certificates.compare(logits_fn, x, labels, ball=config.ball, by_crown_ibp=result.certified)
    proved = np.stack(list(flags.values())).any(axis=0)
    verdicts = np.full(len(labels), "not asked", dtype="<U9")
    for row in np.flatnonzero(~proved & ~result.broken)[: config.num_verified]:
        verdicts[row] = bounds.verify(
            margins.of(logits_fn), config.ball.region(x[row : row + 1]), jnp.asarray(labels[row : row + 1]),
            timeout_s=config.timeout_s, max_domains=config.max_domains,
        ).verdict.value
    if (proved & result.broken).any():
        raise ContradictionError(f"One of {', '.join(flags)} certifies what an attack broke: {flags}")
    proved |= verdicts == Verdict.CERTIFIED.value
    told = {
        "compared": a5_certificates.errors(flags),
        "verified": {verdict.value: int((verdicts == verdict.value).sum()) for verdict in Verdict},
        "at_least": metrics.rate(result.broken | (verdicts == Verdict.FALSIFIED.value)),
        "at_most": metrics.rate(~proved),
    }
    return told, {"compared": np.stack(list(flags.values())), "verdict": verdicts}


def _show_looseness(record: Mapping[str, Any]) -> tuple[str, ...]:
    errors = [record["summary"]["clean"], record["summary"]["attacked"], *record["compared"].values()]
    between = " to ".join(report.percent(record[name]) for name in ("at_least", "at_most"))
    return *map(report.percent, errors), between


def _first_mover(lab: Lab) -> Iterator[Row]:
    for recipe in ("base", "online", "joint"):
        make = functools.partial(made_for, lab, presets.CERTIFIED, recipe)
        labels, undefended = (DEFENCES[recipe],), ((DEFENCES["base"],), "defender first")
        against = None if recipe == "base" else undefended
        yield Row("first_mover", labels, "defender first", make, lab.config.ball, against=against)
        if recipe != "base":
            make = functools.partial(_through, lab, recipe)
            # Intervals of the robustifier cover the defender's whole ball: only lines through all layers tell anything.
            methods = (bounds.crown_ibp, bounds.crown)
            yield Row(
                "first_mover", labels, "attacker first", make, lab.config.ball, methods,
                against=(labels, "defender first"),
            )


def _through(lab: Lab, recipe: str) -> tuple[LogitsFn, Array]:
    """Puts classifier and robustifier together: what an attacker who moves first meets, at the original images."""
    cell = lab.config.cell(recipe)
    logits_fn, params = a5_training.networks(lab.run, cell)
    robustifier_fn = lab.run.robustifier.logits_fn(params, {})
    both = robustify.online.through(robustifier_fn, logits_fn, defense=lab.run.defense(cell))
    return both, data.to_float(lab.run.test.images)


def _initial_classifier(lab: Lab) -> Iterator[Row]:
    for eps in lab.config.sweep:
        for recipe in ("base", "online", "joint"):
            make = functools.partial(defended, lab.run, lab.config.cell(recipe, eps_classifier=eps))
            labels = (f"{eps:g}",)
            yield Row(
                "initial_classifier", labels, DEFENCES[recipe], make, lab.config.ball,
                against=_undefended(recipe, labels),
            )


def _linf_distance(lab: Lab) -> Iterator[Row]:
    ball, relu, distances = lab.config.ball, ("relu", "CROWN-IBP"), ("linf-distance", "half the margin")
    for recipe in ("base", "offline", "online"):
        make = functools.partial(made_for, lab, presets.CERTIFIED, recipe)
        yield Row("linf_distance", relu, DEFENCES[recipe], make, ball, against=_undefended(recipe, relu))
    for recipe in ("base", "offline", "online"):
        make = functools.partial(_by_distance, lab, recipe)
        yield Row(
            "linf_distance", distances, DEFENCES[recipe], make, ball, methods=(certified_by_margin,),
            against=(relu, DEFENCES["base"]) if recipe == "base" else _undefended(recipe, distances),
        )


def _by_distance(lab: Lab, recipe: str) -> tuple[LogitsFn, Array]:
    return defended(distance(lab), lab.config.cell(recipe))


def _baselines(lab: Lab) -> Iterator[Row]:
    nothing = (DEFENCES["base"], "nothing")
    makes = {
        nothing: functools.partial(made_for, lab, presets.CERTIFIED, "base"),
        (_SALMAN, "label, images"): functools.partial(_salman, lab),
        (_MOON, "images"): functools.partial(_moon, lab),
        ("A5/O", "label, images"): functools.partial(made_for, lab, presets.CERTIFIED, "offline"),
        ("A5/R", "training images"): functools.partial(made_for, lab, presets.CERTIFIED, "online"),
        ("A5/RC", "training images, retrains C"): functools.partial(made_for, lab, presets.CERTIFIED, "joint"),
    }
    for labels, make in makes.items():
        against = None if labels == nothing else (nothing, "")
        yield Row("baselines", labels, "", make, lab.config.ball, against=against)


def _salman(lab: Lab) -> tuple[LogitsFn, Array]:
    logits_fn, x = made_for(lab, presets.CERTIFIED, "base")
    return logits_fn, robustify.unadversarial(
        jax.random.key(lab.run.config.seed), logits_fn, x, jnp.asarray(lab.run.test.labels),
        defense=lab.run.defense(lab.config.cell("offline")), num_steps=lab.config.unadversarial_steps,
    )


def _moon(lab: Lab) -> tuple[LogitsFn, Array]:
    logits_fn, x = made_for(lab, presets.CERTIFIED, "base")
    return logits_fn, robustify.preemptive(
        jax.random.key(lab.run.config.seed), logits_fn, x, None, defense=lab.run.defense(lab.config.cell("offline")),
        threat=lab.config.ball, num_steps=lab.config.preemptive_steps,
    )


def _same(config: Config) -> str:
    """Says what most tables share."""
    return f"eps_A = eps_A^C = {config.eps:g} and eps_D = {config.base.eps_defense[0]:g}, linf."


QUESTIONS = {
    "transfer": Question(
        "Does a robustified image stay certified or robust for other classifiers?", ("defence", "made for"), _transfer,
        lambda config: (
            f"{_same(config)} A row has images that were defended for one classifier, a column the classifier that "
            "judges and is attacked. \"another seed\" and \"another architecture\" are trained for certificates as "
            f"\"certified\" is, \"adversarial\" has its network and is trained by PGD with {config.adversarial_steps} "
            f"steps, \"vanilla\" on clean images. On the first {config.num_transferred} images."
        ),
    ),
    "norms": Question(
        "How does A5 do in other norms?", ("norm", "eps_A = eps_A^C = eps_D"), _norms,
        lambda config: (
            "Defender and attacker have balls of the row's norm and radius, and the classifier was trained for the "
            f"same. Why these radii: {config.why_radii}. A5/O takes RMSProp in linf and steepest descent in the "
            "others. Certified by CROWN-IBP for the row's ball."
        ),
    ),
    "looseness": Question(
        "How much of A5's gain is looseness of IBP?", ("defence", "prepared with"), _looseness,
        lambda config: (
            f"{_same(config)} \"prepared with\": the bounds that the defence is trained by, throughout. CROWN-IBP is "
            f"intersected with IBP; alpha-CROWN takes {a5_certificates.ALPHA_STEPS} steps. In the last column up to "
            f"{config.num_verified} images that are neither certified nor broken are verified completely, each with up "
            f"to {config.max_domains} subdomains and {config.timeout_s:g} s: the error under the strongest attack lies "
            f"in between. On the first {config.base.num_compared} images."
        ),
        headings=("clean", "attacked", *a5_certificates.METHODS, "true robust error"), show=_show_looseness,
    ),
    "first_mover": Question(
        "What if the attacker moves first?", ("defence",), _first_mover,
        lambda config: (
            f"{_same(config)} Defender first: the attacker moves the defended image, as in the paper. Attacker first: "
            "the robustifier is applied to the attacked image, the attacker knows it and attacks through it, and "
            "bounds are those of robustifier and classifier as one function, by CROWN at every layer."
        ),
    ),
    "initial_classifier": Question(
        "How good must the initial classifier be?", ("eps_A^C",), _initial_classifier,
        lambda config: (
            f"eps_A = {config.eps:g} and eps_D = {config.base.eps_defense[0]:g}, linf; the initial classifier is "
            "trained for eps_A^C, on clean images where that is 0. A5/R takes it as it is, A5/RC goes on training it."
        ),
    ),
    "linf_distance": Question(
        "Does A5 help a linf-distance net?", ("classifier", "certified by"), _linf_distance,
        lambda config: (
            f"{_same(config)} The linf-distance net is that of `experiments.certified_training`. Logits are "
            "1-Lipschitz, so half of the least margin is the certified radius, and A5 prepares with that bound, whose "
            "subgradient moves one pixel a logit."
        ),
    ),
    "baselines": Question(
        "What do the baselines reach that the paper names?", ("defence", "what it sees"), _baselines,
        lambda config: (
            f"{_same(config)} Salman: the loss is minimised over the defender's ball, with no attacker in mind, in "
            f"{config.unadversarial_steps} steps. Moon: the loss under PGD is, in {config.preemptive_steps} steps, for "
            "the classifier's own prediction instead of the label."
        ),
        headings=("clean [attacked, certified]",),
    ),
}
