"""Passes over images: every one exactly once, whatever the batch size, the devices and the processes."""

import jax

from rae_jax.data import pipeline
from rae_jax.runtime import logs, sharding


def compiled(function, mesh):
    """Pure `function(parts, batch)` -> tree of arrays [B, ...], compiled for `look`: every process can read them."""

    def masked(parts, batch):
        return function(parts, batch), batch["mask"]

    return sharding.jit(masked, mesh, out_shardings=sharding.replicated(mesh))


def look(view, parts, batches):
    """Yield what a `compiled` view makes of batches on the devices, as numpy arrays [<= B, ...], B at least 1."""
    for batch in batches:
        out, mask = jax.device_get(view(parts, batch))
        if mask.any():  # nothing of a batch may be readable
            yield jax.tree.map(lambda values, there=mask > 0: values[there], out)


def batches(source, mesh, *, batch_size, num_threads, name, on_error="stop"):
    """Yield a source's examples in order, in batches on the devices; 'mask' is 0 where the last one was filled up.

    Batches are of one size, as small as their number allows; `on_error` as in pipeline.one_pass.
    """
    size = sharding.even_batch(len(source), batch_size, mesh)
    with logs.Progress(name, total=len(source), unit="image") as progress:
        reading = {"num_threads": num_threads, "on_error": on_error, "rows": sharding.local_rows(size, mesh)}
        passed = pipeline.one_pass(source, batch_size=size, **reading)
        for n, batch in enumerate(passed, 1):
            yield sharding.put_batch(batch, mesh)
            progress.update(min(n * size, len(source)))
