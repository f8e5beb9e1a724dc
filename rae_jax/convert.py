"""Convert the weights of a run, or the weights that a config names, for this project or for others.

    python -m rae_jax.convert --workdir=runs/small --output=weights
    python -m rae_jax.convert --config=configs/dit_xl.py --parts=decoder,statistics,dit --output=weights
    python -m rae_jax.convert --workdir=runs/dit_xl --format=released_pt --output=theirs

The first command writes the weights that a run has trained. The second writes the weights that the config's `weights`
keys name: a released file, local or on the hub (--config.dit.weights=stage2_model.pt). Both write one safetensors file
per part. A config uses the folder by --config.decoder.weights=weights, and likewise for the other parts.

--format=released writes PART/model.safetensors with the names and shapes of the authors' released files; released_pt
writes the same as torch files; diffusers writes a folder for AutoencoderRAE or AutoencoderKL. With both --config and
--workdir, the run's weights are read by this config.
"""

import jax
from absl import app, flags, logging
from etils import epath
from ml_collections import ConfigDict, config_flags

from rae_jax.build import command_line_weights, part_weights, published_weights, saved_config
from rae_jax.config import checks, command_flag, inputs
from rae_jax.config import keys as config_keys
from rae_jax.errors import UserError
from rae_jax.runtime import atomic_files, checkpoint_reader, command_line, logs, sharding
from rae_jax.weights import safetensors_tree

_ALL_DEVICES = {"data": -1, "fsdp": 1, "tensor": 1}  # for any mesh of the run
FORMATS = ("rae_jax", "released", "released_pt", "diffusers")


def export(workdir, output, *, config=None, parts=None, form="rae_jax"):
    """Write weights as one of FORMATS; returns {path: size in bytes}.

    `workdir`: of a run, for its newest checkpoints, or None for the weights that `config` names. Raises UserError if
    the run or the checkpoint of a part does not exist, statistics are incomplete, or weights do not fit.
    """
    config = config or _config_of(workdir)
    parts = _parts(config, parts, form)
    if workdir is None:
        config = ConfigDict({**config, "stages": ()})
    mesh = sharding.make_mesh(_ALL_DEVICES)
    trees = {}
    with logs.Progress("read", total=len(parts), unit="part") as progress:
        for done, part in enumerate(parts, 1):
            trees[part] = jax.device_get(part_weights.load(config, part, workdir, mesh))
            if trees[part] is None:
                raise UserError("config.statistics.weights='none' means that no statistics exist: name other --parts")
            progress.update(done, part)
            step = checkpoint_reader.latest_step(epath.Path(workdir) / "checkpoints" / part) if workdir else None
            if step is not None:
                logs.say(f"{part}: weights of step {step}")
    names = inputs.read(workdir).get("data") if workdir else None  # the names of classes, for fine-tuning
    encoder = _encoder_of(config, trees, workdir, mesh) if form == "rae_jax" else {}
    try:
        return {
            path: atomic_files.size(path) for path in _write(config, trees, epath.Path(output), form, names, encoder)
        }
    except OSError as error:
        raise UserError(
            f"cannot write to --output={output} ({atomic_files.reason(error)}): choose a folder that you can write to"
        ) from error


def _encoder_of(config, trees, workdir, mesh):
    """Return {'encoder': digest} of the encoder that the parts were made for; {} if that needs a fetch."""
    if "encoder" in trees:
        return {"encoder": safetensors_tree.digest(trees["encoder"])}
    if workdir and "encoder" in config.stages:
        return {"encoder": safetensors_tree.digest(part_weights.load(config, "encoder", workdir, mesh))}
    recorded = inputs.read(workdir).get("weights", {}).get("encoder") if workdir else None
    return {"encoder": recorded} if recorded else {}


def _config_of(workdir):
    path = epath.Path(workdir) / "config.json"
    if not path.exists():
        raise UserError(f"--workdir={workdir} holds no config.json: name the folder of a run")
    return saved_config.read(workdir)


def _write(config, trees, output, form, names, encoder):
    match form:
        case "rae_jax":
            for part, tree in trees.items():
                safetensors_tree.write(output / f"{part}.safetensors", tree)
            saved_config.write(config, output, trees)  # for rae_jax.load_rae and load_dit
            inputs.write(output, data=names, weights=encoder)
            return [output / f"{part}.safetensors" for part in trees]
        case "released" | "released_pt":
            return published_weights.write_released(config, trees, output, pickled=form == "released_pt")
        case "diffusers":
            return published_weights.write_diffusers(config, trees, output)
        case other:
            raise ValueError(f"unknown format {other!r}")


def main():
    """Define the flags and run the command."""
    app.run(_run, flags_parser=command_flag.parser(_define_flags(), command_line_weights.complete))


def _define_flags():
    """Define the command's flags and return the config's."""
    flags.DEFINE(command_line.PATH, "workdir", None, "Folder of the run whose weights are converted.")
    flags.DEFINE(command_line.PATH, "output", None, "Folder for the weights.", required=True)
    flags.DEFINE_list("parts", None, "Parts to convert; by default the stages of the config.")
    flags.DEFINE_enum("format", "rae_jax", FORMATS, "Format of the weights.")
    return config_flags.DEFINE_config_file("config", None, "Config, by file or by name; by default that of --workdir.")


def _run(argv):
    logging.set_verbosity(logging.ERROR)
    given = flags.FLAGS
    command_line.use_own_jax_options()
    try:
        workdir = given.workdir or None
        if given.config is None and workdir is None:
            raise UserError("no weights are named: name a run by --workdir, or weights by --config")
        config = given.config
        if config is not None:
            config = ConfigDict({**config, "attention": "xla"})  # nothing is computed here
            checks.check(config, sharding.make_mesh(_ALL_DEVICES), trains=False, evaluates=False)
        options = {"config": config, "parts": given.parts, "form": given["format"].value}
        for path, size in export(workdir, given.output, **options).items():
            print(f"{path}  {size / 1e6:.2f} MB")
    except UserError as error:
        command_line.fail(str(error))


def _parts(config, named, form):
    """Return the parts named by --parts, or the parts that the format always has, or the stages of the config."""
    parts_of_diffusers = ("encoder", "decoder") if config_keys.is_vae(config) else ("encoder", "decoder", "statistics")
    if form == "diffusers" and named:
        raise UserError(f"--format=diffusers always has the parts {', '.join(parts_of_diffusers)}: leave out --parts")
    parts = parts_of_diffusers if form == "diffusers" else named or config.stages
    for part in parts:
        if part not in config_keys.STAGES:
            raise UserError(f"--parts={part} cannot work: choose from {', '.join(config_keys.STAGES)}")
    return parts


if __name__ == "__main__":
    main()
