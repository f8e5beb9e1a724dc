"""Host memory while a DiT stage's state is made, written and restored, against the bytes of this process's shards.

    python launch/bench_memory.py [--size=s] [--devices=8] [--folder=/tmp]

On simulated CPU devices, whose memory is the host's as well; a process for each of the two. The state is that of the
full recipe, float32: parameters, two moments, one average. The limit that the project keeps is 1.3 times the shards
and 2 GB. The last line printed is one JSON object; exit status 1 where the limit was passed.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

if __name__ == "__main__":  # started by its path: configs/ is used from the checkout
    sys.path.insert(0, str(Path(__file__).parents[2]))


def main():
    """Make and write in one process, restore in another; compare their peaks with the limit."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=("s", "b", "l", "xl"), default="s")
    parser.add_argument("--devices", type=int, default=8)
    parser.add_argument("--folder", help="where there is room for the checkpoint; by default the temporary folder")
    parser.add_argument("--what", choices=("init", "restore"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.what:
        print(json.dumps(_measure(args)))
        return
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={args.devices}"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        found = {}
        for what in ("init", "restore"):
            command = [sys.executable, __file__, f"--what={what}", f"--folder={folder}", f"--size={args.size}"]
            done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
            found[what] = json.loads(done.stdout.splitlines()[-1])
            print(what, json.dumps(found[what]), flush=True)
    shards = found["init"]["shard_bytes"]
    limit = 1.3 * shards + 2e9
    peak = max(f["peak_bytes"] for f in found.values())
    print(json.dumps({"size": args.size, "devices": args.devices, "shard_bytes": shards, "limit": limit, **found}))
    sys.exit(int(peak > limit))


def _measure(args):
    import jax

    from configs import dit_b
    from rae_jax.build import models
    from rae_jax.config.keys import in_steps
    from rae_jax.runtime import checkpoint, host_allocator, sharding

    host_allocator.keep_freed_memory()
    config = dit_b.get_config()
    config.dit.update(dit_b.DITS[args.size])
    config.mesh.update({"data": 1, "fsdp": len(jax.devices())})
    mesh = sharding.make_mesh(config.mesh)
    init, _ = models.init_and_step(in_steps(config, "dit", dit_b.IMAGENET), "dit")
    key = jax.random.key(0)
    shapes = jax.eval_shape(init, key)
    placed = sharding.shardings(shapes, mesh)
    before = _peak()
    with checkpoint.Checkpoints(Path(args.folder) / "dit", keep=1) as checkpoints:
        if args.what == "init":
            state = jax.block_until_ready(jax.jit(init, out_shardings=placed)(key))
        else:
            abstract = jax.tree.map(lambda s, p: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=p), shapes, placed)
            state = jax.block_until_ready(checkpoints.restore(1, abstract, _Position()))
        made = _peak()
        if args.what == "init":
            checkpoints.save(1, state, _Position())
    shards = sum(shard.data.nbytes for leaf in jax.tree.leaves(state) for shard in leaf.addressable_shards)
    return {"shard_bytes": shards, "before_bytes": before, "peak_bytes": made, "peak_bytes_to_the_end": _peak()}


class _Position:
    """Stands for the data iterator."""

    def get_state(self):
        return {"position": 0}

    def set_state(self, position):
        pass


def _peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    main()
