"""Settings of `experiments.a5_glyphs`: camera, networks and schedules of each preset."""

import dataclasses

from experiments.a5_presets import Schedule
from rdx import models
from rdx.robustify.acquisition import Camera


@dataclasses.dataclass(frozen=True)
class Config:
    """One Table 9; radii are in units of [0, 1].

    Attributes:
        preset: "smoke" (seconds, every branch), "cpu" (two cores) or "paper" (the paper's network and image size).
        size: side of prototypes and pictures, in pixels.
        camera: takes the pictures.
        classifier: the network `C`.
        robustifier: the network `R` of A5/PRC.
        vanilla: schedule of the classifier that is not robust.
        base: schedule of the certified classifier.
        prototypes: schedule of A5/P, which starts from the certified classifier.
        retrained: schedule of A5/PC and of its control, which start there too.
        robustified: schedule of A5/PRC, which starts where A5/PC ended, with a new robustifier.
        prototype_speed: how many times the learning rate of networks is that of prototypes.
        has_crown: whether the bounds of A5's recipes mix CROWN-IBP in while the radius rises; for 61 margins it costs
            dozens of times IBP.
        eps_attack: radius `eps_A` of the attacker, and `eps_A^C` of the certified classifier.
        eps_defense: radius `eps_D` of the defender of prototypes.
        eps_picture: radius of the defender of pictures, in A5/PRC.
        num_train: pictures of each character in an epoch; every epoch takes new ones.
        num_test: pictures of each character that are evaluated.
        num_attacked: how many of these pictures are counted and, unless certified, attacked.
        cross_check: how many certified pictures are attacked nevertheless.
        attack_steps: steps of APGD-CE, APGD-T and FAB-T in AutoAttack.
        attack_queries: queries of Square in AutoAttack.
        split: "test", or "validation": other pictures, to choose settings by.
        font: of the characters.
        seed: of everything random.
    """

    preset: str
    size: int
    camera: Camera
    classifier: models.ConvNet
    robustifier: models.Robustifier
    vanilla: Schedule
    base: Schedule
    prototypes: Schedule
    retrained: Schedule
    robustified: Schedule
    prototype_speed: float
    num_train: int
    num_test: int
    num_attacked: int
    cross_check: int
    attack_steps: int = 100
    attack_queries: int = 5000
    has_crown: bool = False
    eps_attack: float = 0.1
    eps_defense: float = 0.5  # the default of the authors' code; the supplement that tells the value is not at hand
    eps_picture: float = 0.1
    split: str = "test"
    font: str = "DejaVuSansMono"
    seed: int = 0


def config(preset: str, split: str) -> Config:
    """Looks up the settings of a preset.

    Raises:
        ValueError: naming what there is.
    """
    builders = {"smoke": _smoke, "cpu": _cpu, "paper": _paper}
    if preset not in builders or split not in {"test", "validation"}:
        raise ValueError(f"No preset {preset!r} with split {split!r}: use smoke, cpu or paper, and test or validation.")
    return dataclasses.replace(builders[preset](), split=split)


def _cpu() -> Config:
    return Config(
        preset="cpu", size=32, camera=_small_camera(), classifier=models.small_fonts_cnn(),
        robustifier=models.Robustifier((models.Conv(16, 3), models.Conv(3, 5)), mean=(0.5,)),
        vanilla=Schedule(20, 20, 0, 1e-3, (15,), 124), base=Schedule(60, 4, 30, 1e-3, (45, 55), 124),
        prototypes=Schedule(20, 0, 0, 1e-3, (15,), 124), retrained=Schedule(40, 0, 2, 1e-3, (28, 36), 124),
        robustified=Schedule(20, 0, 2, 1e-3, (14, 18), 124), prototype_speed=10.0,
        num_train=64, num_test=16, num_attacked=496, cross_check=50,
    )


def _smoke() -> Config:
    def brief(epochs: int, warmup: int, ramp: int) -> Schedule:
        return Schedule(epochs, warmup, ramp, 3e-3, (), 62)

    return dataclasses.replace(
        _cpu(), preset="smoke", size=16, classifier=models.ConvNet((models.Conv(8, 5, 2),), (32,), 62, mean=(0.5,)),
        robustifier=models.Robustifier((models.Conv(4, 3), models.Conv(3, 3)), mean=(0.5,)),
        camera=dataclasses.replace(_small_camera(), shift=0.5, degrees=2.0, distortion=0.05, noise=(0.0, 0.02)),
        vanilla=brief(4, 4, 0), base=brief(12, 2, 6), prototypes=brief(6, 0, 0), retrained=brief(6, 0, 1),
        robustified=brief(3, 0, 1), eps_attack=0.02, num_train=8, num_test=2, num_attacked=62, cross_check=8,
        attack_steps=5, attack_queries=20, has_crown=True,
    )


def _paper() -> Config:
    # Epochs and rates are the released defaults; how many pictures an epoch has is not among them.
    released = Schedule(100, 2, 18, 1e-3, (25, 42))
    return Config(
        preset="paper", size=128, camera=Camera(), classifier=models.fonts_cnn(),
        robustifier=models.cifar_robustifier().clone(mean=(0.5,)), vanilla=dataclasses.replace(released, warmup=100),
        base=released, prototypes=dataclasses.replace(released, warmup=0, ramp=0), retrained=released,
        robustified=released, prototype_speed=1.0, num_train=100, num_test=80, num_attacked=4960, cross_check=1000,
        has_crown=True,
    )


def _small_camera() -> Camera:
    # Shift and blur are in pixels: a quarter of those for 128 pixels. The other ranges are as released.
    return Camera(shift=1.25, sigma=(0.0025, 0.25), num_taps=3)
