"""Make the jobs of experiments at one size: each with its whole config and the names of the jobs that it needs."""

import dataclasses
import importlib
import re
from pathlib import Path

from configs.study import base
from launch.study import work
from rae_jax.data import sources

STUDIES = ("width", "schedule", "noise", "head", "vae", "encoders", "guidance", "reuse", "raev2", "few_step")
SHIPPED = "small"  # the weights of this package: the main foundation on shapes


@dataclasses.dataclass(frozen=True)
class Job:
    """A run in a workdir of its own, and its measurements, as plain data."""

    name: str
    workdir: Path
    config: dict  # {key: value} over configs/small.py
    kind: str = "run"  # or 'vae', 'image'
    export: bool = False  # write its weights to WORKDIR/weights for other jobs
    needs: tuple = ()  # names of the jobs that must be done before
    built_on: dict = dataclasses.field(default_factory=dict)  # {name of a needed job: work.digest}
    measure: tuple = ()
    generators: dict = dataclasses.field(default_factory=dict)
    judge: dict = dataclasses.field(default_factory=dict)  # keys of the encoder and the judge that evaluate images
    vae: dict = dataclasses.field(default_factory=dict)  # settings of training for kind 'vae'


def read(name):
    """Return the data of an experiment."""
    return importlib.import_module(f"configs.study.{name}").get_config()


def generators_of(study, variant):
    """Return {name: {key: value}} of the generators of a variant's runs."""
    return study.get("generators", {"": {}}) | study.get("generators_of", {}).get(variant, {})


def data_of(path):
    """Return (name of the folder for results, {key: value}) for --data: '' for shapes, an image folder or an archive.

    Raises UserError when it has no images.
    """
    if not path:
        return "shapes", {}
    found = sources.image_folder(
        path=path, heldout_path="", split="train", image_size=32, named=sources.KEYS._replace(path="--data")
    )
    path = Path(path).resolve()
    keys = {"data.source": "image_folder", "data.path": str(path), "data.num_classes": len(found.class_names)}
    return re.sub(r"\W+", "_", f"{path.parent.name}_{path.stem}"), keys


class Plan:
    """Jobs of some experiments on one data set. `jobs`: {name: Job}, each after the jobs that it needs."""

    def __init__(self, studies, *, workdir, data, size, seeds):
        self._workdir, self._data, self._size = Path(workdir), data, size
        self._studies = {name: read(name) for name in studies}
        self._foundations = dict(base.FOUNDATIONS)
        for name in STUDIES:
            self._foundations |= read(name).get("foundations", {})
        self.jobs, self.of = {}, {name: {} for name in studies}
        for name, study in self._studies.items():
            for seed in range(seeds):
                for variant in study["variants"]:
                    self.of[name][variant, seed] = self._add_run(name, study, variant, seed)

    def _add_run(self, name, study, variant, seed):
        """Add the job after the jobs that it needs; return its name."""
        config = self._merged(study["config"], study["sizes"], study["variants"][variant])
        needs = []
        resolved = {key: self._resolved(value, key, needs) for key, value in config.items()}
        generators = {
            prefix: {key: self._resolved(value, key, needs) for key, value in changes.items()}
            for prefix, changes in generators_of(study, variant).items()
        }
        judge = {
            **{f"{part}.weights": self._resolved("@main", part, needs) for part in ("encoder", "judge")},
            **{key: value for key, value in self._merged({}, {}, {}).items() if key.startswith(("data.", "evaluate."))},
        }
        folder = re.sub(r"[^\w.]+", "_", variant)
        job = f"{name}/{folder}/seed_{seed}"
        self.jobs[job] = Job(
            name=job,
            workdir=self._workdir / job,
            config={**resolved, "name": f"{name}_{folder}", "seed": seed},
            **self._needing(needs),
            measure=tuple(study["measure"]),
            generators=generators,
            judge=judge,
        )
        return job

    def _merged(self, config, sizes, variant):
        merged = {**base.RUN, **self._data, **config, **base.SIZES[self._size]}
        return {**merged, **sizes.get(self._size, {}), **variant}

    def _resolved(self, value, key, needs):
        """Replace '@name' by the folder of the foundation's weights; add its job to the jobs and to `needs`."""
        if not (isinstance(value, str) and value.startswith("@")):
            return value
        name = value[1:]
        if name == "main" and not self._data:
            return SHIPPED
        job = f"foundations/{name}"
        if job not in self.jobs:
            self._add_foundation(name, job)
        if job not in needs:
            needs.append(job)
        return str(self.jobs[job].workdir / "weights")

    def _needing(self, needs):
        return {"needs": tuple(needs), "built_on": {name: work.digest(self.jobs[name]) for name in needs}}

    def _add_foundation(self, name, job):
        foundation, needs = self._foundations[name], []
        config = self._merged(foundation["config"], foundation.get("sizes", {}), {})
        if name == "main":  # needs no other foundation
            config = {key: "" if value == "@main" else value for key, value in config.items()}
        trained = {f"{stage}.weights" for stage in config["stages"]}
        config = {k: "" if k in trained else self._resolved(v, k, needs) for k, v in config.items()}
        self.jobs[job] = Job(
            name=job,
            workdir=self._workdir / job,
            config={**config, "name": name, "seed": 0},
            kind=foundation.get("kind", "run"),
            export=True,
            **self._needing(needs),
            vae={**foundation.get("vae", {}), **foundation.get("vae_sizes", {}).get(self._size, {})},
        )
