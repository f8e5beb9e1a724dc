"""TPU topologies to compile for without a TPU, and the published peaks of TPUs and GPUs."""

import importlib.util
import math
import os
import re
from typing import NamedTuple

import jax
from jax.experimental import topologies

from rae_jax.errors import UserError

GIB = 2**30


class Chip(NamedTuple):
    """One kind of TPU. Rates are published peaks of a chip; its devices share them."""

    axes: int  # of the torus
    most: int  # chips in a slice, at most
    devices: int  # jax devices in a chip
    hbm: float  # bytes that a device can use, according to its compiler
    flops: float  # FLOPs a second, bfloat16
    bandwidth: float  # of the HBM, bytes a second
    links: float  # bytes a second that a chip can send to all its neighbours together
    kind: str  # device_kind of jax for this chip
    cores: str = ""  # libtpu's chip_config_name, if it must be given


CHIPS = {
    "v4": Chip(3, 4096, 1, 30.75 * GIB, 275e12, 1.23e12, 300e9, "TPU v4", "megacore"),
    "v5e": Chip(2, 256, 1, 15.75 * GIB, 197e12, 0.82e12, 200e9, "TPU v5 lite"),
    "v5p": Chip(3, 8960, 1, 95.74 * GIB, 459e12, 2.77e12, 600e9, "TPU v5"),
    "v6e": Chip(2, 256, 1, 31.25 * GIB, 918e12, 1.64e12, 448e9, "TPU v6 lite"),
    "tpu7x": Chip(3, 9216, 2, 94.75 * GIB, 2307e12, 7.37e12, 600e9, "TPU7x"),
}


# {device_kind of jax: published peak of bfloat16 products without sparsity, FLOPs a second}.
PEAKS = {
    **{chip.kind: chip.flops / chip.devices for chip in CHIPS.values()},
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA B200": 2250e12,
}

_SOME_HOST = {"TPU_ACCELERATOR_TYPE": "v5litepod-4", "TPU_WORKER_HOSTNAMES": "localhost"}


def devices(topology, num_slices=1):
    """Return (devices, Chip) of `num_slices` slices of a topology such as 'v5e:16x16'; no TPU is needed.

    Call it before JAX initialises its devices: afterwards JAX uses only the CPU. Raises UserError if libtpu is not
    installed or does not know the topology.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise UserError("--mode=compile needs libtpu, the TPU compiler: pip install -e '.[tpu]'")
    chip = _chip(topology)
    if num_slices < 1:
        raise UserError(f"--num_slices={num_slices} cannot work: it must be positive")
    jax.config.update("jax_platforms", "cpu")
    os.environ["TPU_SKIP_MDS_QUERY"] = "1"  # no metadata server exists that knows the kind of TPU,
    os.environ.update(_SOME_HOST)  # and libtpu complains if neither names it
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # no lock is needed: no device is used
    try:
        options = {"num_slices": num_slices} if num_slices > 1 else {}
        options |= {"chip_config_name": chip.cores} if chip.cores else {}
        return topologies.get_topology_desc(topology, platform="tpu", **options).devices, chip
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"--topology={topology}: libtpu does not know this topology ({reason}); {_EXAMPLES}") from error


_EXAMPLES = "choose one such as v5e:4x4, v6e:16x16, v5p:4x4x4 or tpu7x:2x2x1"


def _chip(topology):
    match = re.fullmatch(r"(\w+):([1-9]\d*(?:x[1-9]\d*)*)", topology)
    if not match or match[1] not in CHIPS:
        raise UserError(f"--topology={topology} is not KIND:SIZES with KIND one of {', '.join(CHIPS)}: {_EXAMPLES}")
    chip, sizes = CHIPS[match[1]], [int(size) for size in match[2].split("x")]
    if len(sizes) != chip.axes or math.prod(sizes) > chip.most:
        raise UserError(
            f"--topology={topology}: a slice of {match[1]} has {chip.axes} axes and at most {chip.most} chips: "
            f"{_EXAMPLES}"
        )
    return chip
