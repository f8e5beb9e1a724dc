"""The inputs of a run, in WORKDIR/inputs.json: a run is resumed on the same data and weights, wherever these are now.

{"data": {"num_images", "names", "class_names"}, "weights": {part: digest}}, without the parts that the run trains.
"""

import json

from etils import epath

from rae_jax.config import run_config
from rae_jax.errors import UserError
from rae_jax.runtime import atomic_files, processes


def read(workdir):
    """Return the inputs that a run has recorded; {} if it has recorded none."""
    path = epath.Path(workdir) / run_config.INPUTS
    return run_config.read_json(path) if path.exists() else {}


def compare_data(workdir, data, given):
    """Raise UserError if the run has recorded other data; `given`: the key and value that name the data."""
    recorded = read(workdir).get("data", data)
    for key, value in recorded.items():
        if key == "class_names" and len(value) == len(data[key]) == 1:
            continue  # the name of the only class has no meaning
        if data.get(key) != value:
            raise UserError(
                f"{workdir} holds a run on other data than {given}: {_in_words(recorded)}, not {_in_words(data)}; "
                f"name the run's data, or use another --workdir"
            )


def compare_weights(workdir, weights, given):
    """Raise UserError if the run has recorded other weights; `given`: {part: the key and value that name its weights}.

    A part that the run has not recorded may have any weights.
    """
    recorded = read(workdir).get("weights", {})
    for part, digest in weights.items():
        if recorded.get(part, digest) != digest:
            raise UserError(
                f"{workdir} holds a run with other weights than {given[part]} (digest {recorded[part]}, not {digest}): "
                f"name the run's weights, or use another --workdir"
            )


def record(workdir, *, data=None, weights=None):
    """Add inputs to the record, in the first process."""
    if not processes.is_first():
        return
    recorded = read(workdir)
    new = {"data": data or recorded.get("data", {}), "weights": {**recorded.get("weights", {}), **(weights or {})}}
    if new != recorded:
        write(workdir, **new)


def write(folder, *, data, weights):
    """Write the record of a folder."""
    text = json.dumps({"data": data or {}, "weights": weights}, indent=1)
    atomic_files.write_text(epath.Path(folder) / run_config.INPUTS, text + "\n")


def _in_words(data):
    return f"{data['num_images']} images of {len(data['class_names'])} classes, names {data['names']}"
