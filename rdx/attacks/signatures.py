"""How callers that run any attack call it: one signature for all, and goals whose data follow the examples."""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any, TypeAlias

import jax
import numpy as np

from rdx.goals import Goal
from rdx.types import AttackResult, Key

# (key, logits_fn, x, labels, *, ball, index, loop) -> AttackResult, and not every attack takes all of them
Attack: TypeAlias = Callable[..., AttackResult]


def takes_key(attack: Attack) -> bool:
    """Tells whether an attack takes a key, by name or among any positional arguments."""
    parameters = inspect.signature(attack).parameters.values()
    return any(parameter.name == "key" or parameter.kind is parameter.VAR_POSITIONAL for parameter in parameters)


def keyed(attack: Attack) -> Attack:
    """Gives an attack those of the arguments `key`, `index` and `loop` that it does not take, such as FGSM all three.

    Args:
        attack: any attack, its settings bound with `functools.partial`.

    Returns:
        `(key, logits_fn, x, labels, *, ball, index, loop, ...) -> AttackResult`, to which what the attack does not take
        makes no difference; an attack that takes all of it, or any keywords, as it is.
    """
    parameters = inspect.signature(attack).parameters.values()
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
    dropped = {"index", "loop"} - {parameter.name for parameter in parameters} if not takes_any else set()
    if takes_key(attack):
        return partial(_call, attack, frozenset(dropped)) if dropped else attack
    return partial(_call_without_key, attack, frozenset(dropped))


def _call(attack: Attack, dropped: frozenset[str], *args: Any, **options: Any) -> AttackResult:
    return attack(*args, **{name: value for name, value in options.items() if name not in dropped})


def _call_without_key(
    attack: Attack, dropped: frozenset[str], key: Key, *args: Any, **options: Any
) -> AttackResult:
    del key
    return _call(attack, dropped, *args, **options)


def bound_goal(attack: Attack) -> Goal | None:
    """Finds the goal that `functools.partial` has bound to an attack; None where there is none to be seen."""
    return getattr(attack, "keywords", {}).get("goal")


def restrict(attack: Attack, rows: np.ndarray, num: int) -> Attack:
    """Restricts the data of a goal that is bound to an attack, such as targets, to some of the examples.

    Other settings that differ from example to example, and goals bound inside of a function, cannot be seen.

    Args:
        attack: the attack.
        rows: the examples' places, shape `[M]`, int.
        num: number of all examples.

    Returns:
        The attack, for those examples.

    Raises:
        ValueError: if the data are not those of so many examples.
    """
    goal = bound_goal(attack)
    if goal is None or not goal.data:
        return attack
    goal.check(num)
    return partial(attack, goal=goal._replace(data=jax.tree.map(lambda leaf: leaf[rows], goal.data)))
