"""Data sets in memory, a stateless sampler, a sharded loader and augmentation."""

from rdx.data.augment import random_flip, random_rotation, random_shift
from rdx.data.glyphs import load_glyphs
from rdx.data.loader import Loader, data_mesh, evaluation_batches
from rdx.data.sampler import Sampler
from rdx.data.sources import SPLITS, Source, load, to_float

__all__ = [
    "SPLITS",
    "Loader",
    "Sampler",
    "Source",
    "data_mesh",
    "evaluation_batches",
    "load",
    "load_glyphs",
    "random_flip",
    "random_rotation",
    "random_shift",
    "to_float",
]
