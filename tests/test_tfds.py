"""A TFDS data set that was prepared as array_record, read where TensorFlow cannot be imported."""

import subprocess
import sys

import pytest

pytest.importorskip("tensorflow_datasets", reason="needs the tfds extra")

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


def test_a_prepared_data_set_is_read_without_tensorflow(tmp_path):
    done = subprocess.run([sys.executable, "-c", SCRIPT, str(tmp_path)], capture_output=True, text=True)
    assert done.stdout.strip().endswith("all read"), done.stderr[-2000:]
