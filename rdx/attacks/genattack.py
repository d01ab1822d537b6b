"""GenAttack: a genetic algorithm (Alzantot et al. 2019, arXiv:1805.11090)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from rdx import goals, losses, norms
from rdx.attacks import base, driver
from rdx.balls import Ball
from rdx.goals import Goal
from rdx.types import Array, ArrayLike, AttackResult, Key, LogitsFn

# Rate and range of mutations before any plateau, and what each plateau multiplies them by.
_FIRST_RATE, _FIRST_RANGE, _DECAY = 0.5, 0.4, 0.9


class _Context(NamedTuple):
    problem: base.Problem
    members: Array  # [population_size]: their numbers
    least_rate: Array
    least_range: Array
    temperature: Array
    plateau_length: Array


class _Population(NamedTuple):
    points: Array  # [B, n, ...]
    success: Array  # [B, n]
    loss: Array  # [B, n]


class _State(NamedTuple):
    keys: Key
    population: _Population
    peak: Array  # [B]: greatest loss so far
    age: Array  # [B]: generations since it rose, or since the last plateau
    num_plateaus: Array  # [B]
    found: base.Found


def genattack(
    key: Key, logits_fn: LogitsFn, x: ArrayLike, labels: ArrayLike, *, ball: Ball, goal: Goal | None = None,
    index: ArrayLike | None = None, num_steps: int = 1000, population_size: int = 10, mutation_rate: ArrayLike = 0.1,
    mutation_range: ArrayLike = 0.15, temperature: ArrayLike = 0.3, plateau_length: int = 100,
    loop: driver.Loop = driver.AUTO,
) -> AttackResult:
    """Breeds a population of perturbed inputs: the fittest survives, all others are children of fit parents, mutated.

    Parents are drawn with probabilities `p = softmax(fitness / temperature)`; a child takes each element from one of
    its two parents, with odds `p_1 : p_2`; with probability `rho` an element is mutated by `U(-a eps, a eps)`; then the
    child is projected. `rho = max(mutation_rate, 0.5 * 0.9^m)` and `a = max(mutation_range, 0.4 * 0.9^m)` after `m`
    plateaus, which are `plateau_length` generations without a greater fitness.

    The fitness is the loss of the goal. The paper's is `log p_t - log sum_{j != t} p_j` for a target `t`, which is
    `goals.target(targets, losses.targeted_log_odds)`; foolbox subtracts the logit itself from the sum.

    Source: Alzantot et al. (2019, arXiv:1805.11090, Algorithm 1, Sec. 4), which attacks towards targets in the linf
    ball; for the untargeted attack and for other norms we know no source. Numbers as in foolbox, but for the
    adaptive rates, which are the paper's. The fittest is not evaluated again, as in the paper's count of queries.

    Args:
        key: one key; example `i` uses it folded with `index[i]`.
        logits_fn: `x [B, ...] -> logits [B, K]`; it sees `B * (population_size - 1)` points at once.
        x: clean inputs, shape `[B, ...]`.
        labels: shape `[B]`, int.
        ball: the threat model, of any norm.
        goal: what is maximised and what counts as success; `goals.misclassify(losses.margin)` by default.
        index: places in the data set, shape `[B]`, int; `0..B-1` by default.
        num_steps: generations.
        population_size: members of each, at least 2.
        mutation_rate: least share of the elements that are mutated.
        mutation_range: least size of mutations in units of `ball.eps`.
        temperature: of the selection.
        plateau_length: generations without progress that lower rate and range.
        loop: see `rdx.attacks.driver.Loop`; examples stop at success by default.

    Returns:
        The attack's result: `1 + population_size + num_steps * (population_size - 1)` forward passes, fewer for
        examples that stop.

    Raises:
        ValueError: on a population without children, unusable inputs, or NaN logits.
    """
    if population_size < 2:
        raise ValueError(f"population_size={population_size} leaves no children beside the fittest: give at least 2.")
    goal = goals.misclassify(losses.margin) if goal is None else goal
    problem, found = base.begin(logits_fn, x, labels, ball, goal)
    rate, reach, heat = (jnp.asarray(value, problem.x.dtype) for value in (mutation_rate, mutation_range, temperature))
    members = jnp.arange(population_size)
    context = _Context(problem, members, rate, reach, heat, jnp.asarray(plateau_length, jnp.int32))
    found, trace = driver.run(
        _METHOD, context, base.example_keys(key, problem.x, index), found, num_steps=num_steps, stops=True, loop=loop
    )
    return base.report(problem, found, trace)


def _start(context: _Context, keys: Key, found: base.Found) -> _State:
    ball, x, num = context.problem.ball, context.problem.x, len(context.members)
    keys = jax.vmap(lambda key: jax.random.split(key, num + 1))(keys)
    points = jax.vmap(lambda row: ball.sample(row, x), in_axes=1, out_axes=1)(keys[:, 1:])
    population = _Population(points, *base.evaluate_many(context.problem, points))
    found = base.spend(found, base.strongest(*population), forwards=num)
    none = 0 * found.forwards
    return _State(keys[:, 0], population, population.loss.max(axis=1), none, none, found)


def _step(context: _Context, state: _State, i: Array) -> _State:
    ball, x = context.problem.ball, context.problem.x
    decay = _DECAY ** state.num_plateaus.astype(x.dtype)
    rate = jnp.maximum(context.least_rate, _FIRST_RATE * decay)
    reach = jnp.maximum(context.least_range, _FIRST_RANGE * decay)
    children = jax.vmap(_breed, in_axes=(0, 0, 0, None, 0))(
        base.fold(state.keys, i), state.population.points, state.population.loss, context.temperature, rate
    )
    points = children.points + norms.expand(reach, children.mutations) * ball.radius(x)[:, None] * children.mutations
    points = jax.vmap(lambda point: ball.project(point, x), in_axes=1, out_axes=1)(points)
    success, loss = base.evaluate_many(context.problem, points)
    found = base.spend(state.found, base.strongest(points, success, loss), forwards=points.shape[1])

    elite = base.strongest(*state.population)
    population = _Population(*(
        jnp.concatenate([kept[:, None], new], axis=1) for kept, new in zip(elite, (points, success, loss), strict=True)
    ))
    peak = jnp.fmax(state.peak, loss.max(axis=1))
    age = jnp.where(peak > state.peak, 0, state.age + 1)
    is_plateau = age >= context.plateau_length
    num_plateaus = state.num_plateaus + is_plateau.astype(state.num_plateaus.dtype)
    return _State(state.keys, population, peak, jnp.where(is_plateau, 0, age), num_plateaus, found)


class _Children(NamedTuple):
    points: Array  # [n - 1, ...]
    mutations: Array  # [n - 1, ...], in [-1, 1]; 0 where there is none


def _breed(key: Key, points: Array, loss: Array, temperature: Array, rate: Array) -> _Children:
    """Crosses and mutates one example's population, `points [n, ...]` with `loss [n]`."""
    parent_key, cross_key, where_key, what_key = jax.random.split(key, 4)
    shape = (len(points) - 1, *points.shape[1:])
    # Finite, so that members whose loss is not are drawn least, and never all with probability NaN.
    fitness = jnp.nan_to_num(loss / temperature, nan=jnp.finfo(loss.dtype).min)
    first, second = jax.random.categorical(parent_key, fitness, shape=(2, shape[0]))
    odds = jax.nn.sigmoid(fitness[first] - fitness[second])
    draws = jax.random.uniform(cross_key, shape, points.dtype)
    crossed = jnp.where(draws < norms.expand(odds, points), points[first], points[second])
    is_mutated = jax.random.uniform(where_key, shape, points.dtype) < rate
    return _Children(crossed, jnp.where(is_mutated, jax.random.uniform(what_key, shape, points.dtype, -1.0), 0.0))


_METHOD = driver.Method(_start, _step)
