"""A small net of the digits, and defences that mask its gradients."""

import functools

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from rdx import attacks, data, losses
from rdx.attacks import adaptive
from rdx.balls import Ball

KEY, BALL, NUM = jax.random.key(1), Ball("linf", 0.2), 60
APGD = functools.partial(attacks.apgd, num_steps=20)


def _mlp(parameters, x):
    first, second = parameters
    return jax.nn.relu((x.reshape(len(x), -1) - 0.3) @ first) @ second


def _train(key, through=lambda key, x: x):
    """Trains on the digits by 200 full steps with momentum."""
    source = data.load("digits", "train")
    x, labels = jnp.asarray(source.images, jnp.float32) / 255, jnp.asarray(source.labels)

    def step(state, i):
        parameters, speed = state
        seen = through(jax.random.fold_in(key, i), x)
        slope = jax.grad(lambda p: losses.cross_entropy(_mlp(p, seen), labels).mean())(parameters)
        speed = jax.tree.map(lambda v, g: 0.9 * v - 0.1 * g, speed, slope)
        return (jax.tree.map(jnp.add, parameters, speed), speed), None

    first, second = jax.random.split(key)
    start = (0.15 * jax.random.normal(first, (64, 64)), 0.1 * jax.random.normal(second, (64, 10)))
    (parameters, _), _ = jax.jit(lambda s: jax.lax.scan(step, s, jnp.arange(200)))(
        (start, jax.tree.map(jnp.zeros_like, start))
    )
    return Partial(_mlp, parameters)


@functools.cache
def net():
    return _train(jax.random.key(0))


@functools.cache
def images():
    source = data.load("digits", "test")
    return jnp.asarray(source.images[:NUM], jnp.float32) / 255, jnp.asarray(source.labels[:NUM])


def accuracy(model, x):
    return float((model(x).argmax(axis=1) == images()[1]).mean())


@functools.cache
def undefended():
    x, labels = images()
    assert accuracy(net(), x) > 0.9
    return accuracy(net(), APGD(KEY, net(), x, labels, ball=BALL).x_adv)


def saturating(net, x):
    logits = net(x)
    middle = jax.lax.top_k(logits, 2)[0].mean(axis=1, keepdims=True)
    return jnp.clip(1e4 * (logits - middle), -5.0, 5.0)


def quantise(x):
    return jnp.round(4.0 * x) / 4.0


def quantised(net, x):
    return net(quantise(x))


def through_the_quantiser(net, x):
    return net(adaptive.straight_through(quantise)(x))


def huge(net, x):
    return 1e4 * net(x)


def stopped(net, x):
    return net(jax.lax.stop_gradient(x))


def noisy(net, keys, x):
    logits = net(x)
    return logits + 4.0 * jax.vmap(lambda key: jax.random.normal(key, logits.shape[1:]))(keys)


def resized(net, keys, x):
    def change(key, image):
        size_key, place_key = jax.random.split(key)
        scale = jax.random.uniform(size_key, (2,), minval=0.86, maxval=1.14)
        shift = jax.random.uniform(place_key, (2,), minval=-0.7, maxval=0.7) + 4.0 * (1.0 - scale)
        return jax.image.scale_and_translate(image, image.shape, (0, 1), scale, shift, "linear", antialias=False)

    return net(jax.vmap(change)(keys, x))


def transform(helper, x, *, start=0.0, sign=jnp.sign, clip=jnp.clip):
    """Moves images towards the helper's least likely class, by up to 0.2 (Xiao & Zheng 2020): 13 steps of 0.2 / 6."""
    wanted = helper(x).argmin(axis=1)

    def step(point, i):
        slope = jax.grad(lambda v: losses.cross_entropy(helper(v), wanted).sum())(point)
        return clip(point - 0.2 / 6 * sign(slope), x - 0.2, x + 0.2)

    return adaptive.unrolled(step, x + start, 13)


@functools.cache
def transformation_nets():
    """Trains the helper, and the classifier of images that it transforms from random starts."""
    helper = _train(jax.random.key(7))

    def through(key, x):
        return transform(helper, x, start=jax.random.uniform(key, x.shape, minval=-0.2, maxval=0.2))

    return helper, _train(jax.random.key(8), through)


def transformed(helper, classifier, x):
    # With the derivatives that the paper gives signs and projections.
    return classifier(transform(helper, x, sign=adaptive.soft_sign, clip=adaptive.soft_clip))


def transformed_by_signs(helper, classifier, x):
    return classifier(transform(helper, x))


def through_the_transformation(helper, classifier, x):
    return classifier(adaptive.straight_through(Partial(transform, helper))(x))
