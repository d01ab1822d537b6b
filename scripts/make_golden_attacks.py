"""Writes tests/golden/attacks_<part>.npz: what the original AutoAttack computes, step by step.

Run it in a Python environment in which torch and autoattack (github.com/fra31/auto-attack) are importable; rdx is not
needed:

    python scripts/make_golden_attacks.py

Part apgd_mlp (a net 8-16-5) and apgd_conv (4 x 4 images, one convolution), Auto-PGD with given noise:

    <layer>.weight  <layer>.bias     as in torch, float32
    x.box x.middle [4, ...]          clean inputs, some of whose elements lie on the box, or all in [0.3, 0.7]
    labels.<box|middle>  targets.<box|middle> [4]       prediction, and the class of second largest logit
    eps.<norm> []                    noise.<norm> [4, ...]
    <norm>.<loss>.<steps>.loss       [steps + 1, 4]: of the starting point and of every iterate
    <norm>.<loss>.<steps>.share      [steps, 4]: step size of every iteration, in units of eps
    l1.<loss>.<steps>.wide.<loss|share>                 the same with larger radii (`decr_eps_pgd`), stage after stage

where norm is linf, l2 or l1 and loss is ce, dlr or targeted. Inputs are x.box for linf and l1, and x.middle for l2:
the code's l2 projection rescales and then clips, which is not the nearest point once the box holds something back.

Part dlr: logits [200, 6] with many ties, labels, targets, and the values dlr and targeted.

Part fab, 200 problems of 6 elements in the box [0, 1], some of which the box cannot solve, some with weights 0:

    points [200, 6]  w [200, 6]  b [200]       <norm> [200, 6]: the step onto the hyperplane

Part fab_steps, on the nets and inputs of the parts apgd_*, 20 steps from the clean input towards the boundary of the
second likeliest class (targeted) or, in linf and l2, of the nearest (all; inputs in the middle, where the box decides
nothing; in l1 a step moves one element far, and the box, which the code ignores, has a say in which one is nearest):

    <net>.<norm>.<targeted|all>.points [20, 4, ...]     where each step begins

Part square_steps: two-channel images of 10 x 10 and a net 200-16-5, with the code's own draws, the same for all images:

    <layer>.weight  <layer>.bias  x [4, 2, 10, 10]  labels [4]  eps.<norm> []
    <norm>.start [4, 2, 10, 10]                  the first perturbed inputs
    <norm>.windows [60, 1 or 2, 2]               row and column of the window, and of the one that mass is taken from
    <norm>.signs [60, 2]  <norm>.turned [60]     sign of each channel; whether the pattern lies on its side
    <norm>.loss [60, 4]                          margin of each proposal

Part square: <norm>.<side of the image> [queries]: side of the square in every query; p [9000]: the share that is
changed, and p.rescaled [1000] with the schedule rescaled to 1,000 queries.

Everything is computed in float64, for which the code's calls of `.float()` are turned into `.double()`. In l1 the code
counts the elements that differ from the clean input; its sum (x + d) - d leaves dust of rounding on elements that do
not, so here what is below 1e-12 does not count.
"""

# ruff: noqa: TID251
import argparse
import itertools
import sys
from pathlib import Path

import numpy as np

OUTPUT = Path(__file__).resolve().parents[1] / "tests" / "golden"
NUM_INPUTS, NUM_CLASSES = 4, 5
NETS = {
    "mlp": ((8,), {"dense1": (16, 8), "dense2": (5, 16)}),
    "conv": ((1, 4, 4), {"conv1": (6, 1, 3, 3), "dense1": (5, 24)}),
}
EPS = {"linf": 0.1, "l2": 0.28, "l1": 0.9}
LOSSES = {"ce": "ce", "dlr": "dlr", "targeted": "dlr-targeted"}
# On conv DLR reaches its largest value, 1, where every decision hangs on the last digits.
CASES = {
    "mlp": [(loss, steps) for loss in LOSSES for steps in (20, 50)],
    "conv": [("ce", 50), ("targeted", 50)],
}


def draw_arrays(name):
    """Draws weights, inputs and noise; float32 values, so that both sides start from the same numbers."""
    rng, (shape, layers) = np.random.default_rng(0), NETS[name]
    arrays = {}
    for layer, size in layers.items():
        arrays[f"{layer}.weight"] = rng.normal(size=size) * np.sqrt(4.0 / np.prod(size[1:]))
        arrays[f"{layer}.bias"] = rng.normal(size=size[0]) * 0.1
    arrays["x.box"] = np.clip(1.6 * rng.uniform(size=(NUM_INPUTS, *shape)) - 0.3, 0.0, 1.0)
    arrays["x.middle"] = 0.3 + 0.4 * rng.uniform(size=(NUM_INPUTS, *shape))
    for norm in EPS:
        arrays[f"noise.{norm}"] = (
            rng.uniform(-1.0, 1.0, (NUM_INPUTS, *shape)) if norm == "linf" else rng.normal(size=(NUM_INPUTS, *shape))
        )
    return {key: value.astype(np.float32) for key, value in arrays.items()}


def build(name, arrays):
    """Builds the net as a function of torch."""
    import torch
    from torch.nn import functional

    w = {key: torch.tensor(value, dtype=torch.float64) for key, value in arrays.items()}
    if name == "mlp":
        return lambda x: functional.linear(
            functional.linear(x, w["dense1.weight"], w["dense1.bias"]).relu(), w["dense2.weight"], w["dense2.bias"]
        )
    return lambda x: functional.linear(
        functional.conv2d(x, w["conv1.weight"], w["conv1.bias"]).relu().flatten(1), w["dense1.weight"], w["dense1.bias"]
    )


class Recorder:
    """A net that notes what the attack does at each of its evaluations, by a look at the caller's variables."""

    def __init__(self, net):
        self.net, self.losses, self.shares = net, [], []

    def __call__(self, x):
        logits, caller = self.net(x), sys._getframe(1).f_locals
        if "criterion_indiv" in caller:
            self.losses.append(caller["criterion_indiv"](logits, caller["y"]).detach().numpy().copy())
            if "i" in caller:  # the loop's variable: before it, the starting point is evaluated
                attack = caller["self"]
                self.shares.append(caller["step_size"].flatten().numpy() / attack.eps)
        return logits

    def collect(self, name):
        return {f"{name}.loss": np.array(self.losses), f"{name}.share": np.array(self.shares)}


def record_apgd(name):
    """Runs Auto-PGD in every norm with every loss."""
    import torch
    from autoattack import autopgd_base

    autopgd_base.L0_norm = lambda delta: (delta.abs() > 1e-12).reshape(len(delta), -1).sum(-1)
    stored = draw_arrays(name)
    net = build(name, stored)
    for place in ("box", "middle"):
        order = net(torch.tensor(stored[f"x.{place}"], dtype=torch.float64)).argsort(dim=1)
        stored[f"labels.{place}"], stored[f"targets.{place}"] = order[:, -1].numpy(), order[:, -2].numpy()
    for norm, eps in EPS.items():
        stored[f"eps.{norm}"], place = np.float64(eps), "middle" if norm == "l2" else "box"
        x, noise = (torch.tensor(stored[key], dtype=torch.float64) for key in (f"x.{place}", f"noise.{norm}"))
        labels, targets = (torch.tensor(stored[f"{key}.{place}"]) for key in ("labels", "targets"))
        torch.rand = lambda *_, noise=noise, **__: (noise + 1.0) / 2.0
        torch.randn = torch.randn_like = lambda *_, noise=noise, **__: noise.clone()
        for (loss, steps), wide in itertools.product(CASES[name], (False, True) if norm == "l1" else (False,)):
            recorder = Recorder(net)
            attack = autopgd_base.APGDAttack_targeted(
                recorder, n_iter=steps, norm=norm.capitalize(), eps=eps, device="cpu"
            )
            attack.init_hyperparam(x)
            attack.loss, attack.y_target = LOSSES[loss], targets
            if wide:
                first = int(np.ceil(0.3 * steps))
                attack.decr_eps_pgd(x, labels, [3.0 * eps, 2.0 * eps, eps], [first, first, steps - 2 * first])
            else:
                attack.attack_single_run(x, labels)
            stored.update(recorder.collect(f"{norm}.{loss}.{steps}{'.wide' if wide else ''}"))
    return stored


def record_dlr():
    """Evaluates the two losses on logits of few values."""
    import torch
    from autoattack import autopgd_base

    rng = np.random.default_rng(1)
    logits = np.where(np.arange(200)[:, None] < 150, rng.integers(0, 4, (200, 6)) / 2.0, rng.normal(size=(200, 6)))
    labels, shift = rng.integers(0, 6, 200), rng.integers(1, 6, 200)
    targets = (labels + shift) % 6
    attack = autopgd_base.APGDAttack_targeted(None, eps=1.0)
    attack.y_target = torch.tensor(targets)
    given = torch.tensor(logits), torch.tensor(labels)
    values = {"dlr": attack.dlr_loss(*given).numpy(), "targeted": attack.dlr_loss_targeted(*given).numpy()}
    return {"logits": logits, "labels": labels, "targets": targets, **values}


def record_fab():
    """Projects points onto hyperplanes inside the box."""
    import torch
    from autoattack import fab_projections

    rng = np.random.default_rng(2)
    points = np.clip(1.4 * rng.uniform(size=(200, 6)) - 0.2, 0.0, 1.0)
    w = rng.normal(size=(200, 6)) * 10.0 ** rng.integers(-1, 2, (200, 1))
    w[:40] *= rng.uniform(size=(40, 6)) < 0.6
    w[40:44] = 0.0
    # Offsets from what the box reaches and beyond: about a third of the problems cannot be solved.
    least, most = np.minimum(w, 0.0).sum(axis=1), np.maximum(w, 0.0).sum(axis=1)
    b = least + (most - least) * rng.uniform(-0.25, 1.25, 200)
    stored = {"points": points, "w": w, "b": b}
    for norm in EPS:
        project = getattr(fab_projections, f"projection_{norm}")
        stored[norm] = project(*(torch.tensor(stored[key]) for key in ("points", "w", "b"))).numpy()
    return stored


def record_square():
    """Notes the size of the square in every query; the net never gives in."""
    import torch
    from autoattack import square

    stored = {}
    for side in (8, 28, 32):
        for norm in EPS:
            attack = square.SquareAttack(None, norm=norm.capitalize(), n_queries=2100, eps=0.1, resc_schedule=False)
            sides = []

            def net(x, sides=sides):
                caller = sys._getframe(2).f_locals
                if "i_iter" in caller:
                    sides.append(caller["s"])
                return torch.tensor([[1.0, 0.0]]).repeat(len(x), 1)

            attack.predict = net
            x = torch.full((1, 1, side, side), 0.5)
            attack.init_hyperparam(x)
            attack.attack_single_run(x, torch.tensor([0]))
            stored[f"{norm}.{side}"] = np.array(sides, np.int16)
    attack = square.SquareAttack(None, resc_schedule=False)
    stored["p"] = np.array([attack.p_selection(i) for i in range(9000)])
    attack = square.SquareAttack(None, n_queries=1000, resc_schedule=True)
    stored["p.rescaled"] = np.array([attack.p_selection(i) for i in range(1000)])
    return stored


def record_fab_steps():
    """Notes where each step of FAB begins."""
    import torch
    from autoattack.fab_pt import FABAttack_PT

    stored = {}
    kinds = [*((norm, True) for norm in EPS), ("linf", False), ("l2", False)]
    for name, (norm, is_targeted) in itertools.product(NETS, kinds):
        arrays = draw_arrays(name)
        net, x = build(name, arrays), torch.tensor(arrays["x.box" if is_targeted else "x.middle"], dtype=torch.float64)
        attack = FABAttack_PT(net, norm=norm.capitalize(), n_iter=20, eps=EPS[norm], device="cpu")
        points, attack.target_class = [], 2
        method = f"get_diff_logits_grads_batch{'_targeted' if is_targeted else ''}"
        linearise = getattr(attack, method)

        def noting(point, *classes, linearise=linearise, points=points):
            points.append(point.numpy().copy())
            return linearise(point, *classes)

        setattr(attack, method, noting)
        attack.attack_single_run(x, net(x).argmax(dim=1), is_targeted=is_targeted)
        stored[f"{name}.{norm}.{'targeted' if is_targeted else 'all'}.points"] = np.array(points)
    return stored


def record_square_steps(num_queries=60):
    """Notes what Square draws in every query, and what becomes of it."""
    import torch
    from autoattack.square import SquareAttack

    rng, shape = np.random.default_rng(3), (NUM_INPUTS, 2, 10, 10)
    stored = {
        "dense1.weight": rng.normal(size=(16, 200)) * 0.1, "dense1.bias": rng.normal(size=16) * 0.1,
        "dense2.weight": rng.normal(size=(5, 16)) * 0.5, "dense2.bias": rng.normal(size=5) * 0.1,
        "x": np.clip(1.6 * rng.uniform(size=shape) - 0.3, 0.0, 1.0),
    }
    x, mlp = torch.tensor(stored["x"]), build("mlp", stored)
    net = lambda x: mlp(x.flatten(1))
    torch.manual_seed(0)
    labels, rand = net(x).argmax(dim=1), torch.rand
    stored["labels"] = labels.numpy()
    for norm, eps in {"linf": 0.01, "l2": 0.1, "l1": 0.5}.items():
        draws = {"windows": [], "signs": [], "turned": [], "loss": []}
        attack = SquareAttack(net, norm=norm.capitalize(), n_queries=num_queries, eps=eps, resc_schedule=False)

        def integer(low, high, draws=draws):
            draws["windows"].append(int(low + (high - low) * rand(1)))
            return draws["windows"][-1]

        def signs(sizes, draws=draws):
            # One sign for each channel of all images.
            one = torch.sign(2.0 * rand([1, *sizes[-3:]]) - 1.0)
            draws["signs"].append(one[0, :, 0, 0].numpy())
            return one.expand(sizes) if len(sizes) == 4 else one[0]

        def margin_and_loss(x, y, judge=attack.margin_and_loss, norm=norm, draws=draws):
            stored.setdefault(f"{norm}.start", x.numpy().copy())
            margin, loss = judge(x, y)
            draws["loss"].append(loss.numpy().copy())
            return margin, loss

        def turn(sizes, draws=draws):
            draws["turned"].append(rand(sizes))
            return draws["turned"][-1]

        attack.random_int, attack.random_choice, attack.margin_and_loss, torch.rand = (
            integer, signs, margin_and_loss, turn
        )
        attack.init_hyperparam(x)
        attack.attack_single_run(x, labels)
        torch.rand, stored[f"eps.{norm}"] = rand, np.float64(eps)
        # What came before the first query made the starting point.
        stored[f"{norm}.windows"] = np.array(draws["windows"]).reshape(num_queries, -1, 2)
        stored[f"{norm}.signs"] = np.array(draws["signs"][-num_queries:])
        stored[f"{norm}.turned"] = np.array([draw.item() > 0.5 for draw in draws["turned"][-num_queries:]])
        stored[f"{norm}.loss"] = np.array(draws["loss"][1:])
    return stored


def main():
    """Writes the file of every part."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=OUTPUT, help="the folder that the files go to")
    options = parser.parse_args()
    try:
        import autoattack  # noqa: F401
        import torch
    except ImportError as error:
        sys.exit(f"{error}: run this script in a Python environment with torch and autoattack installed.")

    parts = {
        "dlr": record_dlr, "fab": record_fab, "fab_steps": record_fab_steps, "square": record_square,
        "square_steps": record_square_steps,
    }
    parts.update({f"apgd_{name}": lambda name=name: record_apgd(name) for name in NETS})
    torch.set_default_dtype(torch.float64)
    torch.Tensor.float = torch.Tensor.double
    options.output.mkdir(parents=True, exist_ok=True)
    for part, record in parts.items():
        stored, path = record(), options.output / f"attacks_{part}.npz"
        np.savez_compressed(path, **stored)
        print(f"{path.name}: {len(stored)} arrays, {path.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
