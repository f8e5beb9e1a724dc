"""What there is to run: experiments and sizes -> jobs, each with its whole config, and which of them need which."""

import dataclasses
import importlib
import re
from pathlib import Path

from configs.study import base
from launch.study import work
from rae_jax.data import sources

STUDIES = ("width", "schedule", "noise", "head", "vae", "encoders", "guidance", "reuse")
SHIPPED = "small"  # the weights that are the main foundation on shapes


@dataclasses.dataclass(frozen=True)
class Job:
    """A run in a workdir of its own, and what is measured of it; all of it plain data."""

    name: str
    workdir: Path
    config: dict  # {key: value} over configs/small.py
    kind: str = "run"  # or 'vae', 'image'
    export: bool = False  # whether others take its weights, from WORKDIR/weights
    needs: tuple = ()  # names of jobs that have to be done before
    built_on: dict = dataclasses.field(default_factory=dict)  # {name of such a job: digest of what it was asked for}
    measure: tuple = ()
    generators: dict = dataclasses.field(default_factory=dict)
    judge: dict = dataclasses.field(default_factory=dict)  # keys of the encoder and the judge that see all images
    vae: dict = dataclasses.field(default_factory=dict)  # of the kind 'vae': its training


def read(name):
    """The data of an experiment."""
    return importlib.import_module(f"configs.study.{name}").get_config()


def data_of(path):
    """(name of the folder of its results, {key: value}) of --data: '' for shapes, an image folder or an archive.

    Raises UserError where there are no images.
    """
    if not path:
        return "shapes", {}
    found = sources.image_folder(path=path, heldout_path="", split="train", image_size=32, named=("--data", ""))
    path = Path(path).resolve()
    keys = {"data.source": "image_folder", "data.path": str(path), "data.num_classes": len(found.class_names)}
    return re.sub(r"\W+", "_", f"{path.parent.name}_{path.stem}"), keys


class Plan:
    """The jobs of some experiments on one data set: `jobs`, every one after those that it needs."""

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
        """The name of the job, which is added after what it needs."""
        config = self._merged(study["config"], study["sizes"], study["variants"][variant])
        needs = []
        resolved = {key: self._resolved(value, key, needs) for key, value in config.items()}
        generators = {
            prefix: {key: self._resolved(value, key, needs) for key, value in changes.items()}
            for prefix, changes in study.get("generators", {"": {}}).items()
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
        """A value with the place of the foundation that it names, which is then among the jobs and in `needs`."""
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
        of, needs = self._foundations[name], []
        config = self._merged(of["config"], of.get("sizes", {}), {})
        if name == "main":  # it is built on nothing
            config = {key: "" if value == "@main" else value for key, value in config.items()}
        trained = {f"{stage}.weights" for stage in config["stages"]}
        config = {k: "" if k in trained else self._resolved(v, k, needs) for k, v in config.items()}
        self.jobs[job] = Job(
            name=job,
            workdir=self._workdir / job,
            config={**config, "name": name, "seed": 0},
            kind=of.get("kind", "run"),
            export=True,
            **self._needing(needs),
            vae={**of.get("vae", {}), **of.get("vae_sizes", {}).get(self._size, {})},
        )
