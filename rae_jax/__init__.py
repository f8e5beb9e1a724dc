"""Representation Autoencoders (RAE) and the diffusion transformers that live in their latent space.

    rae, dit = rae_jax.load_rae("small"), rae_jax.load_dit("small")
    images = rae_jax.sample(rae, dit, [0, 1, 2])

The functions are in rae_jax.api, which is imported when one of its names is used for the first time.
"""

from typing import TYPE_CHECKING

__all__ = ["RAE", "DiT", "UserError", "decode", "encode", "load_dit", "load_rae", "sample"]

if TYPE_CHECKING:
    from rae_jax.api import RAE, DiT, decode, encode, load_dit, load_rae, sample
    from rae_jax.errors import UserError
else:  # hidden from type checkers, which would accept every name

    def __getattr__(name):
        if name not in __all__:
            raise AttributeError(f"module 'rae_jax' has no attribute {name!r}")
        from rae_jax import api, errors

        return getattr(errors if name == "UserError" else api, name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
