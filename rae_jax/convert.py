"""Weights out of a workdir: one safetensors file for each part (encoder, judge, decoder, statistics, dit).

    python -m rae_jax.convert --workdir=runs/small --output=weights

A config uses such a folder by `--config.decoder.weights=weights`, and so on for the other parts.
"""

import json
import sys

import jax
from absl import app, flags, logging
from etils import epath
from ml_collections import ConfigDict

from rae_jax import build, sharding
from rae_jax.errors import UserError
from rae_jax.weights import store

_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of a finished run.", required=True)
_OUTPUT = flags.DEFINE_string("output", None, "Folder for the weights.", required=True)


def export(workdir, output):
    """Write the averaged weights of every stage that was run in `workdir`; returns the files' sizes in bytes.

    Raises UserError where the workdir holds no run, or an unfinished one.
    """
    workdir, output = epath.Path(workdir), epath.Path(output)
    if not (workdir / "config.json").exists():
        raise UserError(f"--workdir={workdir} holds no config.json: name the folder of a run")
    config = ConfigDict(json.loads((workdir / "config.json").read_text()))
    mesh = sharding.make_mesh({"data": -1, "fsdp": 1, "tensor": 1})
    parts = {name: jax.device_get(build.load(config, name, workdir, mesh)) for name in config.stages}
    for name, tree in parts.items():
        store.write(output / f"{name}.safetensors", tree)
    return {name: (output / f"{name}.safetensors").stat().length for name in parts}


def _main(argv):
    logging.set_verbosity(logging.ERROR)
    try:
        for name, size in export(_WORKDIR.value, _OUTPUT.value).items():
            print(f"{_OUTPUT.value}/{name}.safetensors  {size / 1e6:.2f} MB")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    app.run(_main)
