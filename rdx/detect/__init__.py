"""Detection: Tramer's reductions to and from classification, the auditor of claims, detectors, attacks on them."""

# ruff: noqa: I001 - one name a line
from rdx.detect import best_known
from rdx.detect import claims
from rdx.detect import codes
from rdx.detect import corollaries
from rdx.detect import exact
from rdx.detect import goals
from rdx.detect import intervals
from rdx.detect import metric_spaces
from rdx.detect import reductions
from rdx.detect import risks
from rdx.detect import searches
from rdx.detect.claims import Claim
from rdx.detect.claims import audit
from rdx.detect.goals import REJECTED
from rdx.detect.goals import accept
from rdx.detect.goals import decide
from rdx.detect.goals import evade
from rdx.detect.reductions import MidpointError
from rdx.detect.reductions import certify_detector
from rdx.detect.reductions import classifier_from_detector
from rdx.detect.reductions import decode
from rdx.detect.reductions import detector_from_classifier
from rdx.detect.reductions import explain_failure
from rdx.detect.risks import errors
from rdx.detect.risks import robust_errors
from rdx.detect.risks import robust_errors_with_detection

__all__ = [
    "REJECTED",
    "Claim",
    "MidpointError",
    "accept",
    "audit",
    "best_known",
    "certify_detector",
    "claims",
    "codes",
    "corollaries",
    "classifier_from_detector",
    "decide",
    "decode",
    "detector_from_classifier",
    "errors",
    "evade",
    "exact",
    "explain_failure",
    "goals",
    "intervals",
    "metric_spaces",
    "reductions",
    "risks",
    "robust_errors",
    "robust_errors_with_detection",
    "searches",
]
