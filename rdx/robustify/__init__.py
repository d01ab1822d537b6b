"""A5: defensive perturbations that are made before anybody attacks (Frosio & Kautz 2023).

Each recipe is a module with a loss builder of the same name for `rdx.train.fit`: `offline` (A5/O), `online` (A5/R),
`joint` (A5/RC). `quantise` makes 8-bit images of what they defend.
"""

from rdx.robustify import joint, offline, online
from rdx.robustify.objective import defend
from rdx.robustify.quantise import quantise

__all__ = ["defend", "joint", "offline", "online", "quantise"]
