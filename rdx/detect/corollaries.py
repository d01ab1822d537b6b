"""Limits of all classifiers, carried to all detectors: accuracy against robustness, sample complexity, two norms.

Theorem 4 makes of a detector that is robust with detection at `2 eps` a classifier that is robust at `eps` and no less
accurate, by computation alone. So if every classifier of clean error at most `a` has `R_adv^eps >= b`, then every
detector of clean error at most `a` has

    R_adv-det^{2 eps} >= b.

Erratum: Tramer (2022, arXiv:2107.11630, Sec. 2.2, after the proof of Theorem 4) prints `R_adv-det^{eps/2} >= b`, which
does not follow and is false: in the model of Tsipras et al. a linear detector is robust at half the radius at which no
classifier is (`mean_detector`, and the tests).

The limits hold for any function, also for one that is found by unlimited computation, since the constructions that they
are carried through keep the data that a function was learned from.
"""

import dataclasses
import math

import numpy as np
from scipy.stats import norm

# Training sets beyond this are not searched for.
_MOST_SAMPLES = 10**15


def detector_radius(eps: float) -> float:
    """Computes the radius at which a limit of classifiers at `eps` limits detectors: `2 eps`."""
    return 2.0 * eps


@dataclasses.dataclass(frozen=True)
class TsiprasModel:
    """One feature that is mostly right and many that are a little right, in the model of accuracy against robustness.

    `y = +-1` with equal chance, `x_0 = y` with probability `p`, else `-y`, and `x_i ~ N(eta y, 1)` for `i = 1..d`.

    Source: Tsipras et al. (2019, arXiv:1805.12152, Sec. 2.1).

    Attributes:
        p: reliability of the first feature, in [1/2, 1).
        eta: mean of the others.
        num_features: their number `d`.
    """

    p: float
    eta: float
    num_features: int

    @property
    def eps(self) -> float:
        """The linf radius from which classifiers are limited: `2 eta`, which turns `N(eta y)` into `N(-eta y)`."""
        return 2.0 * self.eta

    @property
    def detector_eps(self) -> float:
        """The linf radius from which detectors are limited: `4 eta`."""
        return detector_radius(self.eps)

    def limit(self, clean_error: float) -> float:
        """Computes the greatest robust accuracy beside a clean error: `min(1, p / (1 - p) * clean_error)`.

        For classifiers at `eps` (Tsipras et al. 2019, Theorem 2.1), and so for detectors, with detection, at
        `detector_eps`.
        """
        return min(1.0, self.p / (1.0 - self.p) * clean_error)

    def mean_classifier(self, eps: float) -> float:
        """Computes the robust accuracy of the sign of `mean(x_1 .. x_d)`: `Phi((eta - eps) sqrt(d))`, exactly."""
        return float(norm.cdf((self.eta - eps) * math.sqrt(self.num_features)))

    def mean_detector(self, eps: float, *, threshold: float) -> tuple[float, float]:
        """Computes how good the detector is that rejects where `|mean(x_1 .. x_d)| < t`, exactly.

        The attacker moves the mean by `eps`. A clean input is accepted and right where `y m >= t`, and no perturbed
        one is accepted and wrong where `y m - eps > -t`.

        Args:
            eps: linf radius.
            threshold: `t >= 0`.

        Returns:
            Clean accuracy, and robust accuracy with detection; the threshold `eps / 2` is the best for the latter and
            makes it that of `mean_classifier(eps / 2)`: on this family both theorems hold with equality.
        """
        scale = math.sqrt(self.num_features)
        clean = norm.cdf((self.eta - threshold) * scale)
        robust = norm.cdf((self.eta - max(threshold, eps - threshold)) * scale)
        return float(clean), float(robust)


@dataclasses.dataclass(frozen=True)
class SchmidtModel:
    """Two Gaussians around an unknown vector and its negative, in the model of sample complexity.

    `theta ~ N(0, I_d)`, `y = +-1`, `x ~ N(y theta, sigma^2 I)`; the learner sees `n` examples.

    Source: Schmidt et al. (2018, arXiv:1804.11285, Sec. 2.1); they take `sigma` of the order of `d^{1/4}`.

    Attributes:
        num_features: `d`.
        sigma: standard deviation of a feature.
    """

    num_features: int
    sigma: float

    def limit(self, num_samples: float, eps: float) -> float:
        """Computes the least robust error that any learner expects: `1/2 P(sqrt(n / (sigma^2 + n)) |v|_inf <= eps)`.

        `v ~ N(0, I_d)`. Given the examples, `theta` is Gaussian around a mean `m` of that size; where `|m|_inf <= eps`
        the attacker moves both classes to the same distribution, on which every classifier errs half of the time.

        Source: Schmidt et al. (2018, arXiv:1804.11285, proof of Theorem 6).

        Args:
            num_samples: `n`.
            eps: linf radius of classifiers; detectors, with detection, are limited alike at `2 eps`.

        Returns:
            The robust error, in [0, 1/2].
        """
        if num_samples == 0 or eps == 0:
            return 0.5 if num_samples == 0 else 0.0
        reach = eps * math.sqrt((self.sigma**2 + num_samples) / num_samples)
        return 0.5 * math.exp(self.num_features * np.log1p(-2.0 * norm.sf(reach)))

    def num_samples(self, eps: float, *, error: float) -> int:
        """Computes how many examples a classifier needs at least for an expected robust error.

        It grows like `eps^2 sigma^2 / (2 log d)`, where one example suffices for a small clean error.

        Args:
            eps: linf radius of classifiers, half of that of detectors.
            error: robust error, in (0, 1/2).

        Returns:
            The least `n` with `limit(n, eps) <= error`.

        Raises:
            ValueError: where no number of examples is enough.
        """
        if self.limit(_MOST_SAMPLES, eps) > error:
            raise ValueError(f"No number of examples gives an error of {error} at eps = {eps}: take a smaller radius.")
        low, high = 0, _MOST_SAMPLES
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if self.limit(middle, eps) <= error else (middle, high)
        return high

    def one_sample_error(self, theta: np.ndarray, sample: np.ndarray, eps: float) -> float:
        """Computes the robust error of the linear classifier `sign(<w, x>)` with `w = y x` of one example, exactly.

        `Phi(-(<w, theta> - eps |w|_1) / (sigma |w|_2))`. Source: Schmidt et al. (2018, Theorem 4 for `eps = 0`).

        Args:
            theta: shape `[d]`.
            sample: `y x`, shape `[d]`.
            eps: linf radius.

        Returns:
            The error.
        """
        gain = sample @ theta - eps * np.abs(sample).sum()
        return float(norm.cdf(-gain / (self.sigma * np.sqrt(np.square(sample).sum()))))


def two_norm_limit() -> float:
    """Computes the least mean of the robust errors against l1 at 2 and linf at `2 eta`: 1/2.

    In the model of Tsipras et al. an l1 perturbation of size 2 turns `x_0` around and an linf perturbation of `2 eta`
    the others, so that the two attacks leave the same distribution of inputs for opposite labels. Detectors have the
    same limit at the radii 4 and `4 eta`.

    Source: Tramer & Boneh (2019, arXiv:1904.13000, Theorem 1).
    """
    return 0.5


@dataclasses.dataclass(frozen=True)
class LatticeModel:
    """The model of Tsipras et al. on finitely many points, where limits can be checked against every function.

    A point is `(x_0, s)` with `x_0 = +-1` and a whole number `|s| <= width`; `s = y shift + noise` stands for the many
    weak features. Both metrics are restricted to moves of one kind: "s" moves `s` by up to its radius and not `x_0`, as
    linf at less than 2 does, "flip" turns `x_0` at a distance of 2 and leaves `s`, as l1 does in few features.

    Attributes:
        p: probability of `x_0 = y`.
        shift: mean of `s` for `y = 1`, a whole number.
        noise: probabilities of the noise `-k..k`, shape `[2 k + 1]`, summing to 1.
    """

    p: float
    shift: int
    noise: np.ndarray

    @property
    def points(self) -> np.ndarray:
        """All points, wide enough for an attacker who moves `s` by `4 shift`, shape `[N, 2]`."""
        width = 5 * self.shift + len(self.noise) // 2
        return np.stack(np.meshgrid([-1, 1], np.arange(-width, width + 1), indexing="ij"), axis=-1).reshape(-1, 2)

    def weights(self) -> np.ndarray:
        """Computes the probability of each point and label -1 or 1, shape `[N, 2]`."""
        points, half = self.points, len(self.noise) // 2
        columns = []
        for y in (-1, 1):
            offset = points[:, 1] - y * self.shift + half
            is_inside = (offset >= 0) & (offset < len(self.noise))
            mass = np.where(is_inside, self.noise[np.clip(offset, 0, len(self.noise) - 1)], 0.0)
            columns.append(0.5 * mass * np.where(points[:, 0] == y, self.p, 1 - self.p))
        return np.stack(columns, axis=1)

    def distances(self, kind: str) -> np.ndarray:
        """Computes the distances of one kind of move, "s" or "flip", infinite for the other. Shape `[N, N]`."""
        points = self.points
        gap = np.abs(points[:, None] - points[None]).astype(float)
        moved, kept = (gap[..., 1], gap[..., 0]) if kind == "s" else (gap[..., 0], gap[..., 1])
        return np.where(kept == 0, moved, np.inf)
