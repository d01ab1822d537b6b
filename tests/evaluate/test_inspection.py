"""What the jaxpr of a model shows."""

import jax
import jax.numpy as jnp
import masked
import pytest
from masked import KEY

from rdx import attacks
from rdx.evaluate import checks
from rdx.evaluate.inspection import inspect


def _directions():
    return jnp.eye(64).reshape(64, 1, 8, 8, 1)[:9]


def _descending(net, x):
    # Zeroth order: slopes from differences of the loss, one direction a turn.
    loss = lambda v: jax.nn.logsumexp(net(v), axis=1)[:, None, None, None]

    def step(point, direction):
        slope = loss(point + 0.1 * direction) - loss(point - 0.1 * direction)
        return point - 0.1 * slope * direction, None

    return net(jax.lax.scan(step, x, _directions())[0])


def _rejecting(net, x):
    is_unsure = lambda point: net(point).max() < 1.0
    return net(jax.lax.while_loop(is_unsure, lambda point: 0.9 * point, x.reshape(len(x), 64)))


def _along_itself(net, x):
    return x + jax.jvp(net, (x,), (x,))[1].mean(axis=1)[:, None, None, None]


def _forward_mode_in_a_loop(net, x):
    return net(jax.lax.scan(lambda point, _: (_along_itself(net, point), None), x, None, 2)[0])


def _recurrent(net, x):
    # As many hidden units as an input has elements.
    first, second = net.args[0]
    cell = lambda hidden, row: (jnp.tanh(hidden @ first + row[..., 0] @ first[:8]), None)
    return jax.lax.scan(cell, jnp.zeros((len(x), 64)), jnp.moveaxis(x, 1, 0))[0] @ second


def _layers_in_a_loop(net, x):
    first, second = net.args[0]
    layers = jnp.broadcast_to(first[:32, :32], (3, 32, 32))
    hidden = x.reshape(len(x), 64) @ first[:, :32]
    return jax.lax.scan(lambda h, w: (jax.nn.relu(h @ w), None), hidden, layers)[0] @ second[:32]


def _attending(net, x):
    # Keys in chunks, a sum shaped as the inputs.
    tokens = x[..., 0]

    def chunk(total, keys):
        weights = jnp.exp(jnp.einsum("btd,bsd->bts", tokens, keys))
        return total + jnp.einsum("bts,bsd->btd", weights, keys)[..., None], None

    return net(jax.lax.scan(chunk, jnp.zeros_like(x), jnp.moveaxis(tokens.reshape(len(x), 4, 2, 8), 1, 0))[0])


INSPECTED = {
    "plain": (lambda net, x: jax.jit(net)(x), True, ()),
    "log_softmax": (lambda net, x: jax.nn.log_softmax(net(x)), True, ()),
    "logsumexp": (lambda net, x: net(x) - jax.nn.logsumexp(net(x), axis=1, keepdims=True), True, ()),
    "unused": (lambda net, x: (jnp.round(x), net(x))[1], True, ()),
    "round": (masked.quantised, False, ("blocked",)),
    "in a jit": (lambda net, x: jax.jit(masked.quantised)(net, x), False, ("blocked",)),
    "in part": (lambda net, x: net(x) + net(jnp.floor(x)), True, ("blocked",)),
    "in a scan": (lambda net, x: net(jax.lax.scan(lambda c, _: (jnp.sign(c), c), x, None, 2)[0]), False, ("blocked",)),
    "in a branch": (lambda net, x: net(jax.lax.cond(x.sum() > 0, jnp.ceil, jnp.sin, x)), True, ("blocked",)),
    "in a while": (lambda net, x: net(jax.lax.while_loop(lambda c: c.sum() < 1, jnp.round, x)), False, ("blocked",)),
    "comparison": (lambda net, x: net((x > 0.5).astype(x.dtype)), False, ()),
    "threshold": (lambda net, x: net(jnp.where(x > 0.5, x, 0.0)), True, ()),
    "argmax": (lambda net, x: jax.nn.one_hot(net(x).argmax(axis=1), 10), False, ()),
    "random": (lambda net, x: net(x) + jax.random.normal(KEY, (1, 10)), True, ("random",)),
    "custom": (lambda net, x: net(attacks.translation_invariant(lambda v: v, jnp.ones((3, 3)))(x)), True, ("custom",)),
    "a scope's name": (lambda net, x: jax.named_scope("transpose_block")(net)(x), True, ()),
    "recurrent": (_recurrent, True, ()),
    "layers in a loop": (_layers_in_a_loop, True, ()),
    "attention in chunks": (_attending, True, ()),
    "dynamic": (lambda net, x: net(masked.transform(net, x)), True, ("blocked", "dynamic", "search")),
    "in a map": (lambda net, x: net(x - jax.vmap(jax.grad(lambda v: net(v[None]).max()))(x)), True, ("dynamic",)),
    "forward mode": (lambda net, x: net(_along_itself(net, x)), True, ("dynamic",)),
    "forward mode in a loop": (_forward_mode_in_a_loop, True, ("dynamic", "search")),
    "zeroth order": (_descending, True, ("search",)),
    "a search in a condition": (_rejecting, True, ("search",)),
}


@pytest.mark.parametrize("name", INSPECTED)
def test_inspection(name):
    model, has_path, kinds = INSPECTED[name]
    net = masked.net()
    found = inspect(lambda x: model(net, x), masked.images()[0])
    assert found.has_path == has_path
    assert tuple(kind for kind in found._fields[1:] if getattr(found, kind)) == kinds
    assert checks.code(found).status == ("fail" if not has_path else "warn" if kinds else "ok")
    if kinds == ("blocked",):
        assert "masked.py" in found.blocked[0] or "test_inspection.py" in found.blocked[0]
