"""The Python API: load an RAE and a DiT, and encode, decode and sample with them.

`RAE` and `DiT` are pytrees of parameters: jit, grad, vmap and shardings take them like any other argument.
The functions are pure. Nothing here reads flags or keeps state.
"""

import contextlib
import dataclasses
import functools
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.typing import ArrayLike
from ml_collections import ConfigDict, FrozenConfigDict

from rae_jax.build import models, part_weights, sampler, saved_config
from rae_jax.config import checks, machine, run_config
from rae_jax.config import files as config_files
from rae_jax.config import keys as config_keys
from rae_jax.errors import UserError
from rae_jax.inference import generate
from rae_jax.models.autoencoder import to_float
from rae_jax.runtime import sharding
from rae_jax.weights import hub

Source: TypeAlias = str | os.PathLike[str] | ConfigDict


def _described(model: Any) -> str:
    """Return one line for a notebook, instead of all parameters."""
    count = sum(getattr(leaf, "size", 0) for leaf in jax.tree.leaves(model))
    return f"{type(model).__name__}(config.name={model.config.name!r}, {count:,} parameters)"


@functools.partial(jax.tree_util.register_dataclass, data_fields=["params"], meta_fields=["config"])
@dataclasses.dataclass(frozen=True, repr=False)
class RAE:
    """An autoencoder: parameters of 'encoder' and 'decoder', and their config."""

    params: dict[str, Any]
    config: FrozenConfigDict
    __repr__ = _described


@functools.partial(jax.tree_util.register_dataclass, data_fields=["params", "guide"], meta_fields=["config"])
@dataclasses.dataclass(frozen=True, repr=False)
class DiT:
    """A diffusion transformer or few-step student: parameters, 'statistics' of its latents or None, and their config.

    `guide` holds the parameters of the weaker model if the config names AutoGuidance; otherwise None.
    """

    params: dict[str, Any]
    guide: dict[str, Any] | None
    config: FrozenConfigDict
    __repr__ = _described


def load_rae(source: Source = "small", *, dtype: str | None = None, mesh: jax.sharding.Mesh | None = None) -> RAE:
    """Load the autoencoder of `source`, which is one of
    - 'small': the weights that ship with the package;
    - a folder: the workdir of a run (local or gs://), or weights written by rae_jax.convert or by diffusers;
    - the hub id, OWNER/NAME, of a folder of weights;
    - the name of a config that ships with the package ('dit_xl'), a config file, or a config.

    `dtype` ('float32' or 'bfloat16') of matrix products is the config's by default. Parameters are put on the first
    local device, or sharded over `mesh`. Raises UserError; its message is one line that names the fix.
    """
    config, workdir = _open(source, ("encoder", "decoder"), dtype)
    parts = _load(config, workdir, ("encoder", "decoder"), mesh)
    return RAE(parts, FrozenConfigDict(config))


def load_dit(source: Source = "small", *, dtype: str | None = None, mesh: jax.sharding.Mesh | None = None) -> DiT:
    """Load the diffusion transformer, or few-step student, of `source` (see load_rae), with statistics of latents."""
    config, workdir = _open(source, ("statistics", *config_keys.GENERATORS), dtype)
    parts = _load(config, workdir, ("statistics", config_keys.generator(config)), mesh)
    weaker = "guide" in part_weights.parts_of_sampling(config)
    guide = _load(config, None, ("guide",), mesh)["guide"] if weaker else None
    return DiT(parts, guide, FrozenConfigDict(config))


def encode(rae: RAE, images: ArrayLike) -> jax.Array:
    """Return latents [B, h, w, D] of images [B, H, W, 3], floats in [0, 1] or uint8.

    Raises UserError for other types, for floats that cannot be in [0, 1], and for sizes that the encoder cannot take.
    """
    images = _floats(images, "images")
    if images.ndim != 4 or images.shape[-1] != 3:
        raise UserError(f"images of shape {images.shape} cannot be encoded: they must be [B, H, W, 3]")
    size, multiple = images.shape[1:3], rae.config.encoder.patch_size
    if not rae.config.encoder.input_size and any(side % multiple for side in size):
        raise UserError(
            f"images of {size[0]}x{size[1]} px cannot be encoded: the encoder takes multiples of {multiple}"
        )
    if not isinstance(images, jax.core.Tracer) and images.dtype != jnp.uint8 and images.size:
        low, high = float(images.min()), float(images.max())
        if low < -_OVERSHOOT or high > 1.0 + _OVERSHOOT or not bool(jnp.isfinite(images).all()):
            raise UserError(f"images from {low:.3g} to {high:.3g} cannot be encoded: scale them to [0, 1]")
    return _of_any_number(functools.partial(_encode, rae), images)


_OVERSHOOT = 0.25  # pixels of filtered images may lie a little outside of [0, 1]


def _floats(values: ArrayLike, name: str) -> jax.Array:
    """Return floats as float32 or smaller, and uint8 images as they are. Raises UserError for other types."""
    values = jnp.asarray(values)
    if jnp.issubdtype(values.dtype, jnp.floating):
        return values.astype(jnp.float32) if values.dtype.itemsize > 4 else values
    if name == "images" and values.dtype == jnp.uint8:
        return values
    kinds = "floats in [0, 1], or uint8" if name == "images" else "floats"
    raise UserError(f"{name} of type {values.dtype} are not accepted: give {kinds}")


def decode(rae: RAE, latents: ArrayLike) -> jax.Array:
    """Return images [B, H, W, 3] in [0, 1] of latents [B, h, w, D]."""
    latents = _floats(latents, "latents")
    width = rae.config.encoder.width
    if latents.ndim != 4 or latents.shape[-1] != width:
        raise UserError(f"latents of shape {latents.shape} cannot be decoded: they must be [B, h, w, {width}]")
    return _of_any_number(functools.partial(_decode, rae), latents)


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
    """Return images [B, H, W, 3] in [0, 1] for labels [B], the same as --mode=sample draws with config.seed=`seed`.

    `num_steps` (of a fixed grid) and `guidance_scale` are the config's by default. With `guide`, a weaker DiT, guidance
    is AutoGuidance. Otherwise it is the config's, or classifier-free if a scale is given and the config has none.
    `seed` and `guidance_scale` may be traced: a new value does not compile again. A new value of `num_steps` does.
    Raises UserError for labels or seeds out of range, too few steps, a DiT or a guide of other latents, a guide without
    a scale, and images that are not finite.
    """
    labels, key = _checked_labels(labels, dit.config.data.num_classes), _key(seed)
    theirs, ours = (config_keys.latent_shape(model.config) for model in (rae, dit))
    if theirs != ours:
        raise UserError(f"the RAE's latents are {theirs}, the DiT's are {ours}: load both from one source")
    least = config_keys.fewest_steps(dit.config)
    if num_steps is not None and num_steps < least:
        raise UserError(f"num_steps={num_steps} cannot work: it must be at least {least}")
    if config_keys.generator(dit.config) == "few_step" and (guidance_scale is not None or guide is not None):
        raise UserError("a few-step student is not guided: leave out guidance_scale and guide")
    if guide is not None:
        _check_guide(dit, guide)
        if guidance_scale is None and dit.config.guidance.scale == 1.0:
            raise UserError("guide has no effect at the config's scale of 1: give guidance_scale, such as 1.5")
    images = _of_any_number(
        lambda labels: _sample(rae, dit, guide, labels, key, guidance_scale, num_steps=num_steps), labels
    )
    if not isinstance(images, jax.core.Tracer) and not bool(jnp.isfinite(images).all()):
        raise UserError("the images are not finite: check the weights and the sampler's settings, or use float32")
    return images


def _checked_labels(labels: ArrayLike | Sequence[int], classes: int) -> jax.Array:
    """Return labels [B] as int32. Raises UserError for other shapes and types, and for labels out of range."""
    values = labels if isinstance(labels, jax.core.Tracer) else np.asarray(labels)
    if values.ndim != 1 or not jnp.issubdtype(values.dtype, jnp.integer):
        raise UserError(f"labels of shape {values.shape} and type {values.dtype} cannot work: give integers [B]")
    if not isinstance(values, jax.core.Tracer) and ((values < 0) | (values >= classes)).any():
        raise UserError(f"labels={values.tolist()} cannot work: choose from 0 to {classes - 1}")
    return jnp.asarray(values, jnp.int32)


def _key(seed: ArrayLike) -> jax.Array:
    """Return the key of a seed. Raises UserError for a seed that config.seed does not take either."""
    if isinstance(seed, jax.core.Tracer):
        return jax.random.key(seed)
    number = np.asarray(seed)
    if number.ndim or number.dtype.kind not in "iu" or not 0 <= number.item() < 2**64:
        raise UserError(f"seed={seed!r} cannot work: give an integer from 0 to 2**64 - 1")
    return generate.random_key(number.item())


def _check_guide(dit: DiT, guide: DiT) -> None:
    """Raise UserError if the guide's inputs or outputs differ from the DiT's."""
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
            raise UserError(f"the guide has {key}={theirs[key]!r}, the DiT {value!r}: load a guide that has the same")


def _of_any_number(function: Callable[[jax.Array], jax.Array], batch: jax.Array) -> jax.Array:
    """Return function(batch), also for a batch of no examples."""
    with _usual_promotion():
        if len(batch):
            return function(batch)
        one = jax.eval_shape(function, jax.ShapeDtypeStruct((1, *batch.shape[1:]), batch.dtype))
        return jnp.zeros((0, *one.shape[1:]), one.dtype)


@contextlib.contextmanager
def _usual_promotion() -> Iterator[None]:
    """Promote ranks and dtypes as JAX does by default, also if the caller's options forbid it."""
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield


@jax.jit
def _encode(rae: RAE, images: jax.Array) -> jax.Array:
    images = to_float(images) if images.dtype == jnp.uint8 else images
    return models.autoencoder(rae.config).encode(rae.params["encoder"], images)


@jax.jit
def _decode(rae: RAE, latents: jax.Array) -> jax.Array:
    return jnp.clip(models.autoencoder(rae.config).decode(rae.params["decoder"], latents), 0.0, 1.0)


@functools.partial(jax.jit, static_argnames="num_steps")
def _sample(
    rae: RAE,
    dit: DiT,
    guide: DiT | None,
    labels: jax.Array,
    key: jax.Array,
    scale: ArrayLike | None,
    *,
    num_steps: int | None,
) -> jax.Array:
    config = ConfigDict(dit.config.to_dict())
    if num_steps is not None:
        config.sampler.num_steps = num_steps
    parts = {**dit.params, "guide": dit.guide}
    if guide is not None:
        config.guidance.method = "autoguidance"
        config.guidance.dit.update({key: guide.config.dit[key] for key in config.guidance.dit})
        parts["guide"] = guide.params["dit"]
    elif scale is not None and not sampler.is_guided(config):
        config.guidance.method = "cfg"
    indices = jnp.arange(len(labels), dtype=jnp.uint32)
    latents = generate.draw(config, parts, key, indices, labels, scale=scale)
    return _decode(rae, latents)


def _open(source: Source, parts: Sequence[str], dtype: str | None) -> tuple[ConfigDict, epath.Path | str | None]:
    """Return (config, workdir or None) of a source."""
    sharding.all_devices()
    config, workdir = _find(source, parts)
    if dtype is not None:
        config.dtype = dtype
    if workdir and not (epath.Path(workdir) / "checkpoints").exists():
        _take_weights_from(config, parts, workdir)
        workdir = None
    if not workdir:
        config.stages = ()
    config.attention = machine.portable(config)
    checks.check(config, _mesh(None), trains=False, evaluates=False)
    return config, workdir


def _find(source: Source, parts: Sequence[str]) -> tuple[ConfigDict, epath.Path | str | None]:
    """Return (config, folder or None) of a source."""
    if isinstance(source, ConfigDict):
        return ConfigDict(source.to_dict()), None
    name = str(source)
    if name == "small":
        return saved_config.read(run_config.SHIPPED), None
    if (folder := epath.Path(os.path.expanduser(source))).is_dir():
        return saved_config.read(folder), folder
    if name.endswith(".py") or name in config_files.names():
        return ConfigDict(config_files.load(name).to_dict()), None
    if "/" not in name:
        raise UserError(
            f"source={name!r} is neither a folder here nor a hub id (OWNER/NAME) nor a config: "
            f"{config_files.nearest(name)}"
        )
    folder = hub.fetch_folder(name, _files(parts))
    return saved_config.read(folder), folder


def _files(parts: Sequence[str]) -> tuple[str, ...]:
    return run_config.FILE, hub.DIFFUSERS, *(f"{part}.safetensors" for part in parts)


def _take_weights_from(config: ConfigDict, parts: Sequence[str], folder: epath.Path | str) -> None:
    """Set the config's weights to the folder for each part that it holds; diffusers' folders hold all parts."""
    whole = (epath.Path(folder) / hub.DIFFUSERS).exists()
    for part in parts:
        if whole or (epath.Path(folder) / f"{part}.safetensors").exists():
            config[part].weights = str(folder)


def _load(
    config: ConfigDict, workdir: epath.Path | str | None, parts: Sequence[str], mesh: jax.sharding.Mesh | None
) -> dict[str, Any]:
    found = part_weights.load_all(config, parts, workdir, _mesh(mesh))
    if mesh is not None:
        return found
    # The arrays have no mesh in their types, so that JAX may move them to the devices of the caller's other arrays.
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ())):
        return jax.tree.map(lambda leaf: jax.device_put(np.asarray(leaf)), found)


def _mesh(mesh: jax.sharding.Mesh | None) -> jax.sharding.Mesh:
    one = {"data": 1, "fsdp": 1, "tensor": 1}
    return mesh or sharding.make_mesh(one, jax.local_devices()[:1])
