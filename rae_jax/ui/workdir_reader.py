"""What a run's workdir has recorded, read for people; whatever is missing, or was cut off by a crash, is left out."""

import dataclasses
import functools
import json
import re

from etils import epath

from rae_jax.config import keys
from rae_jax.runtime import environment, logs


@dataclasses.dataclass(frozen=True)
class Run:
    """A workdir, local or gs://. What is recorded is read when it is first asked for."""

    workdir: epath.Path

    @functools.cached_property
    def config(self):
        """As nested dicts; {} without."""
        return _read_json(self.workdir / "config.json")

    @property
    def name(self):
        """The config's, or that of the folder."""
        return str(self.config.get("name") or self.workdir.name or "run")

    @functools.cached_property
    def metrics(self):
        """{stage: rows}, in the order in which the stages run; those that the config does not name come last."""
        order = list(self.config.get("stages") or ())
        files = sorted((self.workdir / "metrics").glob("*.jsonl"))
        files = sorted(files, key=lambda file: order.index(file.stem) if file.stem in order else len(order))
        return {file.stem: rows for file in files if (rows := logs.read(file))}

    @functools.cached_property
    def starts(self):
        """What was said of the machine at each start of the run; see `environment.describe`."""
        return environment.starts(self.workdir)

    @functools.cached_property
    def results(self):
        """{file's name: {metric: value}}."""
        return {file.stem: keys.flatten(_read_json(file)) for file in sorted((self.workdir / "eval").glob("*.json"))}

    @property
    def pictures(self):
        """{name: file} of those of the run as a whole."""
        return {file.stem: file for file in sorted((self.workdir / "samples").glob("*.png"))}

    @property
    def pictures_by_step(self):
        """{(stage, kind): [(step, file)]} of the evaluations in training."""
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
    except (ValueError, TypeError):  # cut off by a crash: no reason to lose the rest of the report
        return {"unreadable": f"{path.name} is cut off"}
