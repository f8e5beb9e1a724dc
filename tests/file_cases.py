"""A small file of every kind that is read, and its loader: for tests of what holds for all kinds."""

import functools

import encoder_cases
import jax
import numpy as np
import perception_cases
import published_cases
import sd_vae_cases
from conftest import one_device, tiny
from flax import traverse_util
from safetensors.numpy import save_file

from rae_jax.build import part_weights, perceptual_networks, published_weights
from rae_jax.config.keys import section
from rae_jax.runtime import sharding
from rae_jax.weights import engine, perceptual_tables

NETWORKS = ("vgg", "linear", "inception")
ALL = (*published_cases.KINDS, *(f"encoder/{name}" for name in encoder_cases.TINY), "sd_vae", "backbone", *NETWORKS)
WITH_CONSTANTS = ("plain_qk_norm_patch", "dh_qk_norm", "decoder")


@functools.cache
def arrays(name):
    """{tensor: array} of such a file, nowhere zero, with the tensors that are never learned."""
    if name in NETWORKS:
        zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape), _small_network(name))
        return perception_cases.made_up({k: a.shape for k, a in engine.unload(zeros, _table(name)).items()})
    if name.startswith("encoder/"):
        return encoder_cases.weights(encoder_cases.shapes_of(name.removeprefix("encoder/")))
    if name == "sd_vae":
        return sd_vae_cases.made_up(sd_vae_cases.tiny_shapes())
    if name == "backbone":
        return encoder_cases.weights(published_cases.dino_shapes())
    return {**published_cases.kind(name)[2], **constants(name)}


def constants(name):
    """{tensor: array} of the tensors in a file that are never learned; {} for kinds without them."""
    if name not in WITH_CONSTANTS:
        return {}
    part, config, _ = published_cases.kind(name)
    fixed = published_weights.tables_of(config, part)[0].fixed
    return {key: np.ascontiguousarray(value, np.float32) for key, value in fixed.items()}


def load(name, path, monkeypatch):
    """{our path: array} of the parameters in a file of this kind."""
    if name in NETWORKS:
        found = _load_network(name, path, monkeypatch)
    else:
        part, config, shapes = _part(name)
        section(config, part).weights = str(path)
        found = published_weights.load(config, part, shapes, sharding.shardings(shapes, one_device()))
    return {key: np.asarray(value) for key, value in traverse_util.flatten_dict(found, sep="/").items()}


@functools.cache
def _part(name):
    """(part, config, shapes of the parameters)."""
    part, config = "encoder", tiny()
    if name.startswith("encoder/"):
        config = encoder_cases.config_of(encoder_cases.TINY[name.removeprefix("encoder/")], "")
    elif name == "sd_vae":
        config = sd_vae_cases.config_of(sd_vae_cases.TINY, "")
    elif name == "backbone":
        part = name
        config.discriminator.backbone.update(published_cases.DINO)
    else:
        part, config, _ = published_cases.kind(name)
        config = config.copy_and_resolve_references()
    return part, config, part_weights.shapes(config, part)


@functools.cache
def _whole_networks():
    return {**perceptual_networks.part_shapes("lpips"), "inception": perceptual_networks.part_shapes("inception")}


def _small_network(name):
    """The shapes of a network with at most four channels in each layer."""
    shrunken = jax.tree.map(lambda leaf: tuple(min(size, 4) for size in leaf.shape), _whole_networks()[name])
    is_shape = lambda value: isinstance(value, tuple)  # noqa: E731
    return jax.tree.map(lambda shape: jax.ShapeDtypeStruct(shape, np.float32), shrunken, is_leaf=is_shape)


def _table(name):
    if name == "inception":
        return perceptual_tables.inception(traverse_util.flatten_dict(_small_network(name), sep="/"))
    return {"vgg": perceptual_tables.VGG16, "linear": perceptual_tables.LPIPS}[name]


def _load_network(name, path, monkeypatch):
    small = {key: _small_network(key) for key in NETWORKS}
    monkeypatch.setattr(
        perceptual_networks,
        "part_shapes",
        lambda part: small["inception"] if part == "inception" else {key: small[key] for key in ("vgg", "linear")},
    )
    part = "inception" if name == "inception" else "lpips"
    paths = {name: str(path)}
    for other in {"vgg", "linear"} - {name} if part == "lpips" else ():
        paths[other] = str(path.parent / f"{other}.safetensors")
        save_file(arrays(other), paths[other])
    found = perceptual_networks.load(perception_cases.config_of(paths), part, one_device())
    return found if part == "inception" else found[name]
