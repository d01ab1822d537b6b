"""Attacks: `attack(key, logits_fn, x, labels, *, ball, goal, index, ...) -> AttackResult`, one technique a file."""

from rdx.attacks.apgd import apgd
from rdx.attacks.apgd_targeted import apgd_targeted
from rdx.attacks.base import limit
from rdx.attacks.ddn import ddn
from rdx.attacks.deepfool import deepfool
from rdx.attacks.driver import Loop
from rdx.attacks.fab import fab, fab_targeted
from rdx.attacks.fgsm import fgsm
from rdx.attacks.fmn import fmn
from rdx.attacks.genattack import genattack
from rdx.attacks.nattack import nattack
from rdx.attacks.nes import nes
from rdx.attacks.pgd import pgd
from rdx.attacks.prgf import gradient_prior, prgf
from rdx.attacks.spsa import spsa
from rdx.attacks.square import square
from rdx.attacks.zoo import zoo

__all__ = [
    "Loop", "apgd", "apgd_targeted", "ddn", "deepfool", "fab", "fab_targeted", "fgsm", "fmn", "genattack",
    "gradient_prior", "limit", "nattack", "nes", "pgd", "prgf", "spsa", "square", "zoo",
]
