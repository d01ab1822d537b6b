"""What records and tables say of AutoAttack, which is the empirical column of all that is certified."""

from collections.abc import Mapping
from typing import Any


def recorded(suite: Mapping[str, Any]) -> dict[str, dict[str, int]]:
    """Lists the steps of each attack of `rdx.attacks.suite`; those of Square are queries."""
    return {name: {"num_steps": attack.keywords["num_steps"]} for name, attack in suite.items()}


def described(num_steps: int, num_queries: int) -> str:
    """Names the attacks, their steps and the queries of Square."""
    return (
        f"AutoAttack, version standard (APGD-CE, APGD-T and FAB-T with {num_steps} steps, Square with {num_queries} "
        "queries)"
    )
