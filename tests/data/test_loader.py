"""Sampler, loader and evaluation batches."""

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from rdx import data


def _source(n, shape=(2, 3, 1)):
    rng = np.random.default_rng(n)
    images, labels = rng.integers(0, 256, (n, *shape), np.uint8), rng.integers(0, 10, n).astype(np.int32)
    # Places in the data set differ from positions, as in a subset.
    return data.Source(images, labels, "digits", "test", tuple("0123456789"), 100 + np.arange(n, dtype=np.int32))


@pytest.mark.parametrize(("n", "batch"), [(12, 4), (10, 4), (7, 3), (5, 13), (1, 1)])
def test_every_epoch_holds_every_example_once(n, batch):
    sampler = data.Sampler(n, batch, 0)
    stream = np.concatenate([sampler.indices(step) for step in range(4 * n)])
    assert stream.shape == (4 * n * batch,)
    for epoch in stream.reshape(-1, n):
        assert np.array_equal(np.sort(epoch), np.arange(n))


def test_a_batch_straddles_two_epochs():
    whole = data.Sampler(10, 10, 3)
    batch = data.Sampler(10, 4, 3).indices(2)
    assert np.array_equal(batch, np.concatenate([whole.indices(0)[8:], whole.indices(1)[:2]]))


def test_indices_depend_on_seed_and_epoch_only():
    order = lambda seed, step: data.Sampler(50, 50, seed).indices(step).tolist()
    assert order(0, 0) == order(0, 0)
    assert len({tuple(order(seed, step)) for seed in (0, 1) for step in (0, 1, 2)}) == 6
    # Any step can be asked for first: nothing is remembered but pure values.
    sampler = data.Sampler(50, 8, 0)
    late = sampler.indices(1000)
    assert np.array_equal(late, [sampler.indices(step) for step in range(1001)][-1])


def test_permutations_stay_the_same_across_versions():
    assert data.Sampler(8, 8, 0).indices(0).tolist() == [2, 4, 3, 6, 5, 0, 1, 7]


def test_without_shuffling_the_order_is_kept():
    sampler = data.Sampler(5, 3, 0, shuffle=False)
    assert np.concatenate([sampler.indices(step) for step in range(3)]).tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 3]


@pytest.mark.parametrize("arguments", [(0, 4, 0), (4, 0, 0), (4, 4, -1)])
def test_impossible_samplers(arguments):
    with pytest.raises(ValueError, match="at least"):
        data.Sampler(*arguments)


@pytest.mark.parametrize("devices", [1, 2, 4, 8])
def test_the_global_batch_does_not_depend_on_the_devices(devices):
    source = _source(21)
    sampler = data.Sampler(len(source), 16, 5)
    loader, alone = data.Loader(source, sampler, data.data_mesh(devices)), data.Loader(source, sampler)
    for step in (0, 1, 6):
        batch = loader(step)
        expected = source.gather(sampler.indices(step))
        assert batch.keys() == expected.keys() == {"x", "labels", "index"}
        for name, value in batch.items():
            assert value.sharding.spec == PartitionSpec("data")
            assert len(value.addressable_shards) == devices
            assert value.addressable_shards[0].data.shape[0] == 16 // devices
            assert value.dtype == expected[name].dtype
            assert np.array_equal(value, expected[name])
            assert np.array_equal(alone(step)[name], expected[name])


def test_a_jitted_reduction_agrees_on_all_meshes():
    source = _source(32)
    sampler = data.Sampler(32, 16, 0)
    mean = jax.jit(lambda x: data.to_float(x).mean())
    values = [float(mean(data.Loader(source, sampler, data.data_mesh(n))(0)["x"])) for n in (1, 8)]
    assert values[0] == pytest.approx(values[1], rel=1e-6)


@pytest.mark.parametrize("devices", [None, 1, 4])
@pytest.mark.parametrize(("n", "size"), [(16, 8), (17, 8), (3, 8), (8, 8), (15, 4)])
def test_evaluation_covers_every_example_once(n, size, devices):
    source, mesh = _source(n), None if devices is None else data.data_mesh(devices)
    batches = list(data.evaluation_batches(source, size, mesh))
    assert len(batches) == -(-n // size)
    assert all(batch["x"].shape == (size, 2, 3, 1) and batch["mask"].shape == (size,) for batch in batches)
    masks = [np.asarray(batch["mask"]) for batch in batches]
    for name, expected in (("x", source.images), ("labels", source.labels), ("index", source.index)):
        kept = [np.asarray(batch[name])[mask] for batch, mask in zip(batches, masks, strict=True)]
        assert np.array_equal(np.concatenate(kept), expected)
        padding = np.asarray(batches[-1][name])[~masks[-1]]
        assert np.array_equal(padding, np.repeat(expected[:1], len(padding), axis=0))


def test_impossible_meshes_name_the_cure():
    with pytest.raises(ValueError, match="16 devices asked for, 8 exist"):
        data.data_mesh(16)
    with pytest.raises(ValueError, match="Use 1 to 8"):
        data.data_mesh(0)
    source, mesh = _source(20), data.data_mesh(8)
    with pytest.raises(ValueError, match=r"batch of 12 does not divide over 8 .* such as 16, or data_mesh\(4\)"):
        data.Loader(source, data.Sampler(20, 12, 0), mesh)
    with pytest.raises(ValueError, match="does not divide"):
        data.evaluation_batches(source, 12, mesh)
    other = jax.make_mesh((8,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
    with pytest.raises(ValueError, match=r"use data_mesh\(\)"):
        data.Loader(source, data.Sampler(20, 16, 0), other)


def test_a_sampler_for_another_source_is_refused():
    with pytest.raises(ValueError, match="num_examples=len"):
        data.Loader(_source(20), data.Sampler(19, 4, 0))
    with pytest.raises(ValueError, match="at least 1"):
        data.evaluation_batches(_source(20), 0)
