"""Networks as flax.linen modules or ONNX files, and their bridge to the library's pure functions."""

from rdx.models import onnx
from rdx.models.apply import Forward, forward, logits_fn, num_parameters
from rdx.models.cnn import Conv, ConvNet, a5_classifier, bench_cnn, digits_cnn, fonts_cnn, small_cnn, small_fonts_cnn
from rdx.models.features import dropout_fn, features_fn, hidden_fn, last_layer
from rdx.models.mlp import MLP
from rdx.models.resnet import ResNet
from rdx.models.robustifier import Robustifier, cifar_robustifier, mnist_robustifier

__all__ = [
    "MLP",
    "Conv",
    "ConvNet",
    "Forward",
    "ResNet",
    "Robustifier",
    "a5_classifier",
    "bench_cnn",
    "cifar_robustifier",
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
