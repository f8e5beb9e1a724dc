"""A TFDS data set that was prepared as array_record, read where TensorFlow cannot be imported."""

import os
import subprocess
import sys
import types
from pathlib import Path

import pytest

from rae_jax.build import data as build_data
from rae_jax.data import sources
from rae_jax.data.packed_images import PackedImages
from rae_jax.runtime import logs

SCRIPT = """
import importlib.machinery, io, pickle, sys

class WithoutTensorFlow(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, *rest):
        return None if name.split(".")[0] == "tensorflow" else super().find_spec(name, *rest)

sys.meta_path = [WithoutTensorFlow if f is importlib.machinery.PathFinder else f for f in sys.meta_path]
try:
    import tensorflow
    raise SystemExit("TensorFlow is not hidden")
except ImportError:
    pass
import numpy as np
import tensorflow_datasets as tfds
from PIL import Image
from rae_jax.data import sources
from rae_jax.errors import UserError

class Tiny(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        labels = tfds.features.ClassLabel(names=["ant", "cat"])
        features = {"image": tfds.features.Image(shape=(None, None, 3)), "label": labels}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, downloads):
        return {"train": self._generate_examples(6), "validation": self._generate_examples(3)}

    def _generate_examples(self, count):
        for i in range(count):
            file = io.BytesIO()
            Image.fromarray(np.full((20 + i, 30, 3), 10 * i, np.uint8)).save(file, "PNG")
            file.seek(0)
            yield i, {"image": file, "label": i % 2}

folder = sys.argv[1]
Tiny(data_dir=folder, file_format="array_record").download_and_prepare()
for split, count in (("train", 6), ("validation", 3)):
    source = pickle.loads(pickle.dumps(sources.tfds(name="tiny", data_dir=folder, split=split, image_size=16)))
    assert source.class_names == ("ant", "cat") and len(source) == count
    examples = [source[i] for i in range(count)]
    values = sorted(int(example["image"].max()) for example in examples)
    assert values == [10 * i for i in range(count)], values
    assert all(int(e["label"]) == int(e["image"][0, 0, 0]) // 10 % 2 for e in examples)
for wrong in ({"split": "test"}, {"name": "no_such_data"}):
    try:
        sources.tfds(**{"name": "tiny", "data_dir": folder, "split": "train", "image_size": 16, **wrong})
        raise SystemExit("not refused")
    except UserError as error:
        assert "config.data.tfds.name" in str(error) and "array_record" in str(error)
print("all read")
"""


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """Folder of the data set, and what its reader said."""
    pytest.importorskip("tensorflow_datasets", reason="needs the tfds extra")
    folder = tmp_path_factory.mktemp("tfds")
    return folder, subprocess.run([sys.executable, "-c", SCRIPT, str(folder)], capture_output=True, text=True)


def test_a_prepared_data_set_is_read_without_tensorflow(prepared):
    done = prepared[1]
    assert done.stdout.strip().endswith("all read"), done.stderr[-2000:]


@pytest.mark.parametrize("split, part", [("train", "train[:90%]"), ("heldout", "validation")])
def test_the_config_names_the_data_set_and_its_splits(tiny_config, monkeypatch, split, part):
    asked = []

    def read(**options):
        asked.append(options)
        return types.SimpleNamespace(class_names=range(10))

    monkeypatch.setattr(sources, "tfds", read)
    tiny_config.data.update({"source": "tfds", "path": "a folder"})
    tiny_config.data.tfds.update({"name": "some_data", "split": "train[:90%]", "heldout_split": "validation"})
    build_data.source(tiny_config, split)
    assert asked == [{"name": "some_data", "data_dir": "a folder", "split": part, "image_size": 32}]


def _command(module, *arguments):
    command = [sys.executable, "-m", module, *arguments]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    root = Path(__file__).parents[2]
    return subprocess.run(command, capture_output=True, text=True, cwd=root, env=environment, timeout=500)


@pytest.mark.slow
def test_the_command_packs_it(prepared, tmp_path):
    arguments = [f"--data_dir={prepared[0]}", f"--output={tmp_path / 'packed'}", "--image_size=16", "--num_workers=1"]
    done = _command("rae_jax.data.pack", "--tfds=tiny", "--encoding=png", *arguments)
    assert "train: 6 images in 1 shards" in done.stdout and "heldout: 3 images" in done.stdout, done.stderr[-2000:]
    found = PackedImages(path=tmp_path / "packed", split="train", image_size=16)
    assert sorted(int(found[i]["image"].max()) for i in range(6)) == [0, 10, 20, 30, 40, 50]
    refused = _command("rae_jax.data.pack", "--tfds=tiny", "--tfds_splits=train", *arguments)
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1, refused.stderr


@pytest.mark.slow
def test_a_run_trains_on_it(prepared, tmp_path):
    arguments = ["--config=configs/small.py", f"--workdir={tmp_path / 'run'}", "--config.stages=('judge',)"]
    arguments += ["--config.data.source=tfds", f"--config.data.path={prepared[0]}", "--config.data.num_classes=2"]
    arguments += ["--config.judge.train.num_steps=4", "--config.judge.train.batch_size=4", "--config.judge.widths=(8,)"]
    arguments += ["--config.evaluate.probe=False", "--config.dit.weights=", "--config.log_every=2"]
    refused = _command("rae_jax.main", *arguments, "--config.data.tfds.name=nothing")
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1, refused.stderr
    assert "config.data.tfds.name='nothing'" in refused.stderr and not (tmp_path / "run").exists()
    done = _command("rae_jax.main", *arguments, "--config.data.tfds.name=tiny")
    assert done.returncode == 0 and "judge_accuracy" in done.stdout, done.stderr[-2000:]
    assert [row["step"] for row in logs.read(tmp_path / "run" / "metrics" / "judge.jsonl")] == [2, 4]
