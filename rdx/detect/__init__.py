"""Detection: Tramer's reductions to and from classification, the auditor of claims, detectors, attacks on them."""

# ruff: noqa: I001 - one name a line
from rdx.detect import abstain
from rdx.detect import abstain_bound
from rdx.detect import best_known
from rdx.detect import claims
from rdx.detect import class_conditional
from rdx.detect import codes
from rdx.detect import corollaries
from rdx.detect import density
from rdx.detect import exact
from rdx.detect import extra_class
from rdx.detect import goals
from rdx.detect import intervals
from rdx.detect import joint_loss
from rdx.detect import lid
from rdx.detect import logistic
from rdx.detect import mahalanobis
from rdx.detect import matching
from rdx.detect import metric_spaces
from rdx.detect import odds
from rdx.detect import outlier
from rdx.detect import pca
from rdx.detect import reductions
from rdx.detect import risks
from rdx.detect import searches
from rdx.detect import selective
from rdx.detect import softmax
from rdx.detect import squeezing
from rdx.detect import stability
from rdx.detect import suite
from rdx.detect import thresholds
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
from rdx.detect.thresholds import auroc
from rdx.detect.thresholds import calibrate
from rdx.detect.thresholds import calibrated
from rdx.detect.thresholds import roc

__all__ = [
    "REJECTED",
    "Claim",
    "MidpointError",
    "abstain",
    "abstain_bound",
    "accept",
    "audit",
    "auroc",
    "best_known",
    "calibrate",
    "calibrated",
    "certify_detector",
    "claims",
    "class_conditional",
    "classifier_from_detector",
    "codes",
    "corollaries",
    "decide",
    "decode",
    "density",
    "detector_from_classifier",
    "errors",
    "evade",
    "exact",
    "explain_failure",
    "extra_class",
    "goals",
    "intervals",
    "joint_loss",
    "lid",
    "logistic",
    "mahalanobis",
    "matching",
    "metric_spaces",
    "odds",
    "outlier",
    "pca",
    "reductions",
    "risks",
    "robust_errors",
    "robust_errors_with_detection",
    "roc",
    "searches",
    "selective",
    "softmax",
    "squeezing",
    "stability",
    "suite",
    "thresholds",
]
