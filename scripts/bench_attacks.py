"""Times PGD of rdx, foolbox and torchattacks side by side: linf, eps 0.3, 40 steps of 0.01, no random start.

    python scripts/bench_attacks.py --peer-python PATH     # a Python with torch, foolbox and torchattacks

The same weights and images on all sides. Nothing is timed unless the logits agree and our adversarial loss is at least
the peers'. The ratio is against the faster peer; below 1 means that rdx is faster.
"""

# ruff: noqa: TID251
import sys

import _bench

EPS, NUM_STEPS, STEP_SIZE = 0.3, 40, 0.01
TOOLS = ("foolbox", "torchattacks")
LOGITS_TOLERANCE = 1e-4
# Rounding flips a few gradient signs, after which two correct runs part.
LOSS_TOLERANCE = 0.01


def theirs(request, arrays):
    """Builds the attack of `request["tool"]`, or the logits for comparison."""
    import torch

    # Without this every step would compute the gradients of the weights too.
    net = _bench.NETS[request["net"]].torch_module(arrays).requires_grad_(False)
    x, labels = torch.tensor(arrays["x"]), torch.tensor(arrays["labels"]).long()
    if request["tool"] == "logits":
        return lambda: {"logits": net(x)}
    if request["tool"] == "foolbox":
        import foolbox

        model = foolbox.PyTorchModel(net, bounds=(0, 1), device="cpu")
        attack = foolbox.attacks.LinfPGD(abs_stepsize=STEP_SIZE, steps=NUM_STEPS, random_start=False)
        return lambda: {"x_adv": attack.run(model, x, foolbox.criteria.Misclassification(labels), epsilon=EPS)}
    import torchattacks

    attack = torchattacks.PGD(net, eps=EPS, alpha=STEP_SIZE, steps=NUM_STEPS, random_start=False)
    return lambda: {"x_adv": attack(x, labels)}


def measure(peer, net, arguments):
    """Checks that all sides do the same work on one net and times them."""
    import jax
    import jax.numpy as jnp
    from jax.tree_util import Partial

    from rdx import attacks, balls, losses

    x, labels = _bench.images(arguments.batch)
    logits_fn = Partial(net.logits, jax.tree.map(jnp.asarray, net.init()))
    ball, key, x_ours, labels_ours = balls.Ball("linf", EPS), jax.random.key(0), jnp.asarray(x), jnp.asarray(labels)

    def run():
        return attacks.pgd(
            key,
            logits_fn,
            x_ours,
            labels_ours,
            ball=ball,
            num_steps=NUM_STEPS,
            step_size=STEP_SIZE,
            random_start=False,
        )

    def mean_loss(x_adv):
        if not bool(ball.contains(x_adv, x_ours).all()):
            sys.exit(f"Not timed: adversarial examples of {net.name} leave the ball or the box.")
        return float(losses.cross_entropy(logits_fn(x_adv), labels_ours).mean())

    arrays = net.to_torch(net.init()) | {"x": _bench.channels_first(x), "labels": labels}
    cases = {tool: f"{net.name}, {tool}" for tool in ("logits", *TOOLS)}
    computed = {tool: peer.prepare(arrays, case=case, net=net.name, tool=tool) for tool, case in cases.items()}
    agrees = _bench.agreement({"logits": logits_fn(x_ours)}, computed["logits"], LOGITS_TOLERANCE)
    first = _bench.seconds(run)
    reached = {tool: mean_loss(jnp.asarray(computed[tool]["x_adv"].transpose(0, 2, 3, 1))) for tool in TOOLS}
    reached["rdx"] = mean_loss(run().x_adv)
    if not reached["rdx"] >= (1.0 - LOSS_TOLERANCE) * max(reached.values()):
        sys.exit(f"Not timed: mean adversarial losses on {net.name} are {reached}, so the sides do different work.")
    runs = {tool: lambda case=cases[tool]: peer.seconds(case) for tool in TOOLS}
    taken, rounds = _bench.alternate({"rdx": lambda: _bench.seconds(run)} | runs, arguments.rounds)
    return {
        "case": f"PGD-{NUM_STEPS}, {net.name}",
        **{f"{name} ms": 1e3 * value for name, value in taken.items()},
        "ratio": taken["rdx"] / min(taken[tool] for tool in TOOLS),
        "our compile s": first - taken["rdx"],
        "rounds x calls": rounds,
        **{f"{name} loss": reached[name] for name in taken},
        "max logit difference": agrees["max difference"],
    }


def main():
    """Runs every case and reports."""
    arguments = _bench.parse_arguments(__doc__.splitlines()[0])
    if arguments.peer:
        _bench.serve(arguments.threads, TOOLS, theirs)
        return
    with _bench.Peer(arguments.peer_python, sys.argv[0], arguments.threads) as peer:
        notes = _bench.settings(
            arguments,
            peer,
            attack=f"linf, eps {EPS}, {NUM_STEPS} steps of {STEP_SIZE}, no random start, box [0, 1]",
            loss="mean cross entropy of the adversarial examples, under our logits",
            fairness="ours also keeps the strongest input seen and reports success, the peers return the last iterate; "
            "their models need no gradients of weights; every side may compile and cache before the first round",
        )
        rows = [measure(peer, _bench.NETS[net], arguments) for net in arguments.nets]
    _bench.report("PGD: rdx, foolbox and torchattacks", notes, rows, arguments.out)


if __name__ == "__main__":
    main()
