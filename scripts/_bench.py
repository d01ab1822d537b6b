"""What the side-by-side benchmarks share: nets, their weights in both layouts, the peer process, rounds and tables.

Both sides import this file, so jax and torch are imported inside functions. Images are [B, H, W, C] for jax and
[B, C, H, W] for torch; whatever crosses over is converted here, on the jax side.
"""

# ruff: noqa: TID251
import argparse
import gzip
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

# Thread pools spin for a while after their last task; the other side's turn begins when they sleep.
PAUSE_S = 0.05
WARM_UP_ROUNDS = 2
# A turn takes the slower side about so long; a case all in all at most so long.
TURN_S = 0.5
CASE_S = 240.0
MOST_CALLS = 64


class Conv(NamedTuple):
    """A convolution with square kernel and symmetric padding."""

    features: int
    size: int
    stride: int
    padding: int


class Dense(NamedTuple):
    """A dense layer; the first one flattens its input."""

    features: int


@dataclass(frozen=True)
class Net:
    """A chain of layers with relu between them."""

    name: str
    layers: tuple
    input_shape: tuple = (28, 28, 1)

    def kernel_shapes(self):
        """Lists each layer's kernel as `(H, W, I, O)`; a dense layer is one that spans its whole input."""
        (height, width, channels), shapes = self.input_shape, []
        for layer in self.layers:
            if isinstance(layer, Conv):
                shapes.append((layer.size, layer.size, channels, layer.features))
                height, width = ((n + 2 * layer.padding - layer.size) // layer.stride + 1 for n in (height, width))
            else:
                shapes.append((height, width, channels, layer.features))
                height = width = 1
            channels = layer.features
        return shapes

    def init(self, seed=0):
        """Draws `[(kernel, bias), ...]`, float32; convolution kernels are HWIO, dense ones `[inputs, outputs]`."""
        rng, params = np.random.default_rng(seed), []
        for layer, shape in zip(self.layers, self.kernel_shapes(), strict=True):
            kernel = rng.normal(size=shape) * np.sqrt(2.0 / np.prod(shape[:3]))
            bias = rng.normal(size=shape[3]) * 0.05
            kernel = kernel if isinstance(layer, Conv) else kernel.reshape(-1, shape[3])
            params.append((kernel.astype(np.float32), bias.astype(np.float32)))
        return params

    def logits(self, params, x):
        """Computes the logits in jax, `x [B, H, W, C] -> [B, K]`."""
        import jax
        from jax import lax

        for i, (layer, (kernel, bias)) in enumerate(zip(self.layers, params, strict=True)):
            x = x if i == 0 else jax.nn.relu(x)
            if isinstance(layer, Conv):
                padding, dimensions = [(layer.padding, layer.padding)] * 2, ("NHWC", "HWIO", "NHWC")
                x = lax.conv_general_dilated(x, kernel, (layer.stride,) * 2, padding, dimension_numbers=dimensions)
                x = x + bias[None, None, None, :]
            else:
                x = x.reshape(x.shape[0], -1) @ kernel + bias[None, :]
        return x

    def to_torch(self, params):
        """Converts parameters (or their gradients) to torch's layout, named as in `torch_module`."""
        arrays = {}
        for i, (layer, shape) in enumerate(zip(self.layers, self.kernel_shapes(), strict=True)):
            kernel, bias = (np.asarray(value) for value in params[i])
            kernel = kernel.reshape(shape).transpose(3, 2, 0, 1)
            arrays[f"layer{i}.weight"] = kernel if isinstance(layer, Conv) else kernel.reshape(shape[3], -1)
            arrays[f"layer{i}.bias"] = bias
        return arrays

    def torch_module(self, arrays):
        """Builds the net in torch, `x [B, C, H, W] -> [B, K]`, from what `to_torch` gave."""
        from collections import OrderedDict

        import torch
        from torch import nn

        modules = OrderedDict()
        for i, (layer, (height, width, channels, _)) in enumerate(zip(self.layers, self.kernel_shapes(), strict=True)):
            if i:
                modules[f"relu{i}"] = nn.ReLU()
            if isinstance(layer, Conv):
                modules[f"layer{i}"] = nn.Conv2d(channels, *layer)
                continue
            if "flatten" not in modules:
                modules["flatten"] = nn.Flatten()
            modules[f"layer{i}"] = nn.Linear(height * width * channels, layer.features)
        module = nn.Sequential(modules).eval()
        module.load_state_dict({name: torch.tensor(arrays[name]) for name in module.state_dict()})
        return module


NETS = {
    "conv": Net("conv", (Conv(16, 4, 2, 1), Conv(32, 4, 1, 1), Dense(100), Dense(10))),
    "mlp": Net("mlp", (Dense(1024), Dense(1024), Dense(10))),
    "dm-large": Net(
        "dm-large",
        (Conv(64, 3, 1, 1), Conv(64, 3, 1, 1), Conv(128, 3, 2, 1), *(Conv(128, 3, 1, 1),) * 2, Dense(512), Dense(10)),
        (32, 32, 3),
    ),
}


def images(batch, shape=(28, 28, 1)):
    """Gives `x [B, *shape]` and labels: MNIST's first test images where RDX_DATA_DIR is set and fits, else random."""
    if shape == (28, 28, 1) and (folder := os.environ.get("RDX_DATA_DIR")):
        files = (("images-idx3", 16), ("labels-idx1", 8))
        paths = ((Path(folder) / "mnist" / f"t10k-{kind}-ubyte.gz", offset) for kind, offset in files)
        x, labels = (
            np.frombuffer(gzip.decompress(path.read_bytes()), np.uint8, offset=offset) for path, offset in paths
        )
        return (x.reshape(-1, 28, 28, 1)[:batch] / np.float32(255)), labels[:batch].astype(np.int32)
    rng = np.random.default_rng(1)
    return rng.uniform(size=(batch, *shape)).astype(np.float32), rng.integers(0, 10, batch).astype(np.int32)


def channels_first(x):
    """Converts `[B, H, W, C]` to torch's `[B, C, H, W]`."""
    return np.ascontiguousarray(np.asarray(x).transpose(0, 3, 1, 2))


def parse_arguments(description, **extra):
    """Parses the options that both benchmarks have; `extra` maps further names to keyword arguments of add_argument."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--peer-python", default=os.environ.get("RDX_PEER_PYTHON"), help="default: RDX_PEER_PYTHON")
    parser.add_argument("--peer", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--nets", nargs="+", choices=list(NETS), default=list(NETS))
    parser.add_argument("--out", type=Path, help="writes <out>.md and <out>.json")
    for name, options in extra.items():
        parser.add_argument(f"--{name}", **options)
    arguments = parser.parse_args()
    if not arguments.peer and not arguments.peer_python:
        sys.exit(
            "Skipped: --peer-python or RDX_PEER_PYTHON must name a Python in which torch and the peers are importable."
        )
    # Holds for every thread pool, ours and the peer's, which inherits it; must come before jax or torch start theirs.
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: arguments.threads])
    return arguments


class Peer:
    """The one process that runs torch; it answers a JSON line on stdin with one on stdout, arrays go through files."""

    def __init__(self, python, script, threads):
        self._folder = tempfile.TemporaryDirectory()
        command = [python, script, "--peer", "--threads", str(threads)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.versions = self._receive()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._process.stdin.close()
        self._process.wait()
        self._folder.cleanup()

    def prepare(self, arrays, **request):
        """Prepares a case from arrays, runs it once, and gives the arrays that it computed."""
        given, computed = (str(Path(self._folder.name) / name) for name in ("given.npz", "computed.npz"))
        np.savez(given, **arrays)
        self._send(request | {"given": given, "computed": computed})
        self._receive()
        with np.load(computed) as file:
            return dict(file)

    def seconds(self, case):
        """Runs a prepared case once and gives the time that it took."""
        self._send({"case": case, "time": True})
        return self._receive()["seconds"]

    def peak_mb(self):
        """Gives the most memory that the process has ever had."""
        self._send({"memory": True})
        return self._receive()["peak_mb"]

    def _send(self, request):
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()

    def _receive(self):
        line = self._process.stdout.readline()
        if not line:
            sys.exit("The peer process ended early: see its message above.")
        return json.loads(line)


def serve(threads, packages, build):
    """Answers a `Peer`; `build(request, arrays)` gives a function without arguments that returns named tensors."""
    try:
        import torch

        modules = {name: __import__(name) for name in packages}
    except ImportError as error:
        sys.exit(f"{error}: --peer-python must name a Python in which torch and {', '.join(packages)} are importable.")

    torch.set_num_threads(threads)
    # What libraries print must not mix with the answers.
    answers = os.dup(1)
    os.dup2(2, 1)
    cases = {}

    def answer(**reply):
        os.write(answers, (json.dumps(reply) + "\n").encode())

    versions = {name: getattr(module, "__version__", "unnumbered") for name, module in modules.items()}
    answer(torch=torch.__version__, **versions)
    for line in sys.stdin:
        request = json.loads(line)
        if "memory" in request:
            answer(peak_mb=peak_mb())
            continue
        if "time" in request:
            start = time.perf_counter()
            cases[request["case"]]()
            answer(seconds=time.perf_counter() - start)
            continue
        with np.load(request["given"]) as file:
            run = cases[request["case"]] = build(request, dict(file))
        computed = run()
        np.savez(request["computed"], **{name: value.detach().numpy() for name, value in computed.items()})
        answer()


def seconds(run):
    """Gives the time of one call, until its arrays are ready."""
    import jax

    start = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - start


def peak_mb():
    """Gives the most memory that this process has ever had."""
    status = Path("/proc/self/status")
    if status.exists():  # what `getrusage` says begins with the size of the process that started this one
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def alternate(runs, rounds):
    """Calls each run in turns, `rounds` of them after warm-up, fewer of those that take long.

    A turn is several calls one after the other, as in a training loop or an evaluation: in the first few a side's
    threads wake up and its caches fill, which for small cases would be most of what is measured.

    Args:
        runs: functions by name, which return the seconds that they took.
        rounds: how often each run has its turn.

    Returns:
        The median seconds of each run, and rounds and calls in words.
    """
    once = {name: run() for name, run in runs.items()}
    calls = int(np.clip(TURN_S / max(once.values()), 1, MOST_CALLS))
    rounds = int(np.clip(CASE_S / (calls * sum(once.values())), 1, rounds))
    taken, warm_up = {name: [] for name in runs}, WARM_UP_ROUNDS if calls > 1 else 0
    for _ in range(warm_up + rounds):
        for name, run in runs.items():
            time.sleep(PAUSE_S)
            taken[name].append([run() for _ in range(calls)])
    medians = {name: float(np.median(turns[warm_up:])) for name, turns in taken.items()}
    return medians, f"{rounds} x {calls}"


def agreement(ours, theirs, tolerance):
    """Gives the largest difference of named arrays, exits where one exceeds `tolerance * max(1, scale)`."""
    differences = {name: float(np.abs(np.asarray(ours[name]) - value).max()) for name, value in theirs.items()}
    scales = {name: float(np.abs(value).max()) for name, value in theirs.items()}
    for name, difference in differences.items():
        if not difference <= tolerance * max(1.0, scales[name]):
            sys.exit(f"Not timed: {name} differs by {difference:.2e} at scale {scales[name]:.2e}: the sides disagree.")
    worst = max(differences, key=differences.get)
    return {"max difference": differences[worst], "at scale": scales[worst]}


def versions(arguments, of_peer):
    """Collects what ran where."""
    import jax

    return {
        "machine": f"{platform.machine()}, {arguments.threads} threads each, load {os.getloadavg()[0]:.2f} before",
        "versions": {"jax": jax.__version__, **of_peer},
        **{name: os.environ.get(name, "") for name in ("XLA_FLAGS", "GLIBC_TUNABLES")},
    }


def settings(arguments, peer, **extra):
    """Collects what a reader needs to judge the figures."""
    return {
        **versions(arguments, peer.versions),
        "batch": arguments.batch,
        "figures": "median of all calls in rounds in which ours and theirs take turns, each of several calls one after "
        f"the other, after {WARM_UP_ROUNDS} rounds to warm up where calls are short",
        "images": "MNIST test" if os.environ.get("RDX_DATA_DIR") else "uniform random",
        **extra,
    }


def row_name(row):
    """Gives the first column."""
    return next(iter(row.values()))


def earlier_rows(settings, out):
    """Reads the rows of an earlier run if its settings are the same, but for the load of the machine."""
    if out is None or not out.with_suffix(".json").exists():
        return []
    earlier = json.loads(out.with_suffix(".json").read_text())
    is_same = all(earlier["settings"].get(name) == value for name, value in settings.items() if name != "machine")
    return earlier["rows"] if is_same else []


def report(title, settings, rows, out):
    """Prints a markdown table of rows (dicts with the same keys) and the settings; writes them where `out` is given.

    Rows that an earlier run of the same versions left there are kept, except for what has been measured again.
    """
    rows = [*({row_name(row): row for row in [*earlier_rows(settings, out), *rows]}).values()]
    shown = [[f"{value:.3g}" if isinstance(value, float) else value for value in row.values()] for row in rows]
    lines = [f"# {title}", "", f"| {' | '.join(rows[0])} |", "|" + "---|" * len(rows[0])]
    lines += [f"| {' | '.join(cells)} |" for cells in shown]
    lines += ["", *(f"- {name}: {value}" for name, value in settings.items())]
    text = "\n".join(lines)
    print(text)
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.with_suffix(".md").write_text(text + "\n")
        record = {"title": title, "settings": settings, "rows": rows}
        out.with_suffix(".json").write_text(json.dumps(record, indent=2) + "\n")
