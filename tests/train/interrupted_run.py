"""A tiny training run; as a script it is the victim of the kill test."""

import sys
import time

import jax
import jax.numpy as jnp
import optax

from rdx import models, train
from rdx.train import standard


def problem():
    """Two separable classes in the plane: forward, batches, the data."""
    keys = jax.random.split(jax.random.key(7), 2)
    labels = (jax.random.uniform(keys[0], (64,)) < 0.5).astype(jnp.int32)
    x = 0.2 * jax.random.uniform(keys[1], (64, 2)) + 0.6 * labels[:, None].astype(jnp.float32)

    def batches(step):
        index = jnp.asarray([(16 * step + i) % 64 for i in range(16)], jnp.int32)
        return {"x": x[index], "labels": labels[index], "index": index}

    return models.MLP((8,), 2), batches, x, labels


def start(model, optimizer):
    """The state before the first step."""
    return train.init_state(model.init(jax.random.key(0), jnp.zeros((1, 2)))["params"], {}, optimizer)


def run(directory, num_steps, batches=None, **options):
    """Trains; noise from the key makes the result depend on every step's key."""
    model, default_batches, _, _ = problem()
    optimizer = optax.adam(0.05)

    def jitter(key, batch):
        return {**batch, "x": batch["x"] + 0.01 * jax.random.normal(key, batch["x"].shape)}

    settings = {"save_every": 5, "log_every": 5} | options
    return train.fit(
        standard.cross_entropy(models.forward(model)), start(model, optimizer), optimizer, batches or default_batches,
        key=jax.random.key(1), num_steps=num_steps, transform=jitter, directory=directory, progress=False, **settings
    )


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 8)

    def slowed(step):
        """Leaves the parent time to kill."""
        time.sleep(0.02)
        sys.stdout.write(f"{step}\n")
        sys.stdout.flush()
        return problem()[1](step)

    run(sys.argv[1], 1000, slowed)
