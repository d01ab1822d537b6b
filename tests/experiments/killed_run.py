"""The smoke preset with tiny networks that learn; as a script it is the victim of the kill test."""

import dataclasses
import os
import pathlib
import signal
import sys
import time

import jax

from experiments import a5_presets, a5_tables, a5_training
from rdx import models

TRAINING, TOGETHER, EVALUATION = "training", "together", "evaluation"


def settings(dataset, preset):
    """Trains the classifier for 264 steps, with checkpoints after 100 and 200, the others for less.

    All batches divide over the eight virtual devices, so the runs are sharded.
    """
    smoke = a5_presets.config(dataset, preset)
    return dataclasses.replace(
        smoke, classifier=models.ConvNet((models.Conv(8, 3, 2),), (16,), 10), num_train=704, eps_attack=(0.05,),
        eps_classifier=(0.05,), robustifier=models.Robustifier((models.Conv(4, 3), models.Conv(1, 3))),
        base=a5_presets.Schedule(6, 2, 2, 0.003, (), 16), offline=a5_presets.Schedule(20, 0, 0, 0.05, (), 48),
        online=a5_presets.Schedule(2, 0, 1, 0.002, (), 16), joint=a5_presets.Schedule(2, 0, 1, 0.001, (), 16),
        num_offline=32,
    )


def run(directory, **options):
    """Fills the table."""
    a5_tables.config = settings
    return a5_tables.main(a5_tables.Arguments(preset="smoke", out=str(directory), **options))


def _die():
    os.kill(os.getpid(), signal.SIGKILL)


def _die_in_training(directory):
    """Kills the process well after the first checkpoint of the classifier, and before the second."""
    fit, checkpoints = a5_training.fit, pathlib.Path(directory) / "checkpoints"

    def fit_and_die(loss, state, optimizer, batches, *, label, **options):
        def deadly(step):
            if label.startswith("classifier") and step == 130:
                while not (checkpoints / label / "100").exists():
                    time.sleep(0.01)
                _die()
            return batches(step)

        return fit(loss, state, optimizer, deadly, label=label, **options)

    a5_training.fit = fit_and_die


def _die_together(directory):
    """Kills the process well after the first checkpoint of several classifiers that train as one program."""
    checkpoints, batches = pathlib.Path(directory) / "checkpoints", a5_training._batches

    def deadly(run, job, mesh):
        load = batches(run, job, mesh)

        def load_or_die(step):
            if job.name.startswith("classifier") and step == 130:
                while not list(checkpoints.glob("together-*/100")):
                    time.sleep(0.01)
                _die()
            return load(step)

        return load_or_die

    a5_training._batches = deadly


def _die_in_evaluation():
    """Kills the process when the second cell is certified and not yet attacked."""
    stages = []

    def show(stage, done, total):
        stages.append(stage)
        if stages.count("certify") == 2:
            _die()

    a5_tables._show = show


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 8)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    if sys.argv[2] == TRAINING:
        _die_in_training(sys.argv[1])
    elif sys.argv[2] == TOGETHER:
        _die_together(sys.argv[1])
    else:
        _die_in_evaluation()
    run(sys.argv[1], **dict(word.split("=") for word in sys.argv[3:]))
