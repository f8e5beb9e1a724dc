"""The values of attention, remat and unroll where the config says 'auto': by platform, dtype, and memory."""

from typing import NamedTuple

from rae_jax.config import machine
from rae_jax.config.keys import latent_shape

KEYS = ("attention", "remat", "unroll")
AUTO = "auto"
FLASH_FROM = 1024  # tokens from which 'auto' takes the TPU's flash kernel; its speed was not measured


class Choice(NamedTuple):
    """Values of KEYS."""

    attention: str
    remat: str
    unroll: bool

    def __str__(self):
        return ", ".join(f"{key}={value}" for key, value in self._asdict().items())


def choices(config, device):
    """Return the Choices for a device, the fastest first; each next one needs less memory.

    On an H200 the first Choice is the fastest that was measured (docs/benchmark.md), on TPU by the compiler's estimate
    (docs/scale.md). Without rematerialisation XLA's attention keeps the weights of all pairs of tokens.
    """
    settings = (("none", True), ("dots", True), ("full", False))
    match device.platform:
        case "gpu":
            attention = "xla" if machine.lacks_for_cudnn(config, device) else "cudnn"
        case "tpu":
            height, width, _ = latent_shape(config)
            attention = "flash" if height * width // config.dit.patch_size**2 >= FLASH_FROM else "xla"
        case _:
            attention, settings = "xla", (("dots", False), ("full", False))
    return tuple(Choice(attention, *setting) for setting in settings)


def options(config, device):
    """Return the config once for each Choice, with the Choice's values in the place of 'auto'."""
    fixed = {key: config[key] for key in KEYS if config[key] != AUTO}
    found = [Choice(**{**choice._asdict(), **fixed}) for choice in choices(config, device)]
    return [_with(config, choice) for choice in dict.fromkeys(found)]


def settled(config, device):
    """Return the config with the first Choice's values in the place of 'auto': for programs that need little memory."""
    return options(config, device)[0]


def is_open(config):
    """Return whether the config leaves a choice."""
    return AUTO in (config[key] for key in KEYS)


def of(config):
    """Return the Choice that a settled config has."""
    return Choice(*(config[key] for key in KEYS))


def _with(config, choice):
    with config.unlocked():  # so that the copy is unlocked
        copy = config.copy_and_resolve_references()
    with copy.ignore_type():
        copy.update(choice._asdict())
    return copy
