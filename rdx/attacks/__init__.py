"""Attacks: `attack(key, logits_fn, x, labels, *, ball, goal, index, ...) -> AttackResult`, one technique a file."""

from rdx.attacks import adaptive
from rdx.attacks.apgd import apgd
from rdx.attacks.apgd_targeted import apgd_targeted
from rdx.attacks.base import limit
from rdx.attacks.ddn import ddn
from rdx.attacks.deepfool import deepfool
from rdx.attacks.driver import Loop
from rdx.attacks.fab import fab, fab_targeted
from rdx.attacks.fgsm import fgsm
from rdx.attacks.fmn import fmn
from rdx.attacks.pgd import pgd
from rdx.attacks.square import square
from rdx.attacks.transfer import diverse_inputs, smoothing_kernel, transfer, translation_invariant

__all__ = [
    "Loop", "adaptive", "apgd", "apgd_targeted", "ddn", "deepfool", "diverse_inputs", "fab", "fab_targeted", "fgsm",
    "fmn", "limit", "pgd", "smoothing_kernel", "square", "transfer", "translation_invariant",
]
