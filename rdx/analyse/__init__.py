"""Instruments that look at data and models: what any classifier can reach, what a perturbation leaves."""

# ruff: noqa: I001 - one name a line
from rdx.analyse import similarity
from rdx.analyse import transport
from rdx.analyse.similarity import psnr
from rdx.analyse.similarity import ssim
from rdx.analyse.transport import TransportBound
from rdx.analyse.transport import lower_bound
from rdx.analyse.transport import lower_bound_of_pairs

__all__ = [
    "TransportBound",
    "lower_bound",
    "lower_bound_of_pairs",
    "psnr",
    "similarity",
    "ssim",
    "transport",
]
