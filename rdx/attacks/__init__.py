"""Attacks: `attack(key, logits_fn, x, labels, *, ball, goal, index, ...) -> AttackResult`, one technique a file."""

from rdx.attacks import adaptive
from rdx.attacks.adaptive import bpda, ensemble, eot, eot_report, stochastic_success, straight_through
from rdx.attacks.apgd import apgd
from rdx.attacks.apgd_targeted import apgd_targeted
from rdx.attacks.autoattack import autoattack, autoattack_rand, cascade, cascade_rand, suite
from rdx.attacks.base import limit
from rdx.attacks.bim import bim
from rdx.attacks.boundary import boundary
from rdx.attacks.cw import cw
from rdx.attacks.cw_linf import cw_linf
from rdx.attacks.ddn import ddn
from rdx.attacks.deepfool import deepfool
from rdx.attacks.driver import Loop
from rdx.attacks.ead import ead
from rdx.attacks.evolutionary import evolutionary
from rdx.attacks.fab import fab, fab_targeted
from rdx.attacks.fgsm import fgsm
from rdx.attacks.fmn import fmn
from rdx.attacks.genattack import genattack
from rdx.attacks.hopskipjump import hopskipjump
from rdx.attacks.mim import mim
from rdx.attacks.nattack import nattack
from rdx.attacks.nes import nes
from rdx.attacks.opt import opt
from rdx.attacks.pgd import pgd
from rdx.attacks.prgf import gradient_prior, prgf
from rdx.attacks.rfgsm import rfgsm
from rdx.attacks.signatures import keyed
from rdx.attacks.spsa import spsa
from rdx.attacks.square import square
from rdx.attacks.transfer import diverse_inputs, smoothing_kernel, transfer, translation_invariant
from rdx.attacks.zoo import zoo

__all__ = [
    "Loop", "adaptive", "apgd", "apgd_targeted", "autoattack", "autoattack_rand", "bim", "boundary", "bpda",
    "cascade", "cascade_rand", "cw", "cw_linf", "ddn", "deepfool", "diverse_inputs", "ead", "ensemble", "eot",
    "eot_report", "evolutionary", "fab", "fab_targeted", "fgsm", "fmn", "genattack", "gradient_prior",
    "hopskipjump", "keyed", "limit", "mim", "nattack", "nes", "opt", "pgd", "prgf", "rfgsm", "smoothing_kernel", "spsa",
    "square", "stochastic_success", "straight_through", "suite", "transfer", "translation_invariant", "zoo",
]
