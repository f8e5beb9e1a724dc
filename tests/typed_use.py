"""Uses of the Python API that mypy checks and nothing runs: right ones, and wrong ones that it must refuse.

    python -m mypy

`warn_unused_ignores` makes a wrong use that mypy accepts an error.
"""

from pathlib import Path

import jax
import numpy as np

import rae_jax


def right(mesh: jax.sharding.Mesh) -> list[jax.Array]:
    """All functions, with the types that users give them."""
    rae: rae_jax.RAE = rae_jax.load_rae()
    dit: rae_jax.DiT = rae_jax.load_dit("dit_xl", dtype="bfloat16", mesh=mesh)
    weaker = rae_jax.load_dit(Path("runs") / "small")
    images = rae_jax.sample(rae, dit, [0, 1, 2], seed=3, num_steps=10, guidance_scale=1.5, guide=weaker)
    traced = jax.jit(lambda labels, seed: rae_jax.sample(rae, dit, labels, seed=seed))
    latents = rae_jax.encode(rae, np.zeros((1, 32, 32, 3), np.uint8))
    return [images, rae_jax.decode(rae, latents), traced(np.arange(3), 0), dit.params["dit"]["kernel"]]


def wrong(rae: rae_jax.RAE, dit: rae_jax.DiT) -> None:
    """Each line must be an error."""
    rae_jax.load_ra("small")  # type: ignore[attr-defined]
    rae_jax.load_rae(dtype=16)  # type: ignore[arg-type]
    rae_jax.sample(dit, rae, [0])  # type: ignore[arg-type]
    rae_jax.sample(rae, dit, [0], steps=10)  # type: ignore[call-arg]
    rae_jax.sample(rae, dit, [0], num_steps=0.5)  # type: ignore[arg-type]
    rae_jax.encode("rae", np.zeros((1, 32, 32, 3)))  # type: ignore[arg-type]
    rae_jax.decode(rae)  # type: ignore[call-arg]
    rae.params = {}  # type: ignore[misc]
    name: str = rae_jax.decode(rae, np.zeros((1, 8, 8, 64)))  # type: ignore[assignment]
    print(name)
