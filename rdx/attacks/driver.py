"""The one loop of all attacks: restarts, best so far, queries, early stop by compaction, traces, budgets, resumption.

An attack is a `Method`, module-level functions over explicit pytrees:

    init(context, keys [B], found) -> state
    step(context, state, i) -> state
    finish(context, state) -> Found

`context` holds what stays fixed. Its field `problem` has all of it that differs from example to example: inputs,
labels, targets, radii and `problem.data`; every other leaf belongs to all of them. `state` is what the steps carry
along, every leaf with the batch axis first; its field `found` is the strongest input so far and its cost. So examples
can be dropped when they are done, and none notices who else is there.
"""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rdx.attacks import base, resumption
from rdx.attacks.base import Found, Problem
from rdx.compilation import cpu_options
from rdx.progress import bar
from rdx.types import Array, ArrayLike, Key, Trace

# Examples that run are never fewer than this in an array: compiling for less does not pay.
_LEAST_SIZE = 8
# Above this many, a quarter of a power of two of fillers costs more than compiling for another size.
_FINE_SIZE = 32


@dataclasses.dataclass(frozen=True)
class Loop:
    """How the driver runs an attack; results do not depend on it, but for `stop` and `max_queries`.

    XLA's CPU backend runs convolutions slowly inside loops, accelerators pay for every launch from the host. So "auto"
    loops on the host over one compiled step when the state lies on a CPU, and compiles the loop on accelerators and
    wherever anything is traced (under an outer `jit`, `vmap` or `grad`).

    Attributes:
        kind: "auto", or "host" or "compiled" to force the choice; "host" under `vmap` still runs the fast compiled
            step, under `jit` it unrolls.
        stop: whether examples that are done take no further step, queries or restarts; by default the attack's habit.
        max_queries: no step is begun for an example that has spent so many forward passes and gradients together.
        trace: whether the result tells the course of the attack, step by step.
        chunk: steps between two calls of `progress`, two files at `checkpoint` and two chances to drop what is done.
        progress: called with the steps taken, the steps in all and the examples still running; True shows a bar if
            standard error is a terminal.
        checkpoint: a file in which the state is kept; a run that was interrupted goes on from there, and the file
            disappears at the end. That of another run is refused, as far as runs can be told apart: not by what a
            plain closure holds, see `resumption.digest`. Neither this nor `progress` has an effect under an outer
            transformation.
    """

    kind: Literal["auto", "host", "compiled"] = "auto"
    stop: bool | None = None
    max_queries: int | None = None
    trace: bool = False
    chunk: int = 10
    progress: Callable[[int, int, int], None] | bool | None = None
    checkpoint: str | Path | None = None


AUTO = Loop()


def size_for(num: int) -> int:
    """Rounds a number of examples up to one of few sizes of arrays, so that little is compiled.

    They are powers of two and, above 32, the three sizes between, so that at most a fifth of the rows are fillers.
    """
    whole = max(_LEAST_SIZE, 1 << (num - 1).bit_length())
    step = whole // 8 if whole > _FINE_SIZE else whole
    return -(-num // step) * step


def take_found(context: Any, state: Any) -> Found:
    """Takes what the steps found: the `finish` of attacks whose last step has evaluated its own result."""
    del context
    return state.found


def has_succeeded(context: Any, found: Found) -> Array:
    """Tells which examples need no further step, shape `[B]`: those for which the goal is reached."""
    del context
    return found.best.success


class Method(NamedTuple):
    """An attack's functions; see the module's docstring.

    Attributes:
        init: begins a restart.
        step: one iteration; `i` counts from 0 in every restart.
        finish: ends a restart; what it returns must be at least as good as the `found` given to `init`.
        done: `(context, found) -> bool [B]`: which examples need no further step. Once true it stays so.
    """

    init: Callable[[Any, Key, Found], Any]
    step: Callable[[Any, Any, Array], Any]
    finish: Callable[[Any, Any], Found] = take_found
    done: Callable[[Any, Found], Array] = has_succeeded


class _Plan(NamedTuple):
    """What a compilation depends on."""

    method: Method
    stop: bool
    max_queries: int | None
    trace: bool


def run(
    method: Method, context: Any, keys: Key, found: Found, *, num_steps: int, num_restarts: int = 1,
    stops: bool = False, loop: Loop = AUTO,
) -> tuple[Found, Trace | None]:
    """Runs an attack, restart `r` with the keys folded with `r`, and carries the strongest input along.

    The first restarts of a longer run are the shorter run, so more restarts are never weaker.

    Args:
        method: the attack's functions.
        context: what stays fixed; its first field is the `Problem`.
        keys: one per example, shape `[B]`.
        found: the strongest input so far, from `base.begin`.
        num_steps: steps of each restart.
        num_restarts: number of restarts.
        stops: whether the attack's habit is to stop examples that are done.
        loop: how to run it.

    Returns:
        The strongest input and what it cost; the trace where `loop` asks for it.

    Raises:
        ValueError: on unusable numbers or settings, and on a checkpoint of another run.
    """
    if num_steps < 1 or num_restarts < 1 or loop.chunk < 1:
        raise ValueError(
            f"num_steps={num_steps}, num_restarts={num_restarts} and chunk={loop.chunk} must all be at least 1."
        )
    if loop.kind not in ("auto", "host", "compiled"):
        raise ValueError(f"Unknown loop {loop.kind!r}: use 'auto', 'host' or 'compiled'.")
    plan = _Plan(method, stops if loop.stop is None else loop.stop, loop.max_queries, loop.trace)
    if base.is_traced((context, keys, found)):
        return _run_traced(plan, context, keys, found, num_steps, num_restarts, loop.kind)
    return _Run(plan, context, keys, found, num_steps, num_restarts, loop).run()


def _may_halt(plan: _Plan) -> bool:
    return plan.stop or plan.max_queries is not None


def _halted(plan: _Plan, context: Any, found: Found) -> Array:
    """Tells which examples take no further step, shape `[B]`."""
    halted = plan.method.done(context, found) if plan.stop else jnp.zeros_like(found.best.success)
    spent = found.forwards + found.gradients
    return halted if plan.max_queries is None else halted | (spent >= plan.max_queries)


def _freeze(plan: _Plan, context: Any, found: Found, new: Found) -> Found:
    return base.choose(_halted(plan, context, found), found, new) if _may_halt(plan) else new


def _init(plan: _Plan, context: Any, keys: Key, found: Found, r: ArrayLike) -> Any:
    state = plan.method.init(context, base.fold(keys, r), found)
    return state._replace(found=_freeze(plan, context, found, state.found))


def _step(plan: _Plan, context: Any, state: Any, i: Array) -> tuple[Any, Trace | None]:
    new = plan.method.step(context, state, i)
    found = _freeze(plan, context, state.found, new.found)
    return new._replace(found=found), _observe(context.problem, found) if plan.trace else None


def _finish(plan: _Plan, context: Any, state: Any) -> Found:
    return _freeze(plan, context, state.found, plan.method.finish(context, state))


def _observe(problem: Problem, found: Found) -> Trace:
    distance = problem.ball.distance(found.best.x, problem.x)
    return Trace(found.best.success, found.best.loss, distance, found.forwards, found.gradients)


def _steps(plan: _Plan, num: int, context: Any, state: Any, first: ArrayLike) -> tuple[Any, Trace | None]:
    return jax.lax.scan(lambda carry, i: _step(plan, context, carry, i), state, jnp.arange(num) + first)


def _run_traced(
    plan: _Plan, context: Any, keys: Key, found: Found, num_steps: int, num_restarts: int, kind: str
) -> tuple[Found, Trace | None]:
    def attempt(found: Found, r: ArrayLike) -> tuple[Found, Trace | None]:
        state, traces = _call_init(plan, context, keys, found, r), []
        if kind == "host":
            for i in range(num_steps):
                state, seen = _call_step(plan, context, state, np.int32(i))
                traces.append(seen)
            trace = jax.tree.map(lambda *rows: jnp.stack(rows), *traces)
        else:
            state, trace = _steps(plan, num_steps, context, state, np.int32(0))
        return _call_finish(plan, context, state), trace

    if num_restarts == 1 or kind == "host":
        traces = []
        for r in range(num_restarts):
            found, trace = attempt(found, np.int32(r))
            traces.append(trace)
        return found, jax.tree.map(lambda *parts: jnp.concatenate(parts), *traces)
    found, trace = jax.lax.scan(attempt, found, jnp.arange(num_restarts, dtype=np.int32))
    return found, jax.tree.map(lambda rows: rows.reshape(-1, *rows.shape[2:]), trace)


class _Run:
    """A run outside of any transformation: `rows` are those of all examples that still run, the first `standing`.

    The rows after them are fillers, since arrays have few sizes, so that little is compiled.
    """

    def __init__(
        self, plan: _Plan, context: Any, keys: Key, found: Found, num_steps: int, num_restarts: int, loop: Loop
    ) -> None:
        self.plan, self.all_context, self.all_keys, self.loop = plan, context, keys, loop
        self.context, self.keys, self.num_steps, self.num_restarts = context, keys, num_steps, num_restarts
        self.whole, self.standing = found, len(found.forwards)
        self.rows, self.traces, self.running = np.arange(self.standing), [], self.standing
        devices = found.best.x.devices()
        self.is_compact = len(devices) == 1  # without rows of its own a device would be idle
        on_cpu = all(device.platform == "cpu" for device in devices)
        self.on_host = loop.kind == "host" or (loop.kind == "auto" and on_cpu)
        is_watched = _may_halt(plan) or bool(loop.progress) or loop.checkpoint is not None
        self.stride = loop.chunk if is_watched else num_steps

    def run(self) -> tuple[Found, Trace | None]:
        state, r, first = self._resume()
        label, total = self.plan.method.step.__module__.rpartition(".")[-1], self.num_restarts * self.num_steps
        with bar(label, total, first=r * self.num_steps + first, is_shown=self.loop.progress is True) as show:
            self.show = show
            self._restarts(state, r, first)
        if self.loop.checkpoint is not None:
            Path(self.loop.checkpoint).unlink(missing_ok=True)
        return self.whole, self._whole_trace()

    def _restarts(self, state: Any, r: int, first: int) -> None:
        while r < self.num_restarts and self.standing:
            if state is None:
                found, _ = self._drop_halted(self._found(), None)
                if not self.standing:
                    break
                state = _call_init(self.plan, self.context, self.keys, found, np.int32(r))
            self._restart(state, r, first)
            state, r, first = None, r + 1, 0

    def _restart(self, state: Any, r: int, first: int) -> None:
        # Steps donate their state, and a fresh one may share buffers with the caller's arrays.
        state = jax.tree.map(jnp.copy, state)
        for start in range(first, self.num_steps, self.stride):
            end = min(start + self.stride, self.num_steps)
            state = self._advance(state, start, end)
            _, state = self._drop_halted(state.found, state)
            self._tell(r * self.num_steps + end)
            if not self.standing:
                return
            if self.loop.checkpoint is not None:
                place = np.array([r, end, self.standing])
                tree = (state, self.whole, self.rows, self._trace_so_far(), place)
                resumption.save(self.loop.checkpoint, self._fingerprint, tree)
        self._keep(_call_finish(self.plan, self.context, state))

    def _tell(self, done: int) -> None:
        self.show(done, f"{self.running} running  ")
        if callable(self.loop.progress):
            self.loop.progress(done, self.num_restarts * self.num_steps, self.running)

    def _advance(self, state: Any, first: int, last: int) -> Any:
        if self.on_host:
            seen = []
            for i in range(first, last):
                state, row = _donating_step()(self.plan, self.context, state, np.int32(i))
                seen.append(row)
            trace = jax.tree.map(lambda *rows: jnp.stack(rows), *seen)
        else:
            state, trace = _donating_steps()(self.plan, last - first, self.context, state, np.int32(first))
        if self.plan.trace:
            self.traces.append(self._spread(trace))
        return state

    def _drop_halted(self, found: Found, state: Any) -> tuple[Found, Any]:
        """Keeps those still running, in arrays of the next size, once that saves a quarter."""
        if not _may_halt(self.plan):
            return found, state
        halted = np.asarray(_call_halted(self.plan, self.context, found))
        alive = np.flatnonzero(~halted[: self.standing])
        self.running = len(alive)
        size = size_for(len(alive))
        if len(alive) and (not self.is_compact or 4 * size > 3 * len(self.rows)):
            return found, state
        self._keep(found)
        if not len(alive):
            self.standing = 0  # an empty selection of sharded rows has no layout
            return found, state
        taken = np.resize(alive, size)
        self._take(self.rows[taken], len(alive))
        return jax.tree.map(lambda leaf: leaf[taken], (found, state))

    def _take(self, rows: np.ndarray, standing: int) -> None:
        self.rows, self.standing = rows, standing
        self.keys = self.all_keys[rows]
        self.context = self.all_context._replace(problem=base.take(self.all_context.problem, rows))

    def _found(self) -> Found:
        if len(self.rows) == len(self.whole.forwards):
            return self.whole
        return jax.tree.map(lambda leaf: leaf[self.rows], self.whole)

    def _keep(self, found: Found) -> None:
        rows, num = self.rows[: self.standing], self.standing
        if num == len(self.whole.forwards):
            self.whole = found
        else:
            self.whole = jax.tree.map(lambda old, new: old.at[rows].set(new[:num]), self.whole, found)

    def _spread(self, trace: Trace) -> Trace:
        """Writes the steps of those still running into arrays of all; the others stay as they were."""
        rows, num = self.rows[: self.standing], self.standing
        return jax.tree.map(
            lambda end, new: jnp.repeat(end[None], len(new), axis=0).at[:, rows].set(new[:, :num]),
            _observe(self.all_context.problem, self.whole), trace,
        )

    def _trace_so_far(self) -> Trace | None:
        return jax.tree.map(lambda *parts: jnp.concatenate(parts), *self.traces) if self.plan.trace else None

    def _whole_trace(self) -> Trace | None:
        if not self.plan.trace:
            return None
        missing = self.num_restarts * self.num_steps - sum(len(part.success) for part in self.traces)
        ends = _observe(self.all_context.problem, self.whole)
        self.traces.append(jax.tree.map(lambda end: jnp.repeat(end[None], missing, axis=0), ends))
        return self._trace_so_far()

    @functools.cached_property
    def _fingerprint(self) -> str:
        return resumption.digest(self.plan, self.all_context, self.all_keys, self.num_steps, self.num_restarts)

    def _resume(self) -> tuple[Any, int, int]:
        if self.loop.checkpoint is None or not Path(self.loop.checkpoint).exists():
            return None, 0, 0
        state = jax.eval_shape(functools.partial(_init, self.plan), self.context, self.keys, self.whole, np.int32(0))
        trace = _observe(self.all_context.problem, self.whole) if self.plan.trace else None
        like = (state, self.whole, self.rows, trace, self.rows)
        state, self.whole, rows, trace, place = resumption.load(self.loop.checkpoint, self._fingerprint, like)
        self.traces = [] if trace is None else [trace]
        self._take(np.asarray(rows), int(place[2]))
        return state, int(place[0]), int(place[1])


# Module-level, with static plans, so that compilations are cached; inside an outer `jit` they are inlined.
_call_init = jax.jit(_init, static_argnums=0)
_call_step = jax.jit(_step, static_argnums=0)
_call_finish = jax.jit(_finish, static_argnums=0)
_call_halted = jax.jit(_halted, static_argnums=0)


# Steps taken outside of any transformation also tell the compiler how; which options it knows, it is asked when needed.
@functools.cache
def _donating_step() -> Callable[..., Any]:
    return jax.jit(_step, static_argnums=0, donate_argnums=2, compiler_options=cpu_options())


@functools.cache
def _donating_steps() -> Callable[..., Any]:
    return jax.jit(_steps, static_argnums=(0, 1), donate_argnums=3, compiler_options=cpu_options())
