"""Networks: sizes, normalisation, and one compilation per model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rdx import models
from rdx.models.normalise import normalise


def _shapes(model, shape):
    return jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, *shape)))["params"]


@pytest.mark.parametrize(("model", "shape", "count"), [
    (models.a5_classifier(), (28, 28, 1), 13_257_290),
    (models.a5_classifier(), (32, 32, 3), 17_190_602),
    (models.fonts_cnn(), (128, 128, 3), 356_342),
    (models.mnist_robustifier(), (28, 28, 1), 1_121),
    (models.cifar_robustifier(), (32, 32, 3), 112_131),
    (models.small_cnn(), (28, 28, 1), 166_406),
    (models.MLP((5,), 3), (2, 2, 1), 4 * 5 + 5 + 5 * 3 + 3),
])
def test_parameter_counts(model, shape, count):
    assert models.num_parameters(_shapes(model, shape)) == count


def test_bench_cnn_keeps_the_resolution_in_its_second_convolution():
    assert _shapes(models.bench_cnn(), (28, 28, 1))["Dense_0"]["kernel"].shape == (14 * 14 * 32, 100)


@pytest.mark.parametrize("kernel", [3, 5])
def test_half_padding_centres_every_kernel(kernel, key):
    model = models.ConvNet((models.Conv(1, kernel, 2),), (), 36, padding="HALF")
    x = jax.random.uniform(key, (2, 12, 12, 1))
    params = jax.tree.map(jnp.zeros_like, model.init(key, x)["params"])
    centre = params["Conv_0"]["kernel"].at[kernel // 2, kernel // 2].set(1.0)
    params = {"Conv_0": {**params["Conv_0"], "kernel": centre}, "Dense_0": {**params["Dense_0"], "kernel": jnp.eye(36)}}
    np.testing.assert_allclose(model.apply({"params": params}, x), x[:, ::2, ::2].reshape(2, 36), atol=1e-6)


def test_mlp_is_the_formula(key):
    model = models.MLP((4,), 3, mean=(0.5,), std=(0.25,))
    x = jax.random.uniform(key, (5, 2, 3, 1))
    variables = model.init(key, x)
    first, second = variables["params"]["Dense_0"], variables["params"]["Dense_1"]
    flat = (np.asarray(x).reshape(5, 6) - 0.5) / 0.25
    expected = np.maximum(flat @ np.asarray(first["kernel"]), 0.0) @ np.asarray(second["kernel"])
    np.testing.assert_allclose(models.logits_fn(model, variables)(x), expected, rtol=1e-5, atol=1e-6)


def test_normalise_acts_per_channel():
    x = jnp.ones((2, 3, 3, 2))
    y = normalise(x, (0.0, 0.5), (1.0, 0.25))
    np.testing.assert_allclose(y[..., 0], 1.0)
    np.testing.assert_allclose(y[..., 1], 2.0)
    assert normalise(x, (0.0,), (1.0,)) is x


def test_convnet_normalises_inside(key):
    x = jax.random.uniform(key, (2, 8, 8, 1))
    plain = models.digits_cnn()
    scaled = plain.clone(mean=(0.5,), std=(0.25,))
    variables = plain.init(key, x)
    np.testing.assert_allclose(scaled.apply(variables, x), plain.apply(variables, (x - 0.5) / 0.25), rtol=1e-5)


def test_robustifier_keeps_the_shape_or_says_how(key):
    x = jnp.zeros((2, 7, 9, 3))
    z, _ = models.cifar_robustifier().init_with_output(key, x)
    assert z.shape == x.shape
    with pytest.raises(ValueError, match="3 channels"):
        models.mnist_robustifier().init(key, x)


def _resnet(key):
    model = models.ResNet(widths=(4, 6), blocks=(1, 1), num_classes=3)
    x = jax.random.uniform(key, (6, 8, 8, 1))
    variables = model.init(key, x)
    return model, variables["params"], {"batch_stats": variables["batch_stats"]}, x


@pytest.mark.parametrize("name", ["mlp", "cnn", "resnet"])
def test_inference_does_not_mix_examples(name, key):
    model = {"mlp": models.MLP((8,), 3), "cnn": models.digits_cnn(), "resnet": _resnet(key)[0]}[name]
    x = jax.random.uniform(key, (6, 8, 8, 1))
    variables = model.init(key, x)
    logits = models.logits_fn(model, variables)
    np.testing.assert_allclose(logits(x)[2:4], logits(x[2:4]), rtol=1e-5, atol=1e-6)


def test_new_variables_and_equal_models_do_not_retrace(key):
    traces = []

    @jax.jit
    def run(fn, x):
        traces.append(None)
        return fn(x)

    x = jax.random.uniform(key, (2, 8, 8, 1))
    first, second = models.ResNet((4,), (1,)), models.ResNet((4,), (1,))
    outputs = [run(models.logits_fn(model, model.init(jax.random.key(seed), x), train=False), x)
               for seed, model in enumerate((first, first, second))]
    assert len(traces) == 1
    assert not np.allclose(outputs[0], outputs[1])
    run(models.logits_fn(models.ResNet((4,), (1,), bn_momentum=0.5), first.init(key, x), train=False), x)
    assert len(traces) == 2


def test_logits_fn_maps_over_an_ensemble(key):
    model = models.MLP((4,), 3)
    x = jax.random.uniform(key, (5, 4))
    stacked = jax.vmap(lambda k: model.init(k, x))(jax.random.split(key, 3))
    logits = jax.vmap(lambda fn: fn(x))(models.logits_fn(model, stacked))
    member = jax.tree.map(lambda leaf: leaf[1], stacked)
    np.testing.assert_allclose(logits[1], model.apply(member, x), rtol=1e-5, atol=1e-6)


def test_forward_is_one_object_per_model_and_holds_no_leaves():
    assert models.forward(models.digits_cnn()) == models.forward(models.digits_cnn())
    assert jax.tree.leaves(models.forward(models.digits_cnn())) == []


def test_forward_without_state(key):
    model = models.digits_cnn()
    x = jax.random.uniform(key, (2, 8, 8, 1))
    params = model.init(key, x)["params"]
    forward = models.forward(model)
    logits, state = forward(params, {}, x, train=True)
    assert state == {}
    assert forward.statistics(params, {}, x) == {}
    np.testing.assert_array_equal(logits, forward.logits_fn(params, {})(x))


def test_forward_updates_the_running_statistics_in_training_only(key):
    model, params, state, x = _resnet(key)
    forward = models.forward(model)
    assert forward(params, state, x, train=False)[1] is state
    _, after = forward(params, state, x, train=True)
    batch = forward.statistics(params, state, x)
    expected = jax.tree.map(lambda old, new: 0.9 * old + 0.1 * new, state, batch)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), after, expected)


def test_inference_with_the_batch_statistics_equals_the_training_pass(key):
    model, params, state, x = _resnet(key)
    forward = models.forward(model)
    logits, _ = forward(params, state, x, train=True)
    inference = forward.logits_fn(params, forward.statistics(params, state, x))
    np.testing.assert_allclose(inference(x), logits, rtol=1e-4, atol=1e-5)
    assert not np.allclose(forward.logits_fn(params, state)(x), logits, atol=1e-3)


def test_gradients_flow_through_the_batch_statistics(key):
    model, params, state, x = _resnet(key)
    forward = models.forward(model)

    def through_training(p):
        return jnp.square(forward(p, state, x, train=True)[0]).sum()

    def through_statistics(p):
        return jnp.square(forward.logits_fn(p, forward.statistics(p, state, x))(x)).sum()

    gradients = jax.jit(jax.grad(through_statistics))(params)
    expected = jax.jit(jax.grad(through_training))(params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=2e-4), gradients, expected)
