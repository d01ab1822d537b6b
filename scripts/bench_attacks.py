"""Times attacks of rdx beside foolbox, torchattacks and the original AutoAttack, on the same weights and images.

    python scripts/bench_attacks.py --peer-python PATH     # a Python with torch, foolbox, torchattacks and autoattack

White-box attacks and AutoAttack do the same work on all sides, and nothing is timed unless the logits agree and ours is
as strong. Attacks by queries run where nobody falls, and their time is given for 1,000 queries of one image, because no
two of them spend the same number. The ratio is against the faster peer; below 1 means that rdx is faster.

The share of the net is the limit that the net sets: the forward passes and gradients that the attack counts, at the
speed that they have on their own in arrays of as many images, over the attack's time. Near 1 only the net is left.
"""

# ruff: noqa: TID251
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import _bench

TOOLS = ("foolbox", "torchattacks", "autoattack")
LOGITS_TOLERANCE = 1e-4
# Rounding flips a few gradient signs, after which two correct runs part.
LOSS_TOLERANCE = 0.01
# Share of the images in which AutoAttack may differ: one of 256 and a little.
SUCCESS_TOLERANCE = 0.005
# Passes of the net that are timed together in a turn.
NUM_PASSES = 20


class Case(NamedTuple):
    """An attack as both sides run it.

    Attributes:
        tools: the peers that have it.
        eps: radius.
        ours: `(eps, **arguments of an attack) -> AttackResult`.
        nets: the nets that it runs on.
        compare: what must agree before anything is timed: "loss", "success", or "queries" for time by query.
        batch: images, if not as many as the command line says.
        norm: of the ball.
    """

    tools: tuple[str, ...]
    eps: float
    ours: Callable[..., Any]
    nets: tuple[str, ...] = ("conv", "mlp")
    compare: str = "loss"
    batch: int | None = None
    norm: str = "linf"


def _attack(name, **options):
    def run(*arguments, **given):
        import jax

        from rdx import attacks

        return getattr(attacks, name)(jax.random.key(0), *arguments, **given, **options)

    return run


CASES = {
    "PGD-40": Case(("foolbox", "torchattacks"), 0.3, _attack("pgd", num_steps=40, step_size=0.01, random_start=False)),
    "APGD-CE-100": Case(("torchattacks",), 0.1, _attack("apgd", num_steps=100)),
    "Square": Case(("torchattacks",), 1e-3, _attack("square", num_steps=300), ("conv",), "queries"),
    "SPSA": Case(("torchattacks",), 1e-3, _attack("spsa", num_steps=10, num_samples=128), ("conv",), "queries", 32),
    "HopSkipJump": Case(("foolbox",), 1e-3, _attack("hopskipjump", num_queries=2000), ("conv",), "queries", 32),
    "Boundary": Case(("foolbox",), 1e-3, _attack("boundary", num_queries=1000), ("conv",), "queries", 32, "l2"),
    "AutoAttack": Case(("autoattack",), 0.02, _attack("autoattack"), ("conv",), "success", 256),
}


def _their_attack(name, tool, net, eps):
    """Builds `(x, labels) -> x_adv` of a peer."""
    if tool == "autoattack":
        from autoattack import AutoAttack

        attack = AutoAttack(net, norm="Linf", eps=eps, version="standard", device="cpu", verbose=False, seed=0)
        return lambda x, labels: attack.run_standard_evaluation(x, labels, bs=len(x))
    if tool == "torchattacks":
        import torchattacks

        build = {
            "PGD-40": lambda: torchattacks.PGD(net, eps=eps, alpha=0.01, steps=40, random_start=False),
            "APGD-CE-100": lambda: torchattacks.APGD(net, norm="Linf", eps=eps, steps=100, n_restarts=1, loss="ce"),
            "Square": lambda: torchattacks.Square(net, norm="Linf", eps=eps, n_queries=300, n_restarts=1),
            "SPSA": lambda: torchattacks.SPSA(net, eps=eps, nb_iter=10, nb_sample=128, max_batch_size=4096),
        }
        return build[name]()
    import foolbox

    model = foolbox.PyTorchModel(net, bounds=(0, 1), device="cpu")
    attack = {
        "PGD-40": lambda: foolbox.attacks.LinfPGD(abs_stepsize=0.01, steps=40, random_start=False),
        "HopSkipJump": lambda: foolbox.attacks.HopSkipJumpAttack(steps=8, constraint="linf"),
        "Boundary": lambda: foolbox.attacks.BoundaryAttack(steps=500, tensorboard=False),
    }[name]()
    radius = {"epsilon": eps} if name == "PGD-40" else {}  # the others look for the nearest
    return lambda x, labels: attack.run(model, x, foolbox.criteria.Misclassification(labels), **radius)


def theirs(request, arrays):
    """Builds the attack of `request["tool"]`, or the logits for comparison."""
    import torch

    # Without this every step would compute the gradients of the weights too.
    net = _bench.NETS[request["net"]].torch_module(arrays).requires_grad_(False)
    x, labels = torch.tensor(arrays["x"]), torch.tensor(arrays["labels"]).long()
    if request["tool"] == "logits":
        return lambda: {"logits": net(x)}
    queries = []
    net.register_forward_hook(lambda *call: queries.append(len(call[1][0])))
    attack = _their_attack(request["attack"], request["tool"], net, request["eps"])

    def run():
        queries.clear()
        x_adv = attack(x, labels)
        return {"x_adv": x_adv, "queries": torch.tensor(float(sum(queries)))}

    return run


def passes(logits_fn, x, labels):
    """Builds functions that give the seconds of a forward pass and of a gradient, of the net alone."""
    import jax

    from rdx import compilation, losses

    def logits(x, logits_fn, labels):
        del labels
        return logits_fn(x)

    def loss(x, logits_fn, labels):
        return losses.cross_entropy(logits_fn(x), labels).sum()

    options = compilation.cpu_options()
    forward, gradient = (jax.jit(fn, compiler_options=options) for fn in (logits, jax.value_and_grad(loss)))

    def timed(run):
        return lambda: sum(_bench.seconds(lambda: run(x, logits_fn, labels)) for _ in range(NUM_PASSES)) / NUM_PASSES

    return {"forward": timed(forward), "gradient": timed(gradient)}


def measure(peer, name, case, net, arguments):
    """Checks that all sides do the same work on one net and times them."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.tree_util import Partial

    from rdx import balls, losses
    from rdx.attacks import driver

    x, _ = _bench.images(case.batch or arguments.batch)
    logits_fn = Partial(net.logits, jax.tree.map(jnp.asarray, net.init()))
    # The net's own predictions: peers leave out who has fallen before.
    labels = np.asarray(logits_fn(jnp.asarray(x)).argmax(axis=1), np.int32)
    ball, given = balls.Ball(case.norm, case.eps), (logits_fn, jnp.asarray(x), jnp.asarray(labels))

    def run():
        return case.ours(*given, ball=ball)

    def strength(x_adv):
        if not bool(ball.contains(x_adv, given[1]).all()):
            sys.exit(f"Not timed: adversarial examples of {name} on {net.name} leave the ball or the box.")
        measure_of = losses.is_wrong if case.compare == "success" else losses.cross_entropy
        return float(measure_of(logits_fn(x_adv), given[2]).mean())

    arrays = net.to_torch(net.init()) | {"x": _bench.channels_first(x), "labels": labels}
    label = f"{name}, {net.name}"
    told = {"net": net.name, "attack": name, "eps": case.eps}
    computed = {
        tool: peer.prepare(arrays, case=f"{label}, {tool}", tool=tool, **told) for tool in ("logits", *case.tools)
    }
    _bench.agreement({"logits": logits_fn(given[1])}, computed["logits"], LOGITS_TOLERANCE)
    first, found = _bench.seconds(run), run()
    # Time by query: what one image and 1,000 queries take.
    units = dict.fromkeys(("rdx", *case.tools), 1.0)
    reached = {}
    if case.compare == "queries":
        spent = {"rdx": float(found.forwards.sum()), **{tool: float(computed[tool]["queries"]) for tool in case.tools}}
        units = {tool: 1e-3 * queries for tool, queries in spent.items()}
    else:
        reached = {tool: strength(jnp.asarray(computed[tool]["x_adv"].transpose(0, 2, 3, 1))) for tool in case.tools}
        reached = {"rdx": strength(found.x_adv), **reached}
        best = max(reached.values())
        allowed = SUCCESS_TOLERANCE if case.compare == "success" else LOSS_TOLERANCE * best
        if not reached["rdx"] >= best - allowed:
            sys.exit(f"Not timed: {case.compare} of {label} is {reached}, so the sides do different work.")
    runs = {tool: lambda tool=tool: peer.seconds(f"{label}, {tool}") for tool in case.tools}
    # Most of a cascade's time goes to those that stand to the end.
    standing = driver.size_for(int((~found.success).sum())) if case.compare == "success" else len(x)
    net_runs = passes(logits_fn, given[1][:standing], given[2][:standing])
    taken, rounds = _bench.alternate({"rdx": lambda: _bench.seconds(run)} | net_runs | runs, arguments.rounds)
    alone = sum(float(getattr(found, f"{name}s").sum()) / standing * taken[name] for name in net_runs)
    per_unit = {tool: taken[tool] / units[tool] for tool in units}
    return {
        "case": label,
        "unit": "1,000 queries" if case.compare == "queries" else f"{len(x)} images",
        **{f"{tool} ms": 1e3 * per_unit[tool] if tool in per_unit else "" for tool in ("rdx", *TOOLS)},
        "ratio": per_unit["rdx"] / min(per_unit[tool] for tool in case.tools),
        "share of the net": alone / taken["rdx"],
        "our compile s": first - taken["rdx"],
        "rounds x calls": rounds,
        "compared": ", ".join(f"{tool} {value:.4g}" for tool, value in reached.items()) or "queries of images",
    }


def main():
    """Runs every case and reports."""
    arguments = _bench.parse_arguments(
        __doc__.splitlines()[0], cases={"nargs": "+", "choices": list(CASES), "default": list(CASES)}
    )
    if arguments.peer:
        _bench.serve(arguments.threads, TOOLS, theirs)
        return
    with _bench.Peer(arguments.peer_python, sys.argv[0], arguments.threads) as peer:
        notes = _bench.settings(
            arguments,
            peer,
            attacks="linf, Boundary l2; PGD: eps 0.3, 40 steps of 0.01; APGD: eps 0.1; AutoAttack: standard, eps 0.02; "
            "by queries: eps 0.001, where nobody falls; labels are the net's own predictions",
            compared="mean cross entropy of the adversarial examples (PGD, APGD), share of success (AutoAttack), "
            "under our logits",
            fairness="ours also keeps the strongest input seen, counts queries and reports success; their models need "
            "no gradients of weights; every side may compile and cache before the first round",
        )
        rows = [
            measure(peer, name, CASES[name], _bench.NETS[net], arguments)
            for name in arguments.cases for net in CASES[name].nets if net in arguments.nets
        ]
    _bench.report("Attacks: rdx and peers", notes, rows, arguments.out)


if __name__ == "__main__":
    main()
