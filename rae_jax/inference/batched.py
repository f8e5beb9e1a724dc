"""Apply a function to all images of a source, each exactly once, for any batch size, mesh and number of processes."""

import jax

from rae_jax.data import pipeline
from rae_jax.runtime import logs, sharding


def compiled(function, mesh):
    """Compile a pure `function(parts, batch)` -> tree of arrays [B, ...] for `outputs`; every process can read it."""

    def masked(parts, batch):
        return function(parts, batch), batch["mask"]

    return sharding.jit(masked, mesh, out_shardings=sharding.replicated(mesh))


def outputs(function, parts, batches):
    """Yield the outputs of a `compiled` function for batches on the devices, as numpy arrays [N, ...], 1 <= N <= B."""
    for batch in batches:
        out, mask = jax.device_get(function(parts, batch))
        if mask.any():  # a batch may hold no readable image
            yield jax.tree.map(lambda values, rows=mask > 0: values[rows], out)


def batches(source, mesh, *, batch_size, num_threads, name, on_error="stop"):
    """Yield a source's examples in order, in batches on the devices; 'mask' is 0 for rows that fill up the last batch.

    All batches have one size, as small as the number of batches allows. `on_error`: see pipeline.one_pass.
    """
    size = sharding.even_batch(len(source), batch_size, mesh)
    with logs.Progress(name, total=len(source), unit="image") as progress:
        reading = {"num_threads": num_threads, "on_error": on_error, "rows": sharding.local_rows(size, mesh)}
        for n, batch in enumerate(pipeline.one_pass(source, batch_size=size, **reading), 1):
            yield sharding.put_batch(batch, mesh)
            progress.update(min(n * size, len(source)))
