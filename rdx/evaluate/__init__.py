"""Evaluation: worst case over attacks beside certificates, curves, records, tables."""

from rdx.evaluate import curves, records, report
from rdx.evaluate.benchmark import ContradictionError, Evaluation, check, evaluate
from rdx.evaluate.curves import Curve, against_eps, against_strength, minimal_eps, worst_case

__all__ = [
    "ContradictionError", "Curve", "Evaluation", "against_eps", "against_strength", "check", "curves", "evaluate",
    "minimal_eps", "records", "report", "worst_case",
]
