"""Instruments that look at data and models: what any classifier can reach, and why some do not."""

# ruff: noqa: I001 - one name a line
from rdx.analyse import transport
from rdx.analyse.transport import TransportBound
from rdx.analyse.transport import lower_bound
from rdx.analyse.transport import lower_bound_of_pairs

__all__ = [
    "TransportBound",
    "lower_bound",
    "lower_bound_of_pairs",
    "transport",
]
