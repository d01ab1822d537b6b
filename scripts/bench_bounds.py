"""Times certified bounds of rdx and auto_LiRPA side by side: IBP, CROWN-IBP, one CROWN-IBP training step.

    python scripts/bench_bounds.py --peer-python PATH      # a Python in which torch and auto_LiRPA are importable

Lower bounds of the margins z_y - z_j under linf, eps 0.1 in the box [0, 1]; the same weights, images and relu rule on
both sides. Nothing is timed unless the numbers agree. A ratio below 1 means that rdx is faster.
"""

# ruff: noqa: TID251
import sys

import _bench
import numpy as np

EPS = 0.1
LEARNING_RATE = 1e-3
TOLERANCE = 1e-3
METHODS = ("IBP", "CROWN-IBP", "CROWN-IBP training step")


def ours(net, method, relu, x, labels):
    """Builds a function without arguments that runs the method once and returns its named arrays."""
    import jax
    import jax.numpy as jnp
    from jax.tree_util import Partial

    from rdx import balls, bounds, compilation, losses, margins

    relu_lower = {"adaptive": bounds.relaxations.adaptive, "same-slope": bounds.relaxations.same_slope}[relu]

    def lower(params, x, labels, eps):
        margins_fn, region = margins.of(Partial(net.logits, params)), balls.Ball("linf", eps).region(x)
        if method == "IBP":
            return bounds.ibp(margins_fn, region, labels).lower
        return bounds.crown_ibp(margins_fn, region, labels, relu_lower=relu_lower, intersect=False).lower

    def step(params, *batch):
        def loss(params):
            return losses.worst_case_cross_entropy(lower(params, *batch)).mean()

        value, gradient = jax.value_and_grad(loss)(params)
        return value, jax.tree.map(lambda p, g: p - LEARNING_RATE * g, params, gradient)

    params = jax.tree.map(jnp.asarray, net.init())
    batch = jnp.asarray(x), jnp.asarray(labels), jnp.float32(EPS)
    if not method.endswith("training step"):
        bound = jax.jit(lower, compiler_options=compilation.cpu_options())
        return lambda: {"bounds": bound(params, *batch)}
    update, state = jax.jit(step, compiler_options=compilation.cpu_options()), {"params": params}

    def run():
        loss, state["params"] = update(state["params"], *batch)
        return {"loss": loss, "params": state["params"]}

    return run


def theirs(request, arrays):
    """Builds the same in auto_LiRPA; the bounded module, the margin matrix and the optimiser are made beforehand."""
    import torch
    from auto_LiRPA import BoundedModule, BoundedTensor, PerturbationLpNorm

    net = _bench.NETS[request["net"]].torch_module(arrays)
    x, labels = torch.tensor(arrays["x"]), torch.tensor(arrays["labels"]).long()
    module = BoundedModule(net, x, bound_opts={"activation_bound_option": request["relu"]}, device="cpu")
    classes = torch.eye(10)
    others = torch.tensor([[j for j in range(10) if j != y] for y in labels.tolist()])
    matrix = classes[labels][:, None, :] - classes[others]

    def lower():
        ends = (x - EPS).clamp(0.0, 1.0), (x + EPS).clamp(0.0, 1.0)
        bounded = BoundedTensor(x, PerturbationLpNorm(norm=np.inf, eps=EPS, x_L=ends[0], x_U=ends[1]))
        name = request["method"].split()[0]
        return module.compute_bounds(x=(bounded,), C=matrix, method=name, bound_upper=False)[0]

    def bound():
        with torch.no_grad():
            return {"bounds": lower()}

    optimizer = torch.optim.SGD(module.parameters(), lr=LEARNING_RATE)
    target = torch.zeros(len(x), dtype=torch.long)

    def step():
        optimizer.zero_grad()
        padded = torch.cat([torch.zeros(len(x), 1), -lower()], dim=1)
        loss = torch.nn.functional.cross_entropy(padded, target)
        loss.backward()
        optimizer.step()
        return {"loss": loss} | {name: p.grad for name, p in net.named_parameters()}

    return step if request["method"].endswith("training step") else bound


def comparable(net, computed):
    """Converts what a first run of ours computed to torch's layout; a step's gradients are read off its update."""
    if "params" not in computed:
        return computed
    before, after = net.to_torch(net.init()), net.to_torch(computed["params"])
    return {"loss": computed["loss"]} | {name: (before[name] - after[name]) / LEARNING_RATE for name in before}


def measure(peer, net, method, arguments):
    """Checks one case for agreement and times it."""
    x, labels = _bench.images(arguments.batch)
    computed = {}
    run = ours(net, method, arguments.relu, x, labels)
    first = _bench.seconds(lambda: computed.update(run()) or computed)
    arrays = net.to_torch(net.init()) | {"x": _bench.channels_first(x), "labels": labels}
    case = f"{net.name}, {method}"
    reference = peer.prepare(arrays, case=case, net=net.name, method=method, relu=arguments.relu)
    agrees = _bench.agreement(comparable(net, computed), reference, TOLERANCE)
    taken = _bench.alternate(
        {"ours": lambda: _bench.seconds(run), "theirs": lambda: peer.seconds(case)}, arguments.rounds
    )
    return {
        "case": case,
        "ours ms": 1e3 * taken["ours"],
        "theirs ms": 1e3 * taken["theirs"],
        "ratio": taken["ours"] / taken["theirs"],
        "our compile s": first - taken["ours"],
        **agrees,
    }


def main():
    """Runs every case and reports."""
    relu = {"choices": ["adaptive", "same-slope"], "default": "adaptive", "help": "lower relu line on both sides"}
    arguments = _bench.parse_arguments(__doc__.splitlines()[0], relu=relu)
    if arguments.peer:
        _bench.serve(arguments.threads, ["auto_LiRPA"], theirs)
        return
    with _bench.Peer(arguments.peer_python, sys.argv[0], arguments.threads) as peer:
        notes = _bench.settings(
            arguments,
            peer,
            relu=arguments.relu,
            compared="bounds (forward cases), loss and every parameter's gradient (training step)",
            fairness="lower bounds only on both sides; ours jitted with weights, images, labels and eps as arguments, "
            "under compilation.cpu_options(); theirs without autograd in forward cases, BoundedModule, margin matrix "
            "and optimiser made beforehand",
        )
        rows = [measure(peer, _bench.NETS[net], method, arguments) for net in arguments.nets for method in METHODS]
    _bench.report("Certified bounds: rdx and auto_LiRPA", notes, rows, arguments.out)


if __name__ == "__main__":
    main()
