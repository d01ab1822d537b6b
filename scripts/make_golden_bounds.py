"""Writes tests/golden/bounds_<net>.npz: reference bounds of six small nets, computed by auto_LiRPA.

Run it in a Python environment in which torch and auto_LiRPA (0.7.1) are importable; rdx is not needed:

    python scripts/make_golden_bounds.py

The nets (`_golden_nets.py` has their layers): mlp; conv; residual, with BatchNorm; pooling, with max pooling after a
relu; smooth, with tanh and sigmoid; attention, one head over four tokens with a skip connection. Keys of a file:

    <layer>.weight  <layer>.bias         as in torch; of BatchNorm also <layer>.mean  <layer>.var
    x [4, ...] in [0, 1]   labels [4]    logits [4, 5]      eps.linf []  eps.l2 []
    <region>.<method>.<lower|upper>      [4, 4]: margins z_y - z_j, j != y in increasing order
    <region>.<method>.<lower|upper>_grad [4, ...]: gradient of the bound's sum with respect to x

where region is linf, l2 (no box) or linf_box (the ball clipped to [0, 1], gradients through the clipping) and method is
IBP, forward.adaptive, CROWN-IBP.adaptive or CROWN.adaptive, after the lower slope of relu; residual has
CROWN-IBP.same-slope and CROWN.same-slope as well. `forward` propagates linear bounds forward and nothing else. mlp,
conv and residual also have CROWN-Optimized.adaptive, without gradients: alpha-CROWN, 20 steps that begin with size 0.5.

Choices that matter: everything is computed in float64 from float32 weights and rounded at the end. The first
convolution has no padding, because auto_LiRPA's interval rule under l2 takes the norm of the whole kernel at the border
as well. `sparse_intermediate_bounds=False` makes CROWN's hidden bounds those of CROWN alone; by default they stay
interval bounds for units that intervals settle for the whole batch, so they depend on who shares the batch. The script
checks that the bounds of single images are those of the batch.

What is left out, with auto_LiRPA's reasons: `forward` of attention, as softmax has no forward rule; and LayerNorm, as
interval rules other than those of linear layers take an l2 ball for its center (bounds of no width at all). For the
same reason the tokens are embedded before the skip connection.
"""

# ruff: noqa: TID251
import argparse
import sys
from pathlib import Path

import _golden_nets as nets
import numpy as np

OUTPUT = Path(__file__).resolve().parents[1] / "tests" / "golden"
REGIONS = ("linf", "l2", "linf_box")
NO_FORWARD = {"attention"}
OPTIMIZED = {"mlp", "conv", "residual"}
STEPS = {"iteration": 20, "lr_alpha": 0.5, "enable_alpha_crown": True}


def methods(name):
    """Lists the methods of a net, with the lower slope of relu where there is a choice."""
    relus = nets.NETS[name].relus
    backward = [f"{method}.{relu}" for method in ("CROWN-IBP", "CROWN") for relu in relus]
    forward = [] if name in NO_FORWARD else ["forward.adaptive"]
    return ["IBP", *forward, *backward, *(["CROWN-Optimized.adaptive"] if name in OPTIMIZED else [])]


def specification(labels):
    """Builds the rows `e_y - e_j`, `j != y`, shape `[B, K - 1, K]`."""
    identity = np.eye(nets.NUM_CLASSES)
    rows = [[identity[y] - identity[j] for j in range(nets.NUM_CLASSES) if j != y] for y in labels]
    return np.array(rows)


def compute(net, x, labels, region, method, eps):
    """Computes lower and upper bounds of the margins and the input gradients of their sums."""
    import torch
    from auto_LiRPA import BoundedModule, BoundedTensor, PerturbationLpNorm

    name, _, relu = method.partition(".")
    options = {
        "sparse_intermediate_bounds": False, "activation_bound_option": relu or "adaptive",
        "optimize_bound_args": STEPS,
    }
    bounded = BoundedModule(net, torch.zeros(x.shape), bound_opts=options, device="cpu")
    leaf = torch.tensor(x, dtype=torch.float64, requires_grad=name != "CROWN-Optimized")
    if region == "l2":
        ball = PerturbationLpNorm(norm=2, eps=float(np.float32(eps["l2"])))
    else:
        radius = float(np.float32(eps["linf"]))
        ends = leaf - radius, leaf + radius
        lower_end, upper_end = (end.clamp(0.0, 1.0) for end in ends) if region == "linf_box" else ends
        ball = PerturbationLpNorm(norm=np.inf, x_L=lower_end, x_U=upper_end)
    # BoundedTensor is a leaf of its own: under l2 the gradient arrives there, under linf at the ends of the box.
    center = BoundedTensor(leaf, ball)
    matrix = torch.tensor(specification(labels))
    bounds = dict(zip(("lower", "upper"), bounded.compute_bounds(x=(center,), C=matrix, method=name), strict=True))
    if name == "CROWN-Optimized":
        return {side: bound.detach().numpy() for side, bound in bounds.items()}
    result = {}
    for side, bound in bounds.items():
        parts = torch.autograd.grad(bound.sum(), (leaf, center), retain_graph=True, allow_unused=True)
        result[side] = bound.detach().numpy()
        result[f"{side}_grad"] = sum(np.asarray(part) for part in parts if part is not None)
    return result


def reference(name):
    """Computes and checks every case of a net, and prints a table of what is stored."""
    import torch

    eps, arrays = nets.NETS[name].eps, nets.draw_arrays(nets.NETS[name])
    net = nets.build(nets.NETS[name], arrays)
    logits = net(torch.tensor(arrays["x"].astype(np.float64))).detach().numpy()
    # The best class for two images, the worst for the other two: margins of both signs.
    labels = np.where(np.arange(nets.NUM_IMAGES) % 2 == 0, logits.argmax(axis=1), logits.argmin(axis=1))
    stored = {**arrays, "labels": labels, "logits": logits}
    stored.update({f"eps.{norm}": radius for norm, radius in eps.items()})
    print(f"\n{name}\n")
    print("| region | method | least lower | mean lower | mean upper | mean width | largest gradient |")
    print("|---|---|---|---|---|---|---|")
    for region in REGIONS:
        for method in methods(name):
            result = compute(net, arrays["x"], labels, region, method, eps)
            check(net, arrays["x"], labels, region, method, eps, result)
            stored.update({f"{region}.{method}.{part}": value for part, value in result.items()})
            lower, upper = result["lower"], result["upper"]
            print(
                f"| {region} | {method} | {lower.min():.4f} | {lower.mean():.4f} | {upper.mean():.4f} | "
                f"{(upper - lower).mean():.4f} | {np.abs(result.get('lower_grad', np.nan)).max():.4f} |"
            )
    return stored


def check(net, x, labels, region, method, eps, result):
    """Checks that images do not depend on who shares their batch, and that sampled margins are inside the bounds."""
    import torch

    # What is optimised stops for the whole batch.
    for i in range(len(x) if not method.startswith("CROWN-Optimized") else 0):
        alone = compute(net, x[i : i + 1], labels[i : i + 1], region, method, eps)
        for part, value in alone.items():
            np.testing.assert_allclose(value[0], result[part][i], rtol=1e-9, atol=1e-9)
    steps = np.random.default_rng(0).normal(size=(2000, *x.shape))
    if region == "l2":
        scale = eps["l2"] / np.sqrt(np.square(steps).reshape(2000, len(x), -1).sum(-1))
        points = x[None] + steps * scale.reshape(2000, len(x), *(1,) * (x.ndim - 1))
    else:
        points = x[None] + eps["linf"] * np.sign(steps)
        points = np.clip(points, 0.0, 1.0) if region == "linf_box" else points
    logits = net(torch.tensor(points.reshape(-1, *x.shape[1:]))).detach().numpy().reshape(2000, len(x), -1)
    margins = np.einsum("bmk,nbk->nbm", specification(labels), logits)
    # The radius is float32's: a hair less or more than that of the samples.
    assert (margins >= result["lower"][None] - 1e-6).all()
    assert (margins <= result["upper"][None] + 1e-6).all()


def main():
    """Writes the file of every net."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=OUTPUT, help="the folder that the files go to")
    parser.add_argument("--nets", nargs="+", choices=nets.NETS, default=list(nets.NETS))
    options = parser.parse_args()
    try:
        import auto_LiRPA
        import torch
    except ImportError as error:
        sys.exit(f"{error}: run this script in a Python environment with torch and auto_LiRPA installed.")

    torch.set_default_dtype(torch.float64)
    print(f"auto_LiRPA {auto_LiRPA.__version__}, torch {torch.__version__}")
    options.output.mkdir(parents=True, exist_ok=True)
    for name in options.nets:
        stored, path = reference(name), options.output / f"bounds_{name}.npz"
        np.savez(path, **{k: np.asarray(v, np.int32 if k == "labels" else np.float32) for k, v in stored.items()})
        print(f"\n{path.name}: {len(stored)} arrays, {path.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
