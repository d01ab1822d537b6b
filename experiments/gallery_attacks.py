"""The attacks of `experiments.attack_gallery`, one line each, and how a line becomes a callable."""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
from jax.tree_util import Partial

from experiments.gallery_presets import Config
from rdx import attacks, goals, losses
from rdx.attacks import Loop
from rdx.attacks.prgf import gradient_prior
from rdx.attacks.transfer import diverse_inputs, smoothing_kernel, transfer, translation_invariant
from rdx.types import Array, AttackResult, LogitsFn, Norm

WHITE, MINIMAL, SCORE, DECISION, TRANSFER, SUITE = (
    "white box", "minimal norm", "score", "decision", "transfer", "suite"
)


def _nothing(config: Config) -> dict[str, Any]:
    del config
    return {}


def _same(substitute: LogitsFn) -> LogitsFn:
    return substitute


def _fused(*substitutes: LogitsFn) -> Partial:
    return Partial(_mean_logits, attacks.ensemble(*substitutes))


def _mean_logits(ensemble: Partial, x: Array) -> Array:
    return ensemble(x).mean(axis=1)


@dataclasses.dataclass(frozen=True)
class Entry:
    """One attack of the gallery.

    Attributes:
        attack: its name in `rdx.attacks`.
        kind: what it knows and looks for.
        norms: in which norms it is run.
        options: from the preset to the attack's keywords.
        label: its name in the table; `attack` if empty.
        climbs: the loss that it climbs, where that is not its default.
        substitute: what transfer attacks make of the substitutes before they attack them.
        num_substitutes: how many other nets it is made on or helped by.
        prior: whether it is given the substitute's gradient, as `prior_fn`.
        seeks_distance: whether it looks for the smallest perturbation, so that one run gives success at every radius;
            minimal-norm and decision-based attacks do.
    """

    attack: str
    kind: str
    norms: tuple[Norm, ...]
    options: Callable[[Config], Mapping[str, Any]] = _nothing
    label: str = ""
    climbs: Callable[..., Array] | None = None
    substitute: Callable[..., LogitsFn] = _same
    num_substitutes: int = 0
    prior: bool = False
    seeks_distance: bool | None = None

    @property
    def name(self) -> str:
        """The name in tables, pictures and records."""
        return self.label or self.attack

    @property
    def is_minimal(self) -> bool:
        """Whether it looks for the smallest perturbation."""
        return self.kind in (MINIMAL, DECISION) if self.seeks_distance is None else self.seeks_distance


@dataclasses.dataclass(frozen=True)
class Case:
    """An attack in one norm, and the radius that robust accuracy is counted at."""

    entry: Entry
    norm: Norm
    eps: float

    @property
    def name(self) -> str:
        """The record's name, without the net's."""
        return f"{self.norm}-{self.entry.name.replace(',', '').replace(' ', '-')}"


def _steps(config: Config) -> dict[str, Any]:
    return {"num_steps": config.num_steps}


def _quarter(config: Config) -> dict[str, Any]:
    # Towards each of nine targets.
    return {"num_steps": max(2, config.num_steps // 4)}


def _penalty(config: Config) -> dict[str, Any]:
    return {"num_search_steps": config.num_search_steps, "num_steps": config.penalty_steps,
            "step_size": config.penalty_rate}


def _penalty_linf(config: Config) -> dict[str, Any]:
    # As many steps for a constant, and as many constants, as by default.
    return {"num_steps": 5 * config.penalty_steps, "patience": max(1, config.penalty_steps // 10),
            "step_size": config.penalty_rate / 2}


def _queries(config: Config) -> dict[str, Any]:
    return {"num_queries": config.num_queries}


def _samples(config: Config) -> dict[str, Any]:
    return {"num_steps": max(1, config.num_queries // config.num_samples), "num_samples": config.num_samples}


def _guided(config: Config) -> dict[str, Any]:
    # A step that follows the prior alone costs two queries: the budget ends the attack, not the number of steps.
    return {"num_steps": max(1, config.num_queries // 2), "num_samples": config.num_samples}


def _coordinates(config: Config) -> dict[str, Any]:
    # A single constant, as the paper has it where queries are dear; two queries a coordinate.
    return {"num_searches": 1, "initial_c": 10.0, "num_coordinates": max(1, config.num_samples // 2),
            "num_steps": max(1, config.num_queries // config.num_samples)}


def _suite(config: Config) -> dict[str, Any]:
    return {"num_steps": config.suite_steps, "num_queries": config.suite_queries}


def _diverse(substitute: LogitsFn) -> LogitsFn:
    return diverse_inputs(jax.random.key(0), substitute)


def _invariant(substitute: LogitsFn) -> LogitsFn:
    # 15 of 299 rows in the paper; a kernel that wide would blur small images to nothing.
    return translation_invariant(_diverse(substitute), smoothing_kernel(size=3))


LINF: tuple[Norm, ...] = ("linf",)
L2: tuple[Norm, ...] = ("l2",)
TWO: tuple[Norm, ...] = ("linf", "l2")
ALL: tuple[Norm, ...] = ("linf", "l2", "l1")
ENTRIES = (
    Entry("fgsm", WHITE, ALL),
    Entry("rfgsm", WHITE, TWO),
    Entry("bim", WHITE, TWO, _steps),
    Entry("mim", WHITE, TWO, _steps),
    Entry("pgd", WHITE, ALL, _steps),
    Entry("apgd", WHITE, ALL, _steps),
    Entry("apgd", WHITE, ALL, _steps, label="apgd DLR", climbs=losses.dlr),
    Entry("apgd_targeted", WHITE, ALL, _quarter),
    Entry("deepfool", MINIMAL, TWO, _steps),
    Entry("ddn", MINIMAL, L2, _steps),
    Entry("fmn", MINIMAL, ALL, _steps),
    Entry("fab", MINIMAL, ALL, _steps),
    Entry("fab_targeted", MINIMAL, ALL, _quarter),
    Entry("cw", MINIMAL, L2, _penalty),
    Entry("cw_linf", MINIMAL, LINF, _penalty_linf),
    Entry("ead", MINIMAL, ("l1", "l2"), _penalty),
    Entry("nes", SCORE, TWO, _samples),
    Entry("spsa", SCORE, TWO, _samples),
    Entry("nattack", SCORE, TWO, _samples),
    Entry("prgf", SCORE, TWO, _samples, label="rgf"),
    Entry("prgf", SCORE, TWO, _guided, num_substitutes=1, prior=True),
    Entry("genattack", SCORE, LINF, lambda c: {"num_steps": max(1, c.num_queries // 10)}),
    Entry("square", SCORE, ALL, lambda c: {"num_steps": c.num_queries}),
    Entry("zoo", SCORE, L2, _coordinates, seeks_distance=True),
    Entry("boundary", DECISION, L2, _queries),
    Entry("evolutionary", DECISION, L2, _queries),
    Entry("hopskipjump", DECISION, TWO, _queries),
    Entry("opt", DECISION, L2, _queries),
    Entry("fgsm", TRANSFER, TWO, label="fgsm transferred", num_substitutes=1),
    Entry("bim", TRANSFER, TWO, _steps, label="bim transferred", num_substitutes=1),
    Entry("mim", TRANSFER, TWO, _steps, label="mim transferred", num_substitutes=1),
    Entry("mim", TRANSFER, LINF, _steps, label="mim transferred, diverse inputs", substitute=_diverse,
          num_substitutes=1),
    Entry("mim", TRANSFER, LINF, _steps, label="mim transferred, translation invariant", substitute=_invariant,
          num_substitutes=1),
    Entry("mim", TRANSFER, TWO, _steps, label="mim transferred from two nets", substitute=_fused, num_substitutes=2),
    Entry("autoattack", SUITE, ALL, _suite),
    Entry("autoattack", SUITE, LINF, lambda c: {**_suite(c), "version": "plus"}, label="autoattack plus"),
)


def cases(config: Config) -> Iterator[Case]:
    """Lists every attack in every norm that the preset and the attack have, or only in the attack's first."""
    for norm, eps in config.radii:
        for entry in ENTRIES:
            if norm in entry.norms[: None if config.every_norm else 1]:
                yield Case(entry, norm, eps)


def bind(
    entry: Entry, config: Config, *substitutes: LogitsFn, trace: bool = True
) -> Callable[..., AttackResult]:
    """Binds an attack's settings.

    Args:
        entry: the attack.
        config: the preset.
        *substitutes: `entry.num_substitutes` other nets.
        trace: whether the result tells the course of the attack; never where another model is fooled on the way or
            several attacks take part, there only the end counts.

    Returns:
        An attack for `evaluate.curves`.

    Raises:
        ValueError: if there are fewer substitutes than are needed, or more.
    """
    attack, options = getattr(attacks, entry.attack), dict(entry.options(config))
    if len(substitutes) != entry.num_substitutes:
        raise ValueError(f"{entry.name} needs {entry.num_substitutes} substitutes, not {len(substitutes)}.")
    if entry.prior:
        options["prior_fn"] = gradient_prior(*substitutes)
    if entry.climbs is not None:
        options["goal"] = goals.misclassify(entry.climbs)
    if "loop" in inspect.signature(attack).parameters and entry.kind not in (TRANSFER, SUITE):
        # Budgets are those of the paper: nobody begins a step beyond it.
        budget = config.num_queries if entry.kind in (SCORE, DECISION) else None
        options["loop"] = Loop(trace=trace, max_queries=budget)
    bound = functools.partial(attack, **options)
    return transfer(bound, entry.substitute(*substitutes)) if entry.kind == TRANSFER else bound
