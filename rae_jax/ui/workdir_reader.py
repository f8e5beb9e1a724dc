"""Reader of a run's records in its workdir; missing files, and lines cut off by a crash, are left out."""

import dataclasses
import functools
import json
import re

from etils import epath

from rae_jax.config.keys import flatten
from rae_jax.runtime import environment, logs


@dataclasses.dataclass(frozen=True)
class Run:
    """A workdir, local or gs://. Files are read on first use."""

    workdir: epath.Path

    @functools.cached_property
    def config(self):
        """Return the config as nested dicts; {} if the workdir has none."""
        return _read_json(self.workdir / "config.json")

    @property
    def name(self):
        """Return the name of the config, or of the folder if the config has none."""
        return str(self.config.get("name") or self.workdir.name or "run")

    @functools.cached_property
    def metrics(self):
        """Return {stage: rows} in the order of config.stages; other stages come last."""
        order = list(self.config.get("stages") or ())
        files = sorted((self.workdir / "metrics").glob("*.jsonl"))
        files = sorted(files, key=lambda file: order.index(file.stem) if file.stem in order else len(order))
        return {file.stem: rows for file in files if (rows := logs.read(file))}

    @functools.cached_property
    def starts(self):
        """Return the description of software and hardware at each start of the run; see `environment.describe`."""
        return environment.starts(self.workdir)

    @functools.cached_property
    def results(self):
        """Return {name of the file: {metric: value}} of the evaluations."""
        return {file.stem: flatten(_read_json(file)) for file in sorted((self.workdir / "eval").glob("*.json"))}

    @property
    def pictures(self):
        """Return {name: file} of the pictures of the run as a whole."""
        return {file.stem: file for file in sorted((self.workdir / "samples").glob("*.png"))}

    @property
    def pictures_by_step(self):
        """Return {(stage, kind): [(step, file)]} of the pictures of evaluations during training."""
        found = {}
        for file in sorted((self.workdir / "samples").glob("*/*.png")):
            if match := re.fullmatch(r"(\d+)_(\w+)", file.stem):
                found.setdefault((file.parent.name, match[2]), []).append((int(match[1]), file))
        return found


def _read_json(path):
    if not path.exists():
        return {}
    try:
        return dict(json.loads(path.read_text()))
    except (ValueError, TypeError):  # cut off by a crash: the rest of the report is still written
        return {"unreadable": f"{path.name} is cut off"}
