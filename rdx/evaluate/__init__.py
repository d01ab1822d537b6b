"""Evaluation: worst case over attacks beside certificates, records, tables."""

from rdx.evaluate import curves, records, report
from rdx.evaluate.benchmark import ContradictionError, Evaluation, check, evaluate
from rdx.evaluate.checks import Check
from rdx.evaluate.diagnostics import Diagnosis, diagnose

__all__ = [
    "Check", "ContradictionError", "Diagnosis", "Evaluation", "check", "curves", "diagnose", "evaluate", "records",
    "report",
]
