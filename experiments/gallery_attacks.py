"""The attacks of `experiments.attack_gallery`, one line each, and how a line becomes a callable."""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from experiments.gallery_presets import Config
from rdx import attacks
from rdx.attacks import Loop
from rdx.evaluate import shared
from rdx.types import AttackResult, LogitsFn, Norm

WHITE, MINIMAL, SCORE, DECISION, TRANSFER, SUITE = (
    "white box", "minimal norm", "score", "decision", "transfer", "suite"
)
# Kinds that look for the smallest perturbation: one run gives the success at every radius.
MINIMAL_NORM = (MINIMAL, DECISION)
# What is fooled on the way is another model, or several attacks take part: only the end counts.
UNTRACED = (TRANSFER, SUITE)


def _nothing(config: Config) -> dict[str, Any]:
    del config
    return {}


@dataclasses.dataclass(frozen=True)
class Entry:
    """One attack of the gallery.

    Attributes:
        attack: its name in `rdx.attacks`.
        kind: what it knows and looks for.
        norms: in which norms it is run.
        options: from the preset to the attack's keywords.
        label: its name in the table; `attack` if empty.
    """

    attack: str
    kind: str
    norms: tuple[Norm, ...]
    options: Callable[[Config], Mapping[str, Any]] = _nothing
    label: str = ""

    @property
    def name(self) -> str:
        """The name in tables, pictures and records."""
        return self.label or self.attack


@dataclasses.dataclass(frozen=True)
class Case:
    """An attack in one norm, and the radius that robust accuracy is counted at."""

    entry: Entry
    norm: Norm
    eps: float

    @property
    def name(self) -> str:
        """The record's name, without the net's."""
        return f"{self.norm}-{self.entry.name.replace(' ', '-')}"


def _steps(config: Config) -> dict[str, Any]:
    return {"num_steps": config.num_steps}


TWO: tuple[Norm, ...] = ("linf", "l2")
ALL: tuple[Norm, ...] = ("linf", "l2", "l1")
ENTRIES = (
    Entry("fgsm", WHITE, TWO),
    Entry("pgd", WHITE, ALL, _steps),
    Entry("apgd", WHITE, ALL, _steps),
    Entry("apgd_targeted", WHITE, TWO, lambda c: {"num_steps": max(2, c.num_steps // 4)}),
    Entry("pgd", TRANSFER, TWO, _steps, label="pgd transferred"),
)


def cases(config: Config) -> Iterator[Case]:
    """Lists every attack in every norm that the preset and the attack have, or only in the attack's first."""
    for norm, eps in config.radii:
        for entry in ENTRIES:
            if norm in entry.norms[: None if config.every_norm else 1]:
                yield Case(entry, norm, eps)


def bind(case: Case, config: Config, substitute: LogitsFn | None = None) -> Callable[..., AttackResult]:
    """Binds an attack's settings.

    Args:
        case: the attack.
        config: the preset.
        substitute: what transfer attacks are made on.

    Returns:
        An attack for `evaluate.curves`; with a trace, except for those of which only the end counts.

    Raises:
        ValueError: if a transfer attack has no substitute.
    """
    entry = case.entry
    attack = getattr(attacks, entry.attack)
    options = dict(entry.options(config))
    if "loop" in inspect.signature(attack).parameters and entry.kind not in UNTRACED:
        options.setdefault("loop", Loop(trace=True))
    bound = functools.partial(attack, **options)
    if entry.kind != TRANSFER:
        return bound
    if substitute is None:
        raise ValueError(f"{entry.name} is made on a substitute: give one.")
    return functools.partial(_transferred, bound, substitute)


def _transferred(
    attack: Callable[..., AttackResult], substitute: LogitsFn, key: Any, logits_fn: LogitsFn, *arguments: Any,
    **options: Any,
) -> AttackResult:
    """Attacks the substitute; whoever judges does so by `logits_fn`."""
    del logits_fn
    return shared.keyed(attack)(key, substitute, *arguments, **options)
