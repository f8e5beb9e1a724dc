"""Meshes and rules: which device holds what, and what is refused."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import tiny
from jax.sharding import PartitionSpec as P

from configs import dit_xl
from rae_jax import checks, sharding, stages
from rae_jax.errors import UserError


def _mesh(data, fsdp, tensor, devices=None):
    return sharding.make_mesh({"data": data, "fsdp": fsdp, "tensor": tensor}, devices)


def _slices(platform, count, each):
    """Stand-ins for the devices of several slices, in an order that mixes them."""
    return [types.SimpleNamespace(slice_index=i % count, platform=platform) for i in range(count * each)]


def _specs(config, mesh, stage="dit"):
    shapes = stages.part_shapes(config, stage)
    leaves = jax.tree.leaves_with_path(sharding.shardings(shapes, mesh))
    return {jax.tree_util.keystr(path, simple=True, separator="/"): placed.spec for path, placed in leaves}


def test_open_axes_take_the_devices_that_are_left():
    assert _mesh(-1, 2, 1).shape == {"data": 4, "fsdp": 2, "tensor": 1}
    assert _mesh(2, -1, 2).shape == {"data": 2, "fsdp": 2, "tensor": 2}
    assert _mesh(-1, -1, 2).shape == {"data": 1, "fsdp": 4, "tensor": 2}
    assert sharding._sizes({"data": -1, "fsdp": -1, "tensor": 1}, 1024, 4) == [64, 16, 1]
    assert sharding._sizes({"data": -1, "fsdp": -1, "tensor": 1}, 96, 2) == [6, 16, 1]


@pytest.mark.parametrize("sizes", [(3, 1, 1), (0, -1, 1), (16, -1, 1), (2, 2, 1), (-1, -1, 3)])
def test_sizes_that_do_not_multiply_are_refused(sizes):
    with pytest.raises(UserError, match=r"config.mesh.data=.* do not multiply to the 8 devices here"):
        _mesh(*sizes)


def test_only_data_crosses_slices():
    devices = sharding._arranged([4, 2, 1], 2, _slices("cpu", 2, 4))
    assert [[device.slice_index for device in row.flat] for row in devices] == [[0, 0], [0, 0], [1, 1], [1, 1]]
    with pytest.raises(UserError, match="only data crosses slices, and 1 is no multiple of the 2 slices here"):
        _mesh(1, 8, 1, _slices("tpu", 2, 4))


def test_every_large_kernel_of_the_full_size_model_is_split():
    config = dit_xl.get_config()
    for sizes in ({"data": 4, "fsdp": 64, "tensor": 1}, {"data": 2, "fsdp": 128, "tensor": 1}):
        mesh = types.SimpleNamespace(shape=sizes)
        shapes = jax.tree.leaves_with_path(stages.part_shapes(config, "dit"))
        for path, leaf in shapes:
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            split = "fsdp" in str(sharding._spec(name, leaf.shape, mesh.shape))
            assert split or leaf.size < 2**19, (name, leaf.shape)
    with pytest.raises(UserError, match=r"config.mesh.fsdp=256 divides no axis of .* take 128, and config.mesh.data"):
        sharding._spec("blocks/attention/qkv/kernel", (28, 1152, 3456), {"data": 1, "fsdp": 256, "tensor": 1})


def test_pairs_of_products_are_split_as_in_megatron():
    config = tiny()
    config.dit.update({"width": 32, "num_heads": 2})
    found = _specs(config, _mesh(2, 2, 2))
    assert found["trunk/attention/proj/kernel"] == P(None, ("tensor", "fsdp"), None)
    assert found["trunk/attention/qkv/kernel"] == P(None, ("fsdp", "tensor"), None)  # each part's columns, in use
    assert found["trunk/norm1/scale"] == found["trunk/mlp/w12/bias"] == P()
    assert found["label_embed/table"] == P(None, "fsdp")
    assert sharding.place("mlp/fc1/kernel", (16, 64), {"fsdp": 2, "tensor": 2}) == (-2, "column")
    assert sharding.place("mlp/w12/kernel", (16, 10), {"fsdp": 2, "tensor": 2}) == (-2, None)  # parts of five


def test_what_no_rule_knows_is_an_error():
    with pytest.raises(ValueError, match="no sharding rule matches trunk/novel"):
        sharding.shardings({"trunk": {"novel": jnp.zeros(3)}}, _mesh(8, 1, 1))


def test_a_batch_that_does_not_divide_is_refused():
    config = tiny()
    config.dit.train.batch_size = 12
    with pytest.raises(UserError, match="config.dit.train.batch_size=12 cannot be split over 8 devices"):
        checks.check(config, _mesh(2, 4, 1))
    config.stages = ("encoder", "judge", "decoder", "statistics")  # whoever does not train it, may leave it as it is
    checks.check(config, _mesh(2, 4, 1))


@pytest.mark.parametrize("rows, part", [(24, 24), (48, 24), (40, 8)])
def test_parts_of_a_batch_are_the_whole(rows, part):
    """Each of at most three rows a device, or a divisor of its rows; the order stays."""
    seen, mesh = [], _mesh(2, 4, 1)
    x = jnp.arange(rows * 2.0).reshape(rows, 2)

    def function(x):
        seen.append(x.shape[0])
        return {"twice": 2.0 * x, "sum": x.sum(1)}

    found = sharding.jit(lambda x: sharding.in_parts(function, x, 3), mesh)(sharding.put_batch(x, mesh))
    assert set(seen) == {part}
    np.testing.assert_array_equal(found["twice"], 2.0 * x)
    np.testing.assert_array_equal(found["sum"], x.sum(1))
