"""Evaluation: worst case over attacks beside certificates, diagnostics, curves, records, tables."""

from rdx.evaluate import curves, records, report
from rdx.evaluate.benchmark import ContradictionError, Evaluation, check, evaluate
from rdx.evaluate.checks import Check
from rdx.evaluate.curves import Curve, against_eps, against_strength, minimal_eps, worst_case
from rdx.evaluate.diagnostics import Diagnosis, diagnose

__all__ = [
    "Check", "ContradictionError", "Curve", "Diagnosis", "Evaluation", "against_eps", "against_strength", "check",
    "curves", "diagnose", "evaluate", "minimal_eps", "records", "report", "worst_case",
]
