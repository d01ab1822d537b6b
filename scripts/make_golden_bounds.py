"""Writes tests/golden/bounds_residual.npz: reference bounds of a small residual net, computed by auto_LiRPA.

Run it in a Python environment in which torch and auto_LiRPA (0.7.1) are importable; rdx is not needed:

    python scripts/make_golden_bounds.py

The net (NCHW, K = 5 classes, images 1 x 8 x 8): conv 3x3 valid - BatchNorm - relu - a; conv 3x3 same - BatchNorm, plus
a, relu; average pool 2x2; flatten; dense 12 - relu - dense 5. Keys of the file:

    conv1.weight [4, 1, 3, 3]  conv1.bias [4]     conv2.weight [4, 4, 3, 3]  conv2.bias [4]
    bn1.weight bn1.bias bn1.mean bn1.var [4]      bn2.*  likewise            bn.eps []
    dense1.weight [12, 36]     dense1.bias [12]   dense2.weight [5, 12]      dense2.bias [5]
    x [4, 1, 8, 8] in [0, 1]   labels [4]         logits [4, 5]              eps.linf []  eps.l2 []
    <region>.<method>.<lower|upper>               [4, 4]: margins z_y - z_j, j != y in increasing order
    <region>.<method>.<lower|upper>_grad          [4, 1, 8, 8]: gradient of the bound's sum with respect to x

where region is linf, l2 (no box) or linf_box (the ball clipped to [0, 1], gradients through the clipping) and method is
IBP, CROWN-IBP.adaptive, CROWN-IBP.same-slope, CROWN.adaptive or CROWN.same-slope.

Choices that matter: everything is computed in float64 from float32 weights and rounded at the end. The first
convolution has no padding, because auto_LiRPA's interval rule under l2 takes the norm of the whole kernel at the border
as well. `sparse_intermediate_bounds=False` makes CROWN's hidden bounds those of CROWN alone; by default they stay
interval bounds for units that intervals settle for the whole batch, so they depend on who shares the batch. The script
checks that the bounds of single images are those of the batch.
"""

# ruff: noqa: TID251
import argparse
import sys
from pathlib import Path

import numpy as np

OUTPUT = Path(__file__).resolve().parents[1] / "tests" / "golden" / "bounds_residual.npz"
EPS = {"linf": 0.04, "l2": 0.25}
REGIONS = ("linf", "l2", "linf_box")
METHODS = ("IBP", "CROWN-IBP.adaptive", "CROWN-IBP.same-slope", "CROWN.adaptive", "CROWN.same-slope")
NUM_IMAGES, NUM_CLASSES, CHANNELS, HIDDEN = 4, 5, 4, 12
BATCHNORM_EPS = 1e-5


def draw_arrays(seed=0):
    """Draws weights, images and labels as float32; scales of BatchNorm have both signs."""
    rng = np.random.default_rng(seed)

    def layer(name, *shape):
        fan_in = int(np.prod(shape[1:]))
        return {
            f"{name}.weight": rng.normal(size=shape) * np.sqrt(2.0 / fan_in),
            f"{name}.bias": rng.normal(size=shape[0]) * 0.1,
        }

    def batchnorm(name):
        return {
            f"{name}.weight": rng.uniform(0.6, 1.4, CHANNELS) * np.array([1, -1, 1, 1]),
            f"{name}.bias": rng.normal(size=CHANNELS) * 0.2,
            f"{name}.mean": rng.normal(size=CHANNELS) * 0.3,
            f"{name}.var": rng.uniform(0.5, 1.5, CHANNELS),
        }

    arrays = {
        **layer("conv1", CHANNELS, 1, 3, 3),
        **batchnorm("bn1"),
        **layer("conv2", CHANNELS, CHANNELS, 3, 3),
        **batchnorm("bn2"),
        **layer("dense1", HIDDEN, CHANNELS * 9),
        **layer("dense2", NUM_CLASSES, HIDDEN),
        "x": rng.uniform(size=(NUM_IMAGES, 1, 8, 8)),
    }
    return {name: value.astype(np.float32) for name, value in arrays.items()}


def build_net(arrays):
    """Builds the net in torch from the arrays."""
    import torch
    from torch import nn

    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1, self.conv2 = nn.Conv2d(1, CHANNELS, 3), nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1)
            self.bn1, self.bn2 = (nn.BatchNorm2d(CHANNELS, eps=BATCHNORM_EPS) for _ in range(2))
            self.pool = nn.AvgPool2d(2)
            self.dense1, self.dense2 = nn.Linear(CHANNELS * 9, HIDDEN), nn.Linear(HIDDEN, NUM_CLASSES)

        def forward(self, x):
            a = torch.relu(self.bn1(self.conv1(x)))
            a = torch.relu(self.bn2(self.conv2(a)) + a)
            a = torch.flatten(self.pool(a), 1)
            return self.dense2(torch.relu(self.dense1(a)))

    net = Residual().eval()
    rename = {"mean": "running_mean", "var": "running_var"}
    state = net.state_dict()
    for name, value in arrays.items():
        module, _, kind = name.partition(".")
        if kind:
            state[f"{module}.{rename.get(kind, kind)}"] = torch.tensor(value.astype(np.float64))
    net.load_state_dict(state)
    return net


def specification(labels):
    """Builds the rows `e_y - e_j`, `j != y`, shape `[B, K - 1, K]`."""
    identity = np.eye(NUM_CLASSES)
    rows = [[identity[y] - identity[j] for j in range(NUM_CLASSES) if j != y] for y in labels]
    return np.array(rows)


def compute(net, x, labels, region, method):
    """Computes lower and upper bounds of the margins and the input gradients of their sums."""
    import torch
    from auto_LiRPA import BoundedModule, BoundedTensor, PerturbationLpNorm

    name, _, relu = method.partition(".")
    options = {"sparse_intermediate_bounds": False, "activation_bound_option": relu or "adaptive"}
    bounded = BoundedModule(net, torch.zeros(x.shape), bound_opts=options, device="cpu")
    leaf = torch.tensor(x, dtype=torch.float64, requires_grad=True)
    if region == "l2":
        ball = PerturbationLpNorm(norm=2, eps=float(np.float32(EPS["l2"])))
    else:
        eps = float(np.float32(EPS["linf"]))
        ends = leaf - eps, leaf + eps
        lower_end, upper_end = (end.clamp(0.0, 1.0) for end in ends) if region == "linf_box" else ends
        ball = PerturbationLpNorm(norm=np.inf, x_L=lower_end, x_U=upper_end)
    # BoundedTensor is a leaf of its own: under l2 the gradient arrives there, under linf at the ends of the box.
    center = BoundedTensor(leaf, ball)
    matrix = torch.tensor(specification(labels))
    bounds = dict(zip(("lower", "upper"), bounded.compute_bounds(x=(center,), C=matrix, method=name), strict=True))
    result = {}
    for side, bound in bounds.items():
        parts = torch.autograd.grad(bound.sum(), (leaf, center), retain_graph=True, allow_unused=True)
        result[side] = bound.detach().numpy()
        result[f"{side}_grad"] = sum(np.asarray(part) for part in parts if part is not None)
    return result


def main():
    """Computes and checks every case, prints a table of what was stored, and writes the file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=OUTPUT)
    output = parser.parse_args().output
    try:
        import auto_LiRPA
        import torch
    except ImportError as error:
        sys.exit(f"{error}: run this script in a Python environment with torch and auto_LiRPA installed.")

    torch.set_default_dtype(torch.float64)
    arrays = draw_arrays()
    net = build_net(arrays)
    logits = net(torch.tensor(arrays["x"].astype(np.float64))).detach().numpy()
    # The best class for two images, the worst for the other two: margins of both signs.
    labels = np.where(np.arange(NUM_IMAGES) % 2 == 0, logits.argmax(axis=1), logits.argmin(axis=1))
    stored = {**arrays, "labels": labels, "logits": logits, "bn.eps": BATCHNORM_EPS}
    stored.update({f"eps.{norm}": eps for norm, eps in EPS.items()})
    print(f"auto_LiRPA {auto_LiRPA.__version__}, torch {torch.__version__}")
    print("| region | method | least lower | mean lower | mean upper | mean width | largest gradient |")
    print("|---|---|---|---|---|---|---|")
    for region in REGIONS:
        for method in METHODS:
            result = compute(net, arrays["x"], labels, region, method)
            for i in range(NUM_IMAGES):
                alone = compute(net, arrays["x"][i : i + 1], labels[i : i + 1], region, method)
                for part, value in alone.items():
                    np.testing.assert_allclose(value[0], result[part][i], rtol=1e-9, atol=1e-9)
            assert (result["lower"] <= result["upper"]).all()
            stored.update({f"{region}.{method}.{part}": value for part, value in result.items()})
            lower, upper = result["lower"], result["upper"]
            print(
                f"| {region} | {method} | {lower.min():.4f} | {lower.mean():.4f} | {upper.mean():.4f} | "
                f"{(upper - lower).mean():.4f} | {np.abs(result['lower_grad']).max():.4f} |"
            )
    output.parent.mkdir(parents=True, exist_ok=True)
    np.savez(output, **{k: np.asarray(v, np.int32 if k == "labels" else np.float32) for k, v in stored.items()})
    print(f"{output.name}: {len(stored)} arrays, {output.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
