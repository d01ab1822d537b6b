"""A5: defensive perturbations that are made before anybody attacks (Frosio & Kautz 2023).

Each recipe is a module with a loss builder of the same name for `rdx.train.fit`: `offline` (A5/O), `online` (A5/R),
`joint` (A5/RC). Those of physical objects (A5/P, A5/PC, A5/PRC) are in `physical`, the camera that pictures the objects
in `acquisition`. Defender and attacker may have balls of any norm, and of different ones. `quantise` makes 8-bit images
of what they defend. The baselines that the paper names need no loop of training: `preemptive` (Moon et al. 2022) and
`unadversarial` (Salman et al. 2021).
"""

from rdx.robustify import acquisition, joint, offline, online, physical
from rdx.robustify.objective import defend
from rdx.robustify.preemptive import preemptive
from rdx.robustify.quantise import quantise
from rdx.robustify.unadversarial import unadversarial

__all__ = [
    "acquisition", "defend", "joint", "offline", "online", "physical", "preemptive", "quantise", "unadversarial",
]
