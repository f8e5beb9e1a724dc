"""From config to modules, data, stages and weights: the only place that matches on names."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from rae_jax import (
    build_flow,
    checkpoint,
    published,
    sharding,
    stage_decoder,
    stage_dit,
    stage_encoder,
    stage_judge,
    stage_statistics,
)
from rae_jax.config import encoder_input_size, latent_shape
from rae_jax.data import pipeline
from rae_jax.data.images import ImageFolder
from rae_jax.data.shapes import Shapes
from rae_jax.errors import UserError
from rae_jax.models import sd_vae
from rae_jax.models.convnet import ConvNet
from rae_jax.models.decoder import Decoder
from rae_jax.models.discriminator import DiscriminatorHeads
from rae_jax.models.dit import DiT
from rae_jax.models.dit_dh import DiTDH
from rae_jax.models.layers import Mlp, SwiGlu
from rae_jax.models.vit import ViT
from rae_jax.rae import Autoencoder, SdVae
from rae_jax.train import Stage
from rae_jax.weights import store

SHIPPED = epath.Path(__file__).parent / "weights" / "small"


def autoencoder(config):
    """The frozen encoder and the decoder as one pair of functions."""
    e, d = config.encoder, config.decoder
    module = encoder(config)
    if e.family == "sd_vae":
        return SdVae(module, sd_vae.Decoder(tuple(e.widths), e.depth, jnp.dtype(config.dtype)))
    decoder = Decoder(
        width=d.width,
        depth=d.depth,
        num_heads=d.num_heads,
        hidden=d.hidden,
        patch_size=d.patch_size,
        grid_size=d.grid_size or None,
        **_computation(config),
    )
    return Autoencoder(
        module,
        decoder,
        tuple(e.mean),
        tuple(e.std),
        input_size=e.input_size or None,
        layers=tuple(e.layers) or None,
        add_mean=bool(e.layers) and e.family == "dinov3",
        norm_eps=module.norm_eps,
    )


def encoder(config):
    """The encoder's module: what its family fixes, and what the config chooses."""
    e = config.encoder
    match e.family:
        case "small":
            fixed = {}
        case "dino":
            fixed = {"layer_scale": False}
        case "dinov2":
            # transformers antialiases the resized positions in its class with registers, and only there.
            fixed = {"antialias": e.num_registers > 0}
        case "siglip2":
            fixed = {"cls_token": False, "layer_scale": False}
        case "mae":
            fixed = {"layer_scale": False, "norm_eps": 1e-12}
        case "dinov3":
            fixed = {"rope": True, "norm_eps": 1e-5}
        case "sd_vae":
            return sd_vae.Encoder(tuple(e.widths), e.depth, latent_width=e.width, dtype=jnp.dtype(config.dtype))
        case other:
            raise ValueError(f"unknown encoder family {other!r}")
    return ViT(
        width=e.width,
        depth=e.depth,
        num_heads=e.num_heads,
        mlp=_mlp(e.mlp, round(e.mlp_ratio * e.width)),
        patch_size=e.patch_size,
        position_size=e.position_size or encoder_input_size(config),
        num_registers=e.num_registers,
        **_computation(config),
        **fixed,
    )


def _computation(config):
    """The fields of a model that say how it computes, not what."""
    return {"dtype": jnp.dtype(config.dtype), "unroll": config.unroll, "remat": config.remat}


def _mlp(name, hidden):
    match name:
        case "gelu":
            return functools.partial(Mlp, hidden)
        case "gelu_tanh":
            return functools.partial(Mlp, hidden, approximate=True)
        case "swiglu":
            return functools.partial(SwiGlu, hidden)
        case other:
            raise ValueError(f"unknown MLP {other!r}")


def dit(config, sizes=None):
    """The diffusion transformer: DiT^DH, or a plain DiT where its head has no blocks. `sizes`: the guide's, or else."""
    c = config.dit if sizes is None else sizes
    trunk = {
        "width": c.width,
        "depth": c.depth,
        "num_heads": c.num_heads,
        "num_classes": config.data.num_classes if c.class_conditional else 0,
        "patch_size": c.patch_size,
        "qk_norm": c.qk_norm,
        **_computation(config),
    }
    if c.head_depth == 0:
        return DiT(**trunk)
    return DiTDH(head_width=c.head_width, head_depth=c.head_depth, head_num_heads=c.head_num_heads, **trunk)


def judge(config):
    """The classifier that judges generated images."""
    return ConvNet(tuple(config.judge.widths), config.data.num_classes)


def source(config, split):
    """Random-access source of 'train' or 'heldout' images. Raises UserError where its classes are not the config's."""
    data = config.data
    match data.source:
        case "shapes":
            num_images = {"train": data.num_train, "heldout": data.num_heldout}[split]
            found = Shapes(split=split, num_images=num_images, image_size=data.image_size, seed=config.seed)
        case "image_folder":
            found = ImageFolder(path=data.path, heldout_path=data.heldout_path, split=split, image_size=data.image_size)
        case other:
            raise ValueError(f"unknown data source {other!r}")
    if len(found.class_names) != data.num_classes:
        count = len(found.class_names)
        raise UserError(f"the data has {count} classes: set --config.data.num_classes={count}, not {data.num_classes}")
    return found


def stage(config, name, workdir, mesh):
    """Everything the loop needs to run stage `name`; weights of earlier stages are loaded here."""
    init, step = _init_and_step(config, name)
    images = source(config, "train")
    if name == "statistics":
        batch_size = config.statistics.batch_size
        num_steps = pipeline.num_batches(images, batch_size)
        batches = pipeline.one_pass(images, batch_size=batch_size, num_threads=config.data.num_threads)
    else:
        train = config[name].train
        batch_size, num_steps = train.batch_size, train.num_steps
        if len(images) < batch_size:
            raise UserError(
                f"config.{name}.train.batch_size={batch_size} is more than the {len(images)} training images: lower it"
            )
        batches = pipeline.training_batches(
            images,
            batch_size=batch_size,
            seed=stage_seed(config, name),
            flip=config.data.flip,
            num_threads=config.data.num_threads,
        )
    frozen = {part: load(config, part, workdir, mesh) for part in FROZEN[name]}
    if name == "decoder":
        frozen["backbone"] = frozen["encoder"]
    return Stage(name, init, step, frozen, batches, batch_size, num_steps)


# What each stage needs of earlier ones.
FROZEN = {
    "encoder": (),
    "judge": (),
    "decoder": ("encoder",),
    "statistics": ("encoder",),
    "dit": ("encoder", "statistics"),
}


def stage_seed(config, name):
    """A stage's own seed, so that no two stages share their randomness."""
    stream = tuple(FROZEN).index(name)
    return int(np.random.SeedSequence((config.seed, stream)).generate_state(1)[0])


def _init_and_step(config, name):
    parts = {"autoencoder": autoencoder(config)}
    size, classes = config.data.image_size, config.data.num_classes
    match name:
        case "encoder":
            return stage_encoder.make(
                **parts,
                patch_size=config.encoder.patch_size,
                num_classes=classes,
                image_size=size,
                train=config.encoder.train,
            )
        case "judge":
            return stage_judge.make(judge=judge(config), image_size=size, train=config.judge.train)
        case "decoder":
            return stage_decoder.make(
                **parts,
                heads=DiscriminatorHeads(),
                layers=tuple(config.discriminator.layers),
                latent_shape=latent_shape(config),
                train=config.decoder.train,
            )
        case "statistics":
            return stage_statistics.make(**parts, latent_shape=latent_shape(config))
        case "dit":
            return stage_dit.make(
                **parts,
                dit=dit(config),
                num_classes=classes,
                latent_shape=latent_shape(config),
                path=build_flow.path(config),
                target_fn=build_flow.target_fn(config),
                time_fn=build_flow.time_fn(config),
                train=config.dit.train,
            )
        case other:
            raise ValueError(f"unknown stage {other!r}")


def load(config, name, workdir, mesh, step=None):
    """Weights of one part, on the devices: trained in `workdir` if its stage belongs to the run, else config's.

    Config names ours ('small' or a folder that holds PART.safetensors) or published ones (see published.load). `step`
    picks a checkpoint of the last stage of the run. Raises UserError where there are none.
    """
    folder = epath.Path(workdir) / "checkpoints" / name
    if name in config.stages and _has_checkpoints(config, workdir):
        found = checkpoint.latest_step(folder) if step is None or name != config.stages[-1] else step
        if found is None:
            raise UserError(f"{workdir} has no checkpoint of stage {name!r} yet: train it first (--mode=train)")
        return _from_checkpoint(config, name, folder, found, mesh)
    weights = config[name].weights
    if name == "statistics" and weights == "none":
        return None
    if not weights:
        raise UserError(f"config.{name}.weights is empty: train that part first, or name weights that are there")
    path = (SHIPPED if weights == "small" else epath.Path(weights)) / f"{name}.safetensors"
    shapes = part_shapes(config, name)
    placed = sharding.shardings(shapes, mesh)
    if path.exists() or "://" in weights or not published.tables_of(config, name):
        return jax.device_put(store.read(path, shapes), placed)
    return published.load(config, name, shapes, placed)


def load_guide(config, mesh):
    """Weights of AutoGuidance's weak model, which config.guidance.dit describes."""
    with config.unlocked():
        weak = config.copy_and_resolve_references()
        weak.dit.update(config.guidance.dit)
        weak.stages = ()
    if not weak.dit.weights:
        raise UserError("config.guidance.dit.weights is empty: AutoGuidance needs a weaker model's weights")
    return load(weak, "dit", "", mesh)


def part_shapes(config, name):
    """Shapes of a part's weights as they are exported."""
    if name == "encoder":
        size = encoder_input_size(config)
        return jax.eval_shape(encoder(config).init, jax.random.key(0), jnp.zeros((1, size, size, 3)))["params"]
    return jax.eval_shape(_part(name), _state_shapes(config, name))


def _state_shapes(config, name):
    return jax.eval_shape(_init_and_step(config, name)[0], jax.random.key(0))


def _part(name):
    """How the weights that others use come out of a stage's state."""
    match name:
        case "statistics":
            return stage_statistics.statistics
        case "encoder":
            return lambda state: state["ema_params"]["encoder"]
        case _:
            return lambda state: state["ema_params"]


def _from_checkpoint(config, name, folder, step, mesh):
    shapes = _state_shapes(config, name)
    wanted = shapes if name == "statistics" else {"ema_params": shapes["ema_params"]}
    placed = sharding.shardings(wanted, mesh)
    abstract = jax.tree.map(lambda s, p: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=p), wanted, placed)
    return jax.jit(_part(name))(checkpoint.restore_entries(folder, step, abstract))


def _has_checkpoints(config, workdir):
    return any(checkpoint.latest_step(epath.Path(workdir) / "checkpoints" / s) is not None for s in config.stages)
