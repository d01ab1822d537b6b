"""What experiments on detectors and on certified training share: data with a held-out part, nets trained once."""

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

from rdx import data, models
from rdx.evaluate import shared
from rdx.train import fit, init_state
from rdx.train.loop import Phase
from rdx.types import Key, PyTree


@dataclasses.dataclass(frozen=True)
class Data:
    """The parts of a data set.

    Attributes:
        train: networks and detectors are fitted on it.
        held_out: training images that nothing is fitted on: thresholds and settings are chosen by them.
        test: evaluated, and never chosen by.
    """

    train: data.Source
    held_out: data.Source
    test: data.Source

    def record(self) -> dict[str, Any]:
        """Describes the parts for a record."""
        return {
            "name": self.test.name, "split": self.test.split, "size": len(self.test),
            "fingerprint": self.test.fingerprint, "train_size": len(self.train), "held_out_size": len(self.held_out),
        }


def load(
    name: str, *, num_train: int | None, num_held_out: int, num_test: int | None, root: str = "", archive: str = ""
) -> Data:
    """Loads a data set and holds a fixed random part of its training images out."""
    options = {"root": root or None, "archive": archive or None}
    everything, test = data.load(name, "train_all", **options), data.load(name, "test", **options)
    order = np.random.default_rng(0).permutation(len(everything))
    kept = np.sort(order[num_held_out:][:num_train])
    return Data(
        everything.subset(kept), everything.subset(np.sort(order[:num_held_out])),
        test.take(num_test or len(test)),
    )


def train(
    key: Key, forward: models.Forward, loss: Any | Sequence[Phase], source: data.Source, *, directory: Path, name: str,
    num_steps: int, batch_size: int, learning_rate: float, seed: int,
) -> PyTree:
    """Trains a network, or takes it from its checkpoint; returns its parameters."""
    start = forward.model.init(shared.key_of(key, f"init {name}"), data.to_float(source.images[:1]))["params"]
    optimizer = _optimizer(learning_rate, num_steps)
    sampler = data.Sampler(len(source), batch_size, seed)
    state, history = fit(
        loss, init_state(start, {}, optimizer), optimizer, data.Loader(source, sampler, None),
        key=shared.key_of(key, f"train {name}"), num_steps=num_steps, directory=directory / "checkpoints" / name,
        save_every=max(num_steps // 4, 1), keep=1, log_every=max(num_steps // 4, 1), label=name,
    )
    if history:
        print(f"  {name}: { {key: f'{value:.4g}' for key, value in history[-1].items()} }", flush=True)
    return jax.device_put(state.params, jax.local_devices()[0])


@functools.cache
def _optimizer(learning_rate: float, num_steps: int) -> optax.GradientTransformation:
    return optax.adam(optax.piecewise_constant_schedule(learning_rate, {int(0.75 * num_steps): 0.1}))


def percent(share: float) -> str:
    """Formats a share as a percentage with one digit."""
    return f"{100 * share:.1f}"
