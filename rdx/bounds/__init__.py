"""Certified bounds of any JAX function: `method(fn, region, *args) -> Interval`, methods interchangeable."""

from rdx.bounds import relaxations, rounding
from rdx.bounds.alpha import alpha_crown
from rdx.bounds.branch import Verdict, Verification, verify
from rdx.bounds.certify import Certificate, certify, certify_in_float64
from rdx.bounds.cost import Plan, plan
from rdx.bounds.crown import crown, crown_ibp
from rdx.bounds.details import Details, Layer, Planes, details, explain
from rdx.bounds.forward import forward
from rdx.bounds.graph import UnsupportedPrimitiveError
from rdx.bounds.ibp import ibp
from rdx.bounds.interval import Interval
from rdx.bounds.lipschitz import lipschitz
from rdx.bounds.loss_fusion import fused_cross_entropy
from rdx.bounds.relaxations import Lines, register
from rdx.bounds.worst_case import Threat, WorstCase, phased_objective, worst_case

__all__ = [
    "Certificate", "Details", "Interval", "Layer", "Lines", "Plan", "Planes", "Threat", "UnsupportedPrimitiveError",
    "Verdict", "Verification", "WorstCase", "alpha_crown", "certify", "certify_in_float64", "crown", "crown_ibp",
    "details", "explain", "forward", "fused_cross_entropy", "ibp", "lipschitz", "phased_objective", "plan", "register",
    "relaxations", "rounding", "verify", "worst_case",
]
