"""Times certified bounds of rdx and auto_LiRPA side by side, with what they cost in memory and how tight they are.

    python scripts/bench_bounds.py --peer-python PATH      # a Python in which torch and auto_LiRPA are importable

Lower bounds of the margins z_y - z_j under linf in the box [0, 1]; the same weights, images and relu rule on both
sides. IBP, CROWN-IBP and a CROWN-IBP training step are not timed unless the numbers agree. CROWN and alpha-CROWN, each
tool with its defaults, are not timed unless ours are nowhere looser (CROWN) or no looser on average (alpha-CROWN). A
ratio below 1 means that rdx is faster, or takes less memory: the most that a fresh process had for this case alone.
The share of the product rate is the limit that the machine sets: our operations per second, as `bounds.plan` counts
them, over those of XLA's plain product of two matrices, which takes its turn beside the others.
"""

# ruff: noqa: TID251
import subprocess
import sys
import time
from typing import NamedTuple

import _bench
import numpy as np

LEARNING_RATE = 1e-3
TOLERANCE = 1e-3
NUM_STEPS = 20
PRODUCT = 1024
EPS = {"conv": 0.1, "mlp": 0.1, "dm-large": 2 / 255}


class Case(NamedTuple):
    """What to run; `hidden_steps` is how long our alpha-CROWN optimises hidden layers, whose bounds theirs shares."""

    net: str
    method: str
    batch: int
    hidden_steps: int | None = None

    def __str__(self):
        steps = "" if self.hidden_steps is None else f" ({self.hidden_steps} hidden steps)"
        return f"{self.net}, {self.method}{steps}, batch {self.batch}"


FAST = ("IBP", "CROWN-IBP", "CROWN-IBP training step")
CASES = [
    *(Case(net, method, 128) for net in ("conv", "mlp") for method in FAST),
    *(Case("dm-large", method, 8) for method in FAST),
    Case("conv", "CROWN", 4),
    Case("mlp", "CROWN", 16),
    Case("dm-large", "CROWN", 1),
    Case("conv", "alpha-CROWN", 4, 5),
    Case("mlp", "alpha-CROWN", 16, 7),
]


def program(case, relu):
    """Builds the jitted function of a case: `(params, x, labels, eps) -> bounds`, or a loss and updated parameters."""
    import functools

    import jax
    from jax.tree_util import Partial

    from rdx import balls, bounds, compilation, losses, margins

    relu_lower = {"adaptive": bounds.relaxations.adaptive, "same-slope": bounds.relaxations.same_slope}[relu]
    compute = {
        "IBP": bounds.ibp,
        "CROWN-IBP": functools.partial(bounds.crown_ibp, relu_lower=relu_lower, intersect=False),
        "forward": functools.partial(bounds.forward, relu_lower=relu_lower),
        "CROWN": functools.partial(bounds.crown, relu_lower=relu_lower),
        "alpha-CROWN": functools.partial(bounds.alpha_crown, num_steps=NUM_STEPS, hidden_steps=case.hidden_steps or 10),
    }[case.method.removesuffix(" training step")]

    def lower(params, x, labels, eps):
        logits_fn = Partial(_bench.NETS[case.net].logits, params)
        return compute(margins.of(logits_fn), balls.Ball("linf", eps).region(x), labels).lower

    def step(params, *batch):
        def loss(params):
            return losses.worst_case_cross_entropy(lower(params, *batch)).mean()

        value, gradient = jax.value_and_grad(loss)(params)
        return value, jax.tree.map(lambda p, g: p - LEARNING_RATE * g, params, gradient)

    is_step = case.method.endswith("training step")
    return jax.jit(step if is_step else lower, compiler_options=compilation.cpu_options())


def arguments_of_ours(case):
    """Gives what the function of a case takes."""
    import jax
    import jax.numpy as jnp

    net, x, labels, _ = arrays_of(case)
    return jax.tree.map(jnp.asarray, net.init()), jnp.asarray(x), jnp.asarray(labels), jnp.float32(EPS[case.net])


def ours(case, relu):
    """Builds a function without arguments that runs the method once and returns its named arrays."""
    function, (params, *batch) = program(case, relu), arguments_of_ours(case)
    if not case.method.endswith("training step"):
        return lambda: {"bounds": function(params, *batch)}
    state = {"params": params}

    def run():
        loss, state["params"] = function(state["params"], *batch)
        return {"loss": loss, "params": state["params"]}

    return run


def flops(case, relu):
    """Counts the operations of a case."""
    from rdx.bounds import cost

    return cost.flops(program(case, relu).trace(*arguments_of_ours(case)).jaxpr.jaxpr)


def product():
    """Builds a function that multiplies two square matrices: what the machine can do at this moment."""
    import jax
    import jax.numpy as jnp

    from rdx import compilation

    multiply = jax.jit(jnp.matmul, compiler_options=compilation.cpu_options())
    factor = jax.random.normal(jax.random.key(0), (PRODUCT, PRODUCT))
    return lambda: multiply(factor, factor)


def compile_seconds(case, relu):
    """Times the compilation of a case."""
    function, given = program(case, relu), arguments_of_ours(case)
    start = time.perf_counter()
    function.lower(*given).compile()
    return time.perf_counter() - start


def theirs(request, arrays):
    """Builds the same in auto_LiRPA; the bounded module, the margin matrix and the optimiser are made beforehand."""
    import torch
    from auto_LiRPA import BoundedModule, BoundedTensor, PerturbationLpNorm

    net, eps = _bench.NETS[request["net"]].torch_module(arrays), EPS[request["net"]]
    x, labels = torch.tensor(arrays["x"]), torch.tensor(arrays["labels"]).long()
    options = {
        "activation_bound_option": request["relu"],
        "optimize_bound_args": {"iteration": NUM_STEPS, "enable_alpha_crown": True},
    }
    module = BoundedModule(net, x, bound_opts=options, device="cpu")
    classes = torch.eye(10)
    others = torch.tensor([[j for j in range(10) if j != y] for y in labels.tolist()])
    matrix = classes[labels][:, None, :] - classes[others]
    name = {"alpha-CROWN": "CROWN-Optimized"}.get(request["method"], request["method"].split()[0])

    def lower():
        ends = (x - eps).clamp(0.0, 1.0), (x + eps).clamp(0.0, 1.0)
        bounded = BoundedTensor(x, PerturbationLpNorm(norm=np.inf, eps=eps, x_L=ends[0], x_U=ends[1]))
        return module.compute_bounds(x=(bounded,), C=matrix, method=name, bound_upper=False)[0]

    def bound():
        with torch.set_grad_enabled(name == "CROWN-Optimized"):
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


def check(case, net, computed, reference):
    """Exits where the numbers of both sides do not fit; gives what the table says of them."""
    if case.method in FAST:
        return _bench.agreement(comparable(net, computed), reference, TOLERANCE)
    found, expected = np.asarray(computed["bounds"]), reference["bounds"]
    looser = expected.mean() - found.mean() if case.method == "alpha-CROWN" else (expected - found).max()
    if not looser <= TOLERANCE * max(1.0, np.abs(expected).max()):
        sys.exit(f"Not timed: {case} of ours is looser by {looser:.2e}, {found.mean():.4f} to {expected.mean():.4f}.")
    return {"our mean bound": float(found.mean()), "their mean bound": float(expected.mean())}


def arrays_of(case):
    """Gives net, images and labels of a case, and everything in torch's layout."""
    net = _bench.NETS[case.net]
    x, labels = _bench.images(case.batch, net.input_shape)
    return net, x, labels, net.to_torch(net.init()) | {"x": _bench.channels_first(x), "labels": labels}


def measure(case, arguments):
    """Checks one case, times it and compares the memory."""
    net, _, _, arrays = arrays_of(case)
    run, computed = ours(case, arguments.relu), {}
    first = _bench.seconds(lambda: computed.update(run()) or computed)
    with _bench.Peer(arguments.peer_python, sys.argv[0], arguments.threads) as peer:
        reference = peer.prepare(arrays, case=str(case), net=net.name, method=case.method, relu=arguments.relu)
        fits = check(case, net, computed, reference)
        memory = own_peak_mb(case) / peer.peak_mb()
        multiply = product()
        runs = {
            "ours": lambda: _bench.seconds(run), "theirs": lambda: peer.seconds(str(case)),
            "product": lambda: _bench.seconds(multiply),
        }
        taken, rounds = _bench.alternate(runs, arguments.rounds)
    return {
        "case": str(case),
        "ours ms": 1e3 * taken["ours"],
        "theirs ms": 1e3 * taken["theirs"],
        "ratio": taken["ours"] / taken["theirs"],
        "share of product rate": flops(case, arguments.relu) / taken["ours"] / (2 * PRODUCT**3 / taken["product"]),
        "memory ratio": memory,
        "our compile s": first - taken["ours"],
        "rounds x calls": rounds,
        "numbers": ", ".join(f"{name} {value:.5g}" for name, value in fits.items()),
    }


def own_peak_mb(case):
    """Runs a case of ours once in a process of its own."""
    command = [sys.executable, *sys.argv, "--peak", str(CASES.index(case)), "--peer-python", "unused"]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def report_compilation(arguments):
    """Compiles every method for every net, also where it would take long to run."""
    rows = []
    for method in (*FAST, "forward", "CROWN", "alpha-CROWN"):
        found = {net: compile_seconds(Case(net, method, 2), arguments.relu) for net in arguments.nets}
        rows.append({"method": method} | {f"{net} s": taken for net, taken in found.items()})
        print(rows[-1], flush=True)
    _bench.report("Compile times", _bench.versions(arguments, {}), rows, arguments.out)


def main():
    """Runs every case and reports."""
    relu = {"choices": ["adaptive", "same-slope"], "default": "adaptive", "help": "lower relu line on both sides"}
    peak = {"type": int, "help": "only prints the memory that this case of ours takes, by its number"}
    methods = {"nargs": "+", "choices": [*FAST, "CROWN", "alpha-CROWN"], "default": [*FAST, "CROWN", "alpha-CROWN"]}
    compiles = {"action": "store_true", "help": "only reports how long each of our methods compiles, on each net"}
    options = {"relu": relu, "peak": peak, "methods": methods, "compile": compiles}
    arguments = _bench.parse_arguments(__doc__.splitlines()[0], **options)
    if arguments.peer:
        _bench.serve(arguments.threads, ["auto_LiRPA"], theirs)
        return
    if arguments.peak is not None:
        case = CASES[arguments.peak]
        _bench.seconds(ours(case, arguments.relu))
        print(_bench.peak_mb())
        return
    if arguments.compile:
        report_compilation(arguments)
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
    rows = []
    for case in CASES:
        if case.net in arguments.nets and case.method in arguments.methods:
            rows.append(measure(case, arguments))
            print(rows[-1], flush=True)
    _bench.report("Certified bounds: rdx and auto_LiRPA", notes, rows, arguments.out)


if __name__ == "__main__":
    main()
