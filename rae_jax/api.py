"""The library: an RAE and a DiT as values, and what they do to images as pure functions of them.

`rae` and `dit` are pytrees, their parameters the leaves: they go through jit, grad, vmap and shardings like any other
argument. Nothing here reads flags or keeps state.
"""

import dataclasses
import functools
import importlib.util
import os
import sys
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.typing import ArrayLike
from ml_collections import ConfigDict, FrozenConfigDict

from rae_jax.build import models, saved_config, stages
from rae_jax.config import checks
from rae_jax.config import keys as config_keys
from rae_jax.errors import UserError
from rae_jax.inference import generate
from rae_jax.models.autoencoder import to_float
from rae_jax.runtime import sharding
from rae_jax.weights import hub

Source = str | os.PathLike | ConfigDict


@functools.partial(jax.tree_util.register_dataclass, data_fields=["params"], meta_fields=["config"])
@dataclasses.dataclass(frozen=True)
class RAE:
    """An autoencoder: parameters of 'encoder' and 'decoder', and the config that describes them."""

    params: dict
    config: FrozenConfigDict


@functools.partial(jax.tree_util.register_dataclass, data_fields=["params", "guide"], meta_fields=["config"])
@dataclasses.dataclass(frozen=True)
class DiT:
    """A diffusion transformer: parameters of 'dit', 'statistics' of its latents (None: none), and their config.

    `guide` holds the parameters of AutoGuidance's weaker model, where the config asks for it; else None.
    """

    params: dict
    guide: dict | None
    config: FrozenConfigDict


def load_rae(source: Source = "small", *, dtype: str | None = None, mesh: jax.sharding.Mesh | None = None) -> RAE:
    """The autoencoder of `source`.

    That is 'small' (the weights that ship with the package), a run's workdir (local or gs://), a folder that
    rae_jax.convert wrote or diffusers saved (AutoencoderRAE, AutoencoderKL), a hub id of such a folder, a config file
    (configs/dit_xl.py), or a config. `dtype` ('float32', 'bfloat16') is that of matrix products, by default config's.
    Parameters go to the first local device, or over `mesh`. Raises UserError, whose one line names the mend.
    """
    config, workdir = _open(source, ("encoder", "decoder"), dtype)
    parts = _load(config, workdir, ("encoder", "decoder"), mesh)
    return RAE(parts, FrozenConfigDict(config))


def load_dit(source: Source = "small", *, dtype: str | None = None, mesh: jax.sharding.Mesh | None = None) -> DiT:
    """The diffusion transformer of `source`, as `load_rae` takes it, with the statistics of its latents."""
    config, workdir = _open(source, ("statistics", "dit"), dtype)
    parts = _load(config, workdir, ("statistics", "dit"), mesh)
    weaker = config.guidance.method == "autoguidance"
    guide = stages.load_guide(config, _mesh(mesh)) if weaker else None
    return DiT(parts, guide, FrozenConfigDict(config))


def encode(rae: RAE, images: ArrayLike) -> jax.Array:
    """Latents [B, h, w, D] of images [B, H, W, 3], floats in [0, 1] or uint8."""
    images = jnp.asarray(images)
    if images.ndim != 4 or images.shape[-1] != 3:
        raise UserError(f"images of shape {images.shape} cannot be encoded: they must be [B, H, W, 3]")
    size, multiple = images.shape[1:3], rae.config.encoder.patch_size
    if not rae.config.encoder.input_size and any(side % multiple for side in size):
        raise UserError(
            f"images of {size[0]}x{size[1]} px cannot be encoded: the encoder takes multiples of {multiple}"
        )
    return _encode(rae, images)


def decode(rae: RAE, latents: ArrayLike) -> jax.Array:
    """Images [B, H, W, 3] in [0, 1] of latents [B, h, w, D]."""
    latents = jnp.asarray(latents)
    width = rae.config.encoder.width
    if latents.ndim != 4 or latents.shape[-1] != width:
        raise UserError(f"latents of shape {latents.shape} cannot be decoded: they must be [B, h, w, {width}]")
    return _decode(rae, latents)


def sample(
    rae: RAE,
    dit: DiT,
    labels: ArrayLike | Sequence[int],
    *,
    seed: ArrayLike = 0,
    num_steps: int | None = None,
    guidance_scale: ArrayLike | None = None,
    guide: DiT | None = None,
) -> jax.Array:
    """Images [B, H, W, 3] in [0, 1] for labels [B]; the same as --mode=sample draws with that config.seed.

    `num_steps` (of a fixed grid) and `guidance_scale` are the config's unless given. With `guide`, a weaker DiT, the
    scale is that of AutoGuidance; without, of what the config names, classifier-free guidance where that is none.
    `seed` and `guidance_scale` may be traced, and another value does not compile anew; `num_steps` may not, and does.
    Raises UserError for labels that are not there, too few steps, and a DiT or a guide of other latents.
    """
    labels, classes = jnp.asarray(labels), dit.config.data.num_classes
    if labels.ndim != 1 or not jnp.issubdtype(labels.dtype, jnp.integer):
        raise UserError(f"labels of shape {labels.shape} and type {labels.dtype} cannot work: they must be whole, [B]")
    if not isinstance(labels, jax.core.Tracer) and bool(((labels < 0) | (labels >= classes)).any()):
        raise UserError(f"labels={np.asarray(labels).tolist()} cannot work: they are 0 to {classes - 1}")
    theirs, ours = (config_keys.latent_shape(model.config) for model in (rae, dit))
    if theirs != ours:
        raise UserError(f"the RAE's latents are {theirs}, the DiT was made for {ours}: load both from one source")
    least = 2 if dit.config.sampler.grid == "published" else 1  # there, they are points
    if num_steps is not None and num_steps < least:
        raise UserError(f"num_steps={num_steps} cannot work: it must be at least {least}")
    if guide is not None:
        _check_guide(dit, guide)
    return _sample(rae, dit, guide, labels, seed, guidance_scale, num_steps=num_steps)


def _check_guide(dit, guide):
    """Raise UserError where the two cannot be told the same."""
    ours, theirs = (
        {
            "latents": config_keys.latent_shape(model.config),
            "config.data.num_classes": model.config.data.num_classes,
            **{f"config.dit.{key}": model.config.dit[key] for key in ("path", "prediction")},
        }
        for model in (dit, guide)
    )
    for key, value in ours.items():
        if theirs[key] != value:
            raise UserError(f"the guide has {key}={theirs[key]!r}, the DiT {value!r}: take one that was trained alike")


@jax.jit
def _encode(rae, images):
    images = to_float(images) if images.dtype == jnp.uint8 else images
    return models.autoencoder(rae.config).encode(rae.params["encoder"], images)


@jax.jit
def _decode(rae, latents):
    return jnp.clip(models.autoencoder(rae.config).decode(rae.params["decoder"], latents), 0.0, 1.0)


@functools.partial(jax.jit, static_argnames="num_steps")
def _sample(rae, dit, guide, labels, seed, scale, *, num_steps):
    config = ConfigDict(dit.config.to_dict())
    if num_steps is not None:
        config.sampler.num_steps = num_steps
    parts = {**dit.params, "guide": dit.guide}
    if guide is not None:
        config.guidance.method = "autoguidance"
        config.guidance.dit.update({key: guide.config.dit[key] for key in config.guidance.dit})
        parts["guide"] = guide.params["dit"]
    elif scale is not None and config.guidance.method == "none":
        config.guidance.method = "cfg"
    indices = jnp.arange(len(labels), dtype=jnp.uint32)
    latents = generate.draw(config, parts, jax.random.key(seed), indices, labels, scale=scale)
    return _decode(rae, latents)


def _open(source, parts, dtype):
    """(config, workdir or '') of a source."""
    if isinstance(source, ConfigDict):
        config, workdir = ConfigDict(source.to_dict()), ""
    elif str(source).endswith(".py"):
        config, workdir = _config_file(source), ""
    elif source == "small":
        config, workdir = saved_config.read(stages.SHIPPED), ""
    else:
        folder = epath.Path(source) if epath.Path(source).is_dir() else hub.fetch_folder(str(source), _files(parts))
        config, workdir = saved_config.read(folder), folder
    if dtype is not None:
        config.dtype = dtype
    if workdir and not (epath.Path(workdir) / "checkpoints").exists():
        _take_weights_from(config, parts, workdir)
        workdir = ""
    if not workdir:
        config.stages = ()
    # What a run was watched and measured by, and ran on, is of no matter here.
    config.wandb, config.evaluate.reference, config.checkpoint.best = "", "", ""
    if {"cudnn": "gpu", "flash": "tpu"}.get(config.attention) != jax.default_backend():
        config.attention = "xla"
    checks.check(config, _mesh(None))
    return config, workdir


def _files(parts):
    return saved_config.FILE, hub.DIFFUSERS, *(f"{part}.safetensors" for part in parts)


def _take_weights_from(config, parts, folder):
    """Let the config name what is in a converted folder, whole autoencoders of diffusers included."""
    whole = (epath.Path(folder) / hub.DIFFUSERS).exists()
    for part in parts:
        if whole or (epath.Path(folder) / f"{part}.safetensors").exists():
            config[part].weights = str(folder)


def _config_file(path):
    """What get_config() of a config file returns. Configs import each other as `configs`, from beside them."""
    spec = importlib.util.spec_from_file_location("config_of_the_library", path)
    beside = str(epath.Path(path).resolve().parent.parent)
    module = importlib.util.module_from_spec(spec)
    sys.path.append(beside)
    try:
        spec.loader.exec_module(module)
    except FileNotFoundError as error:
        raise UserError(f"cannot load the config {path}: name a file such as configs/small.py") from error
    finally:
        sys.path.remove(beside)
    return ConfigDict(module.get_config().to_dict())


def _load(config, workdir, parts, mesh):
    return {part: stages.load(config, part, workdir, _mesh(mesh)) for part in parts}


def _mesh(mesh):
    one = {"data": 1, "fsdp": 1, "tensor": 1}
    return mesh or sharding.make_mesh(one, jax.local_devices()[:1])
