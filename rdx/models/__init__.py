"""Networks as flax.linen modules or ONNX files, and their bridge to the library's pure functions."""

from rdx.models import onnx
from rdx.models.apply import Forward, forward, logits_fn, num_parameters
from rdx.models.cnn import (
    BatchNormConvNet,
    Conv,
    ConvNet,
    a5_classifier,
    bench_cnn,
    cnn7,
    cnn7_batch_norm,
    digits_cnn,
    fonts_cnn,
    small_cnn,
    small_fonts_cnn,
)
from rdx.models.features import dropout_fn, features_fn, hidden_fn, last_layer
from rdx.models.linf_distance import LinfDistanceNet
from rdx.models.mlp import MLP
from rdx.models.resnet import ResNet
from rdx.models.robustifier import Robustifier, cifar_robustifier, mnist_robustifier

__all__ = [
    "MLP",
    "BatchNormConvNet",
    "Conv",
    "ConvNet",
    "Forward",
    "LinfDistanceNet",
    "ResNet",
    "Robustifier",
    "a5_classifier",
    "bench_cnn",
    "cifar_robustifier",
    "cnn7",
    "cnn7_batch_norm",
    "digits_cnn",
    "dropout_fn",
    "features_fn",
    "fonts_cnn",
    "forward",
    "hidden_fn",
    "last_layer",
    "logits_fn",
    "mnist_robustifier",
    "num_parameters",
    "onnx",
    "small_cnn",
    "small_fonts_cnn",
]
