"""Evaluation: worst case over attacks beside certificates, records, tables."""

from rdx.evaluate import curves, records, report
from rdx.evaluate.benchmark import ContradictionError, Evaluation, check, evaluate

__all__ = ["ContradictionError", "Evaluation", "check", "curves", "evaluate", "records", "report"]
