"""Meshes and rules: which device holds what, and what is refused."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import tiny, uncached
from jax.sharding import PartitionSpec as P

from configs import dit_xl
from rae_jax.build import part_weights
from rae_jax.config import checks
from rae_jax.errors import UserError
from rae_jax.models import mesh_matmul
from rae_jax.runtime import sharding


def _mesh(data, fsdp, tensor, devices=None):
    return sharding.make_mesh({"data": data, "fsdp": fsdp, "tensor": tensor}, devices)


def _slices(platform, count, each):
    """Stand-ins for the devices of several slices, in an order that mixes them."""
    return [types.SimpleNamespace(slice_index=i % count, platform=platform) for i in range(count * each)]


def _specs(config, mesh, stage="dit"):
    shapes = part_weights.shapes(config, stage)
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
    with pytest.raises(
        UserError, match="config.mesh.data=1, .* only data crosses slices, so set config.mesh.data to a multiple of 2"
    ):
        _mesh(1, 8, 1, _slices("tpu", 2, 4))


def test_every_large_kernel_of_the_full_size_model_is_split():
    config = dit_xl.get_config()
    for sizes in ({"data": 4, "fsdp": 64, "tensor": 1}, {"data": 2, "fsdp": 128, "tensor": 1}):
        mesh = types.SimpleNamespace(shape=sizes)
        shapes = jax.tree.leaves_with_path(part_weights.shapes(config, "dit"))
        for path, leaf in shapes:
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            split = "fsdp" in str(sharding.spec(name, leaf.shape, mesh.shape))
            assert split or leaf.size < 2**19, (name, leaf.shape)
    with pytest.raises(
        UserError, match=r"config.mesh.fsdp=256 divides no axis of .* set it to 128, and config.mesh.data"
    ):
        sharding.spec("blocks/attention/qkv/kernel", (28, 1152, 3456), {"data": 1, "fsdp": 256, "tensor": 1})


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


class _Device:
    """A stand-in for a device of process `process`, seen by process `here`."""

    platform, device_kind = "cpu", "cpu"

    def __init__(self, process, here):
        self.process_index = process
        self.client = types.SimpleNamespace(process_index=lambda: here)


@pytest.mark.parametrize("sizes", [(2, 2, 2), (1, 8, 1), (4, 1, 2)])
@pytest.mark.parametrize("owners", [(0, 0, 0, 0, 1, 1, 1, 1), (0, 0, 1, 1, 2, 2, 3, 3), (1, 0, 2, 0, 2, 1, 0, 1)])
def test_a_process_reads_the_rows_of_its_own_devices(sizes, owners):
    """Device (d, f, t) of the mesh has the part d * fsdp + f of the batch."""
    rows = np.arange(24).reshape(sizes[0] * sizes[1], 1, -1).repeat(sizes[2], 1).reshape(8, -1)
    seen = []
    for here in set(owners):
        mesh = _mesh(*sizes, [_Device(process, here) for process in owners])
        found = list(sharding.local_rows(24, mesh))
        assert found == np.unique(rows[[process == here for process in owners]]).tolist()
        seen += found
    assert set(seen) == set(range(24))


@pytest.mark.parametrize(
    "sizes, name, shape, parts, placed",
    [
        ((2, 4, 1), "linear/kernel", (6, 10), 1, (None, None)),
        ((2, 4, 1), "linear/kernel", (8, 10), 1, (-2, None)),
        ((2, 4, 1), "linear/kernel", (6, 12), 1, (-1, None)),
        ((8, 1, 1), "linear/kernel", (6, 10), 1, (None, None)),
        ((2, 2, 2), "mlp/fc1/kernel", (5, 6), 1, (None, "column")),
        ((2, 2, 2), "mlp/w12/kernel", (5, 16), 2, (-1, "column")),
        ((2, 2, 2), "attention/qkv/kernel", (5, 6), 3, (None, "column")),
        ((2, 2, 2), "attention/proj/kernel", (6, 5), 1, (None, "row")),
        ((2, 2, 2), "mlp/w3/kernel", (8, 5), 1, (-2, "row")),
    ],
)
def test_a_product_and_its_gradients_are_the_same_on_a_mesh(sizes, name, shape, parts, placed):
    """Gradients of x, and of a kernel that all axes of the mesh split, some axes, or none."""
    mesh, rng = _mesh(*sizes), np.random.default_rng(0)
    assert sharding.place(name, shape, mesh.shape) == placed
    x, dy = (rng.normal(size=(16, 3, features)).astype(np.float32) for features in shape)
    kernel = rng.normal(size=shape).astype(np.float32)

    def product(x, kernel):
        return jnp.concatenate(mesh_matmul.split_parts(*mesh_matmul.product(x, kernel, name, parts), parts), -1)

    def run(x, kernel, dy):
        y, pullback = jax.vjp(product, x, kernel)
        return y, *pullback(dy)

    leaf = jax.device_put({name: kernel}, sharding.shardings({name: kernel}, mesh))[name]
    with uncached():
        found = sharding.jit(run, mesh)(sharding.put_batch(x, mesh), leaf, sharding.put_batch(dy, mesh))
    wanted = x @ kernel, dy @ kernel.T, np.einsum("bnd,bnf->df", x, dy)
    for ours, theirs in zip(found, wanted, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)


def test_what_no_rule_knows_is_an_error():
    with pytest.raises(ValueError, match="no sharding rule matches trunk/novel"):
        sharding.shardings({"trunk": {"novel": jnp.zeros(3)}}, _mesh(8, 1, 1))


def test_a_batch_that_does_not_divide_is_refused():
    config = tiny()
    config.dit.train.batch_size = 12
    with pytest.raises(UserError, match="config.dit.train.batch_size=12 cannot be split over 8 devices"):
        checks.check(config, _mesh(2, 4, 1))
    config.stages = ("encoder", "judge", "decoder", "statistics")  # the DiT is not trained: its batch size is free
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


def test_a_mesh_that_does_not_fit_is_named(tiny_config):
    tiny_config.mesh.fsdp = 3
    with pytest.raises(UserError, match="config.mesh.fsdp=3.*8 devices"):
        sharding.make_mesh(tiny_config.mesh)
