"""Measure the host memory in which the state of a DiT stage is initialised, written and restored.

    python -m launch.bench.memory [--size=s] [--devices=8] [--folder=FOLDER]

Runs on simulated CPU devices, whose memory is host memory. Initialising and restoring each have a process of their own.
The state is the full recipe's in float32: parameters, two moments, one average. The limit of the project is 1.3 times
the shards of the process plus 2 GB; the exit status is 1 above it. The last line printed is one JSON object.
"""

import json
import os
import sys
import tempfile
from pathlib import Path

from configs import dit_b
from launch.bench import harness


def main():
    """Measure both processes, and compare the larger peak with the limit."""
    parser = harness.parser(__doc__)
    parser.add_argument("--size", choices=("s", "b", "l", "xl"), default="s", help="size of the DiT")
    parser.add_argument("--devices", type=int, default=8, help="number of simulated devices")
    parser.add_argument("--folder", help="holds the checkpoint; default: the temporary folder of the system")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        found = {}
        for phase in ("init", "restore"):
            found[phase] = harness.call_in_own_process(_measure, phase, args.size, args.devices, folder)
            print(phase, json.dumps(found[phase]), flush=True)
    shards = found["init"]["shard_bytes"]
    limit = 1.3 * shards + 2e9
    peak = max(of["peak_bytes"] for of in found.values())
    harness.print_json({"size": args.size, "devices": args.devices, "shard_bytes": shards, "limit": limit, **found})
    sys.exit(int(peak > limit))


def _measure(phase, size, devices, folder):
    """Initialise and write the state, or restore it; return {what: bytes}."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    os.environ.update({"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags})
    import jax

    from rae_jax.build import objectives
    from rae_jax.config.keys import in_steps
    from rae_jax.runtime import checkpoint, host, host_allocator, sharding

    host_allocator.keep_freed_memory()
    config = dit_b.get_config()
    config.dit.update(dit_b.DITS[size])
    config.mesh.update({"data": 1, "fsdp": len(jax.devices())})
    mesh = sharding.make_mesh(config.mesh)
    init, _ = objectives.init_and_step(in_steps(config, "dit", dit_b.IMAGENET), "dit")
    key = jax.random.key(0)
    shapes = jax.eval_shape(init, key)
    shardings = sharding.shardings(shapes, mesh)
    before = host.peak_memory()
    with checkpoint.Checkpoints(Path(folder) / "dit", keep=1) as checkpoints:
        if phase == "init":
            state = jax.block_until_ready(jax.jit(init, out_shardings=shardings)(key))
        else:
            abstract = jax.tree.map(lambda s, p: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=p), shapes, shardings)
            state = jax.block_until_ready(checkpoints.restore(1, abstract, harness.NoData()))
        peak = host.peak_memory()
        if phase == "init":
            checkpoints.save(1, state, harness.NoData())
    shards = sum(shard.data.nbytes for leaf in jax.tree.leaves(state) for shard in leaf.addressable_shards)
    at_end = host.peak_memory()
    return {"shard_bytes": shards, "before_bytes": before, "peak_bytes": peak, "peak_bytes_to_the_end": at_end}


if __name__ == "__main__":
    main()
