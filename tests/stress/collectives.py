"""Programs that gather kernels on simulated CPU devices may end in a rendezvous that fails: XLA alone does it.

    python -m tests.stress.collectives            # freshly compiled, a loop before the gathers
    python -m tests.stress.collectives --cached   # the second time, with JAX_COMPILATION_CACHE_DIR in the environment

Fault 1. XLA:CPU starts the next collective of a program when the operation before it has returned, which may be before
that operation has finished: a loop returns as soon as its body waits for the thread pool. A gather after the loop that
needs no result of the loop then runs at the same time as a gather inside the loop, and each device may start with
another one. All collectives of a shard_map have the same channel, so that XLA cannot tell the two gathers apart. The
program ends with `Check failed: id < num_threads`, with `Check failed: state.use_count() == num_threads`, or with a
time-out. Fault 2. A program that is loaded from the compilation cache has lost the order between a loop (or a branch)
and the collectives around it. Both were seen on jax 0.10.2 and 0.12.0.1. The executor is that of XLA:CPU alone.

Consequences: tests of steps on meshes unroll their blocks and compile without the cache (conftest.uncached), and the
command keeps no compiled programs of several CPU devices (main._keep_compiled). The program prints a line for each
correct step; the first step that fails aborts the process.
"""

import argparse
import os

STEPS = 30


def main(cached):
    """Run the program. `cached`: with many gathers in the loop instead of large products."""
    flags = ["--xla_force_host_platform_device_count=8", "--xla_cpu_collective_call_terminate_timeout_seconds=20"]
    if not cached:  # the loop first, then the gathers
        flags.append("--xla_cpu_enable_concurrency_optimized_scheduler=false")
    os.environ["XLA_FLAGS"] = " ".join(flags)
    os.environ.update({"JAX_PLATFORMS": "cpu", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"})
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.sharding import PartitionSpec as P

    mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 3)
    rows, width, depth, kernels_of_a_layer, others = (64, 64, 20, 24, 12) if cached else (2**14, 64, 20, 4, 12)

    def gather(kernel):
        return jax.lax.all_gather(kernel, "fsdp", axis=0, tiled=True)

    def side_by_side(x, kernels):
        return sum(jnp.tanh(x @ gather(kernel)) for kernel in kernels) / len(kernels), None

    def one_after_the_other(x, kernels):
        for kernel in kernels:
            x = jnp.tanh(x @ gather(kernel))
        return x, None

    def on_device(x, layers, more):
        y, _ = jax.lax.scan(side_by_side if cached else one_after_the_other, x, layers)
        return y, [gather(kernel) for kernel in more]  # none needs the loop

    batch, parts = P(("data", "fsdp")), [P("fsdp")] * others
    specs = {"in_specs": (batch, P(None, None, "fsdp"), parts), "out_specs": (batch, [P()] * others)}
    rng = np.random.default_rng(0)
    sizes = (rows, width), (depth, kernels_of_a_layer, width, width), (others, width, width)
    x, layers, more = (rng.normal(size=size).astype(np.float32) / 8 for size in sizes)
    step = jax.jit(jax.shard_map(on_device, mesh=mesh, check_vma=False, **specs))
    for number in range(STEPS):
        _, found = jax.device_get(step(x, layers, list(more)))
        np.testing.assert_array_equal(found, more)
        print(f"step {number} is right", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cached", action="store_true")
    main(parser.parse_args().cached)
