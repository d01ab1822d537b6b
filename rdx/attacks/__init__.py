"""Attacks: `attack(key, logits_fn, x, labels, *, ball, goal, index, ...) -> AttackResult`, one technique a file."""

from rdx.attacks.apgd import apgd
from rdx.attacks.base import limit
from rdx.attacks.driver import Loop
from rdx.attacks.fgsm import fgsm
from rdx.attacks.pgd import pgd
from rdx.attacks.square import square

__all__ = ["Loop", "apgd", "fgsm", "limit", "pgd", "square"]
