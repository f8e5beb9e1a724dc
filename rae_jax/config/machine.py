"""The config of a run on the devices here: mesh, batch sizes, kernels, packages and files."""

import importlib.util
import os
import re

import jax
from etils import epath

from rae_jax.config import run_config
from rae_jax.config.keys import GENERATORS, TRAINED, generator, is_vae, require, value_of
from rae_jax.errors import UserError
from rae_jax.runtime import logs, sharding


def adapted(config, workdir):
    """Return the config for a mode that does not train, with a mesh and a kernel that the devices here have.

    Values that the run has saved, perhaps on another machine, are replaced; values of the command line stay.
    """
    path = epath.Path(workdir) / run_config.FILE
    run = run_config.read_json(path) if path.exists() else {}
    config = config.copy_and_resolve_references()
    with config.unlocked():
        if config.mesh.to_dict() == run.get("mesh") and not _fits(config.mesh):
            config.mesh.update({"data": -1, "fsdp": 1 if config.mesh.fsdp == 1 else -1, "tensor": 1})
            logs.say(
                f"config.mesh={run['mesh']} of the run does not fit the {jax.device_count()} devices here: all are used"
            )
        if config.attention == run.get("attention"):
            config.attention = portable(config)
    return config


def portable(config):
    """Return the config's kind of attention, or 'xla' if the devices or the dtype here do not suit it."""
    try:
        check_attention(config, jax.local_devices()[0])
    except UserError:
        return "xla"
    return config.attention


def _fits(mesh):
    try:
        sharding.make_mesh(mesh)
    except UserError:
        return False
    return True


def check(config, mesh, *, trains, evaluates):
    """Raise UserError for the first value that cannot work on the devices of `mesh`, for training and evaluation."""
    if trains:
        installed = not config.wandb or importlib.util.find_spec("wandb") is not None
        require(installed, config, "wandb", "it needs wandb: pip install -e '.[wandb]', or set it to ''")
        _check_batches(config, mesh)
        student = generator(config) == "dit" or "few_step" in config.stages or config.few_step.weights
        fix = "it needs a student: add 'few_step' to config.stages, or set config.few_step.weights"
        require(student, config, "sampler.method", fix)
    if evaluates:
        reference = config.evaluate.reference
        exists = not reference or epath.Path(os.path.expanduser(reference)).exists()
        fix = "name an .npz file or a folder of images that exists, or '' for the held-out images"
        require(exists, config, "evaluate.reference", fix)
    check_attention(config, mesh.devices.flat[0])


def _check_batches(config, mesh):
    used = [f"{stage}.train" if stage in TRAINED else stage for stage in config.stages]
    for section in used:  # the batch size of evaluations is rounded to fit
        sharding.check_batch(value_of(config, section).batch_size, mesh, f"config.{section}.batch_size")
    for stage in set(GENERATORS) & set(config.stages):
        parts, ways = config[stage].train.microbatches, mesh.shape["data"] * mesh.shape["fsdp"]
        batch_size = config[stage].train.batch_size
        fix = f"a microbatch of config.{stage}.train.batch_size={batch_size} must be divisible by {ways} devices"
        require(batch_size % (parts * ways) == 0, config, f"{stage}.train.microbatches", fix)


def check_attention(config, device):
    """Raise UserError if the device, the dtype or the sizes of the models do not suit config.attention."""
    match config.attention:
        case "cudnn":
            fix = lacks_for_cudnn(config, device)
            require(fix is None, config, "attention", fix)
        case "flash":
            fix = f"it needs a TPU, and this is {device.device_kind}: set it to 'xla'"
            require(device.platform == "tpu", config, "attention", fix)


def lacks_for_cudnn(config, device):
    """Return what cuDNN's attention lacks here, and the fix; None if it can be used."""
    if not is_hopper(device):
        return f"it needs an NVIDIA GPU from Hopper on, and this is {device.device_kind}: set it to 'xla'"
    if config.dtype != "bfloat16":
        return "it needs config.dtype='bfloat16': set this too, or set it to 'xla'"
    for section, prefix in _attending(config):
        width, heads = (value_of(config, section)[f"{prefix}{key}"] for key in ("width", "num_heads"))
        if width // heads % 8:
            return f"config.{section}.{prefix}width={width} over {heads} heads is no multiple of 8: set it to 'xla'"
    return None


def is_hopper(device):
    """Return whether a device is an NVIDIA GPU from Hopper on. AMD's GPUs have a capability such as 'gfx942'."""
    capability = re.fullmatch(r"(\d+)\.\d+", str(getattr(device, "compute_capability", "")))
    return device.platform == "gpu" and capability is not None and int(capability[1]) >= 9


def _attending(config):
    """Yield (section, prefix of its keys) of all models whose attention config.attention computes."""
    if not is_vae(config):
        yield from (("encoder", ""), ("decoder", ""))
    if config.discriminator.backbone.family != "encoder" and "decoder" in config.stages:
        yield "discriminator.backbone", ""
    for section in ("dit", *(("guidance.dit",) if config.guidance.method == "autoguidance" else ())):
        yield section, ""
        if value_of(config, section).head_depth:
            yield section, "head_"
