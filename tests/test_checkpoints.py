"""Checkpoints: bitwise round trips, retention, and errors that name the culprit."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rdx.checkpoints import Checkpoints, load_tree, save_tree


class _State(NamedTuple):
    step: jax.Array
    params: dict
    key: jax.Array


def _state(seed):
    key = jax.random.key(seed)
    return _State(jnp.int32(seed), {"w": jax.random.normal(key, (3, 4)), "b": jnp.zeros(4)}, key)


def _assert_equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        is_key = jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
        x, y = (jax.random.key_data(v) if is_key else v for v in (x, y))
        np.testing.assert_array_equal(x, y)


def test_round_trip_with_typed_keys_and_retention(tmp_path):
    with Checkpoints(tmp_path, save_every=2, keep=2) as saves:
        assert saves.restore_latest(_state(0)) is None
        for step in range(1, 8):
            saves.save(step, _state(step))
        saves.save(7, _state(7), force=True)
        saves.save(7, _state(0), force=True)
    assert {path.name for path in tmp_path.iterdir()} == {"6", "7"}
    with Checkpoints(tmp_path, save_every=2) as saves:
        assert saves.latest_step == 7
        step, state = saves.restore_latest(jax.eval_shape(lambda: _state(0)))
    assert step == 7
    _assert_equal(state, _state(7))


def test_a_saved_state_may_be_donated_at_once(tmp_path):
    state = {"w": jnp.ones((256, 256))}
    overwrite = jax.jit(lambda s: jax.tree.map(lambda w: w - 1.0, s), donate_argnums=0)
    with Checkpoints(tmp_path, save_every=1) as saves:
        saves.save(1, state)
        overwrite(state)["w"].block_until_ready()
        saves.wait()
        np.testing.assert_array_equal(saves.restore_latest({"w": jnp.zeros((256, 256))})[1]["w"], 1.0)


def test_restores_onto_the_shardings_of_the_template(tmp_path):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    with Checkpoints(tmp_path, save_every=1) as saves:
        saves.save(1, _state(1))
        _, state = saves.restore_latest(jax.device_put(_state(0), everywhere))
    assert state.params["w"].sharding == everywhere
    _assert_equal(state, _state(1))


def test_a_wrong_structure_is_refused(tmp_path):
    with Checkpoints(tmp_path, save_every=1) as saves:
        saves.save(1, {"w": jnp.zeros(3)})
        with pytest.raises(ValueError, match=r"(?i)mismatch|structure|keys"):
            saves.restore_latest({"v": jnp.zeros(3)})


def test_tree_round_trip_is_bitwise_and_reproducible(tmp_path):
    tree = {"params": {"w": _state(3).params["w"], "h": jnp.arange(3, dtype=jnp.bfloat16)}, "n": (jnp.int32(4),)}
    save_tree(tmp_path / "new" / "a.npz", tree)
    save_tree(tmp_path / "b.npz", tree)
    _assert_equal(load_tree(tmp_path / "b.npz", jax.eval_shape(lambda: tree)), tree)
    assert (tmp_path / "new" / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a.npz"]


def test_tree_of_another_structure_names_the_keys(tmp_path):
    save_tree(tmp_path / "a.npz", {"w": jnp.zeros(3), "old": jnp.zeros(1)})
    with pytest.raises(ValueError, match=r"missing \['new'\]; unexpected \['old'\]"):
        load_tree(tmp_path / "a.npz", {"w": jnp.zeros(3), "new": jnp.zeros(1)})
    with pytest.raises(ValueError, match=r"\['w'\] is \(\(3,\), 'float32'\), not \(\(4,\), 'float32'\)"):
        load_tree(tmp_path / "a.npz", {"w": jnp.zeros(4), "old": jnp.zeros(1)})
    with pytest.raises(ValueError, match="int32"):
        load_tree(tmp_path / "a.npz", {"w": jnp.zeros(3, jnp.int32), "old": jnp.zeros(1)})


def test_a_failed_write_leaves_the_old_file(tmp_path, key):
    save_tree(tmp_path / "a.npz", {"w": jnp.ones(3)})
    with pytest.raises((TypeError, ValueError)):
        save_tree(tmp_path / "a.npz", {"w": np.array([object()])})
    assert [path.name for path in tmp_path.iterdir()] == ["a.npz"]
    np.testing.assert_array_equal(load_tree(tmp_path / "a.npz", {"w": jnp.zeros(3)})["w"], 1.0)
