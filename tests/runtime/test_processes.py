"""Global batches on the devices of two real processes: those of one, in every row, whatever the mesh."""

import sys
from pathlib import Path

import jax
import numpy as np
import pairs
import pytest
from numbers_source import Numbers

from rae_jax.data import pipeline
from rae_jax.runtime import processes, sharding

# name: (sizes of data, fsdp and tensor; the devices in the mesh's order)
MESHES = {
    "data": ((8, 1, 1), range(8)),
    "fsdp": ((2, 4, 1), range(8)),
    "tensor_inside": ((2, 1, 4), range(8)),
    "tensor_across": ((1, 1, 8), range(8)),  # both processes hold, and read, every row
    "both_across": ((2, 1, 4), (0, 4, 1, 5, 2, 6, 3, 7)),
    "mixed": ((4, 2, 1), (0, 4, 1, 5, 7, 2, 6, 3)),
}


def global_batches(name):
    """{key: [steps, B, ...]} of a few training batches and of a pass, from batch 2 on, as the devices hold them."""
    sizes, order = MESHES[name]
    devices = [sorted(jax.devices(), key=lambda device: device.id)[i] for i in order]
    mesh = sharding.make_mesh(dict(zip(sharding.AXES, sizes, strict=True)), devices)
    gather = jax.jit(lambda batch: batch, out_shardings=sharding.replicated(mesh))
    options = {"batch_size": 16, "num_threads": 2, "rows": sharding.local_rows(16, mesh)}
    training = pipeline.training_batches(Numbers(40), seed=3, random_crop=True, flip=True, **options)
    found = {}
    for kind, batches, stop in (("training", training, 6), ("pass", pipeline.one_pass(Numbers(40), **options), 3)):
        iterator = iter(batches)
        iterator.set_state({**iterator.get_state(), "position": 2})
        placed = [gather(sharding.put_batch(next(iterator), mesh)) for _ in range(2, stop)]
        found.update({f"{kind}_{key}": np.stack([np.asarray(b[key]) for b in placed]) for key in placed[0]})
    return found


def _main(output):
    processes.start()
    assert len(jax.devices()) == 8 and len(jax.local_devices()) == 4
    for name in MESHES:
        np.savez(Path(output) / f"{name}_{jax.process_index()}.npz", **global_batches(name))


@pytest.mark.slow
def test_two_processes_hold_the_batches_of_one(tmp_path):
    pairs.run([__file__, tmp_path], devices=4)
    for name in MESHES:
        expected = global_batches(name)
        for index in (0, 1):
            found = np.load(tmp_path / f"{name}_{index}.npz")
            assert set(found) == set(expected)
            for key in expected:
                np.testing.assert_array_equal(found[key], expected[key], err_msg=f"{name} {key}")


if __name__ == "__main__":
    _main(sys.argv[1])
