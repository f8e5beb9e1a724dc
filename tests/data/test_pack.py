"""Packed images: what is written, what is read back, and what becomes of damage."""

import json
import multiprocessing
import os
import resource
import signal
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from PIL import Image

from rae_jax.build import data as build_data
from rae_jax.build import stages
from rae_jax.data import packed_images, pipeline, sources
from rae_jax.data.pack import pack
from rae_jax.data.packed_images import PackedImages
from rae_jax.errors import UserError
from rae_jax.inference import linear_probes
from rae_jax.runtime import sharding

SIZE = 16
FORM = {"image_size": SIZE, "crop": "centre", "encoding": "png", "quality": 95, "images_per_shard": 5}
FORM |= {"num_workers": 1, "on_error": "stop"}


def _folder(root, count=12):
    rng = np.random.default_rng(0)
    for name in ("ant", "cat"):
        (root / name).mkdir(parents=True)
        for i in range(count):
            pixels = rng.integers(0, 256, (40 + i, 70, 3), np.uint8)
            Image.fromarray(pixels).save(root / name / f"{i:03d}.png", compress_level=1)
    return root


def _parts(path):
    options = {"path": str(path), "heldout_path": "", "image_size": SIZE}
    return {split: sources.image_folder(split=split, **options) for split in ("train", "heldout")}


@pytest.fixture
def folder(tmp_path):
    return _folder(tmp_path / "images")


def test_packed_pixels_are_those_of_the_files(folder, tmp_path):
    parts = _parts(folder)
    index = pack(parts, tmp_path / "packed", **FORM)
    assert [shard["num_images"] for shard in index["splits"]["train"]] == [5, 5, 5, 5, 2]
    for split, source in parts.items():
        found = PackedImages(path=tmp_path / "packed", split=split, image_size=SIZE, crop="centre")
        assert len(found) == len(source) and found.class_names == ("ant", "cat")
        for i in range(len(source)):
            np.testing.assert_array_equal(found[i]["image"], source[i]["image"])
            assert found[i]["label"] == source[i]["label"]


def test_random_crops_of_the_packed_are_those_of_the_files_and_probes_need_others(folder, tmp_path, tiny_config):
    parts = _parts(folder)
    pack(parts, tmp_path / "packed", **{**FORM, "crop": "random"})
    found = PackedImages(path=tmp_path / "packed", split="train", image_size=SIZE, crop="random")
    for i in range(len(found)):
        ours, theirs = (s.random_crop(i, np.random.default_rng(i))["image"] for s in (found, parts["train"]))
        np.testing.assert_array_equal(ours, theirs)
    heldout = PackedImages(path=tmp_path / "packed", split="heldout", image_size=SIZE, crop="centre")
    np.testing.assert_array_equal(heldout[0]["image"], parts["heldout"][0]["image"])
    data = {"source": "array_record", "path": str(tmp_path / "packed"), "image_size": SIZE, "num_classes": 2}
    tiny_config.data.update(data)
    linear_probes.check_available(tiny_config)
    tiny_config.evaluate.probe = True
    with pytest.raises(UserError, match="or evaluate without probes: --config.evaluate.probe=False"):
        linear_probes.check_available(tiny_config)


def test_jpeg_records_are_close(tmp_path):
    (tmp_path / "images" / "cat").mkdir(parents=True)
    smooth = Image.fromarray(np.random.default_rng(0).integers(0, 256, (4, 4, 3), np.uint8)).resize((64, 64))
    for i in range(2):
        smooth.save(tmp_path / "images" / "cat" / f"{i}.png")
    parts = _parts(tmp_path / "images")
    pack(parts, tmp_path / "packed", **{**FORM, "encoding": "jpeg"})
    found = PackedImages(path=tmp_path / "packed", split="train", image_size=SIZE)
    assert np.abs(found[0]["image"].astype(int) - parts["train"][0]["image"]).mean() < 3


def test_packing_goes_on_where_it_was(folder, tmp_path):
    parts, output = _parts(folder), tmp_path / "packed"
    pack(parts, output, **FORM)
    before = {file.name: (file.read_bytes(), file.stat().st_mtime_ns) for file in output.glob("train*.array_record")}
    (output / "index.json").unlink()
    (output / "train-00001-of-00005.json").unlink()  # as if it had been killed before it had verified this one
    (output / "train-00001-of-00005.array_record").write_bytes(b"half a shard")
    pack(parts, output, **FORM)
    after = {file.name: (file.read_bytes(), file.stat().st_mtime_ns) for file in output.glob("train*.array_record")}
    changed = [name for name in before if before[name] != after[name]]
    assert changed == ["train-00001-of-00005.array_record"]
    assert len(PackedImages(path=output, split="train", image_size=SIZE)) == 22
    with pytest.raises(UserError, match="or with other options"):
        pack(parts, output, **{**FORM, "encoding": "jpeg"})


def test_bad_files_stop_the_packing_or_are_left_out(folder, tmp_path):
    (folder / "ant" / "003.png").write_bytes(b"")
    with pytest.raises(UserError, match="003.png"):
        pack(_parts(folder), tmp_path / "one", **FORM)
    index = pack(_parts(folder), tmp_path / "two", **{**FORM, "on_error": "skip"})
    skipped = [report for shard in index["splits"]["train"] for report in shard["skipped"]]
    assert len(skipped) == 1 and "003.png" in skipped[0]
    assert len(PackedImages(path=tmp_path / "two", split="train", image_size=SIZE)) == 21


def _no_pixels():
    """A PNG file of 0x0 pixels."""
    chunk = b"IHDR" + struct.pack(">IIBBBBB", 0, 0, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))


ODD = {
    "no_pixels.png": lambda folder: _no_pixels(),
    "empty.jpg": lambda folder: b"",
    "text.png": lambda folder: b"none",
    "cut_off.png": lambda folder: (folder / "000.png").read_bytes()[:900],
}


@pytest.mark.parametrize("name", ODD)
def test_every_policy_knows_what_to_do_with_odd_files(tmp_path, capfd, name):
    """Through training, a pass and packing: what is not an image is named or skipped, 30 megapixels are read."""
    root = _folder(tmp_path / "images", count=4)
    (root / "cat" / name).write_bytes(ODD[name](root / "cat"))
    if name == "no_pixels.png":  # once is enough: it takes long
        Image.new("RGB", (6000, 5000), "red").save(root / "ant" / "000.png", compress_level=1)
    source = sources.image_folder(path=str(root), heldout_path=str(root), split="train", image_size=SIZE)
    reading = {"num_threads": 2, "batch_size": 3}

    def train(on_error):
        options = {"seed": 0, "random_crop": False, "flip": True, "on_error": on_error}
        iterator = iter(pipeline.training_batches(source, **reading, **options))
        return [next(iterator) for _ in range(3)]  # an epoch

    def look(on_error):
        return list(pipeline.one_pass(source, on_error=on_error, **reading))

    def packed_as(on_error):
        return pack({"train": source}, tmp_path / on_error, **{**FORM, "on_error": on_error})

    for each in (train, look, packed_as):
        with pytest.raises(UserError, match=name):
            each("stop")
    assert [len(batch["label"]) for batch in train("skip")] == [3, 3, 3]
    assert sum(batch["mask"].sum() for batch in look("skip")) == 8
    assert sum(shard["num_images"] for shard in packed_as("skip")["splits"]["train"]) == 8
    said = [line for line in capfd.readouterr().err.splitlines() if line.startswith("skipped: ")]
    assert len(said) >= 3 and all(name in line for line in said), said  # a stand-in may be the same one again


def test_a_damaged_request_is_one_line(folder, tmp_path):
    pack(_parts(folder), tmp_path / "packed", **FORM)
    request = tmp_path / "packed" / "request.json"
    request.write_text(request.read_text()[:20])
    with pytest.raises(UserError, match="request.json is damaged") as refusal:
        pack(_parts(folder), tmp_path / "packed", **FORM)
    assert "\n" not in str(refusal.value)


class _Deadly:
    """Images that kill the process that packs them, once."""

    class_names, labelled = ("only",), True

    def __init__(self, killed, last):
        self._killed, self._last = killed, last

    def __len__(self):
        return 12

    def name(self, index):
        return f"image {index}"

    def names(self):
        return [f"image {n}" for n in range(12)]

    def image_names(self):
        return [(name, 0) for name in self.names()]

    def captions(self, index):
        return []

    def example(self, index, crop):
        if index == self._last and not self._killed.exists():
            self._killed.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return {"image": crop(Image.new("RGB", (20, 20), (index, 0, 0))), "label": np.int32(0)}


@pytest.mark.slow
def test_a_killed_packer_is_reported_and_gone_on_after(tmp_path):
    """A worker, then the whole command; the archive is the one of a packing that nothing happened to."""
    form = {**FORM, "num_workers": 2}
    parts = {"train": _Deadly(tmp_path / "killed", 7)}
    with pytest.raises(UserError, match="a process that packs was killed.*run the same command again"):
        pack(parts, tmp_path / "packed", **form)
    assert (tmp_path / "killed").exists() and not (tmp_path / "packed" / "index.json").exists()
    pack(parts, tmp_path / "packed", **form)
    pack(parts, tmp_path / "other", **form)
    child = multiprocessing.get_context("spawn").Process(
        target=pack, args=({"train": _Deadly(tmp_path / "again", 11)}, tmp_path / "third"), kwargs=FORM
    )
    child.start()
    child.join(120)
    assert child.exitcode == -signal.SIGKILL and (tmp_path / "third" / "train-00001-of-00003.json").exists()
    pack({"train": _Deadly(tmp_path / "again", 11)}, tmp_path / "third", **FORM)
    archives = [{f.name: f.read_bytes() for f in (tmp_path / n).iterdir()} for n in ("packed", "other", "third")]
    assert archives[0] == archives[1] == archives[2]


def test_a_missing_shard_is_named_or_left_out(folder, tmp_path, capfd):
    pack(_parts(folder), tmp_path / "packed", **FORM)
    (tmp_path / "packed" / "train-00002-of-00005.array_record").unlink()
    options = {"path": tmp_path / "packed", "split": "train", "image_size": SIZE}
    with pytest.raises(UserError, match="train-00002-of-00005.array_record with 5 images is missing"):
        PackedImages(**options)
    assert len(PackedImages(**options, on_error="skip")) == 17
    assert "train-00002-of-00005.array_record with 5 images is missing" in capfd.readouterr().err


@pytest.mark.parametrize("damage", ["cut", "garbled", "empty"])
def test_a_damaged_shard_is_named(folder, tmp_path, damage):
    pack(_parts(folder), tmp_path / "packed", **FORM)
    file = tmp_path / "packed" / "train-00000-of-00005.array_record"
    data = file.read_bytes()
    garbled = data[:200] + bytes(byte ^ 0x55 for byte in data[200:-200]) + data[-200:]
    file.write_bytes({"cut": data[: len(data) // 2], "garbled": garbled, "empty": b""}[damage])
    found = PackedImages(path=tmp_path / "packed", split="train", image_size=SIZE)
    with pytest.raises(UserError, match="train-00000-of-00005.array_record, record 1"):
        found[1]
    assert found[7]["image"].shape == (SIZE, SIZE, 3)


def test_a_label_outside_of_the_classes_is_named(folder, tmp_path):
    pack(_parts(folder), tmp_path / "packed", **FORM)
    index = json.loads((tmp_path / "packed" / "index.json").read_text())
    index["class_names"] = ["ant"]
    (tmp_path / "packed" / "index.json").write_text(json.dumps(index))
    found = PackedImages(path=tmp_path / "packed", split="train", image_size=SIZE)
    with pytest.raises(UserError, match=r"record 1 \(.*cat.*\) has label 1, outside of 0 to 0"):
        found[21 - 5]


def test_a_config_names_what_is_packed(folder, tmp_path, tiny_config):
    pack(_parts(folder), tmp_path / "packed", **FORM)
    tiny_config.data.update({"source": "array_record", "path": str(tmp_path / "packed"), "image_size": SIZE})
    with pytest.raises(UserError, match="num_classes=2"):
        build_data.source(tiny_config, "train")
    tiny_config.data.num_classes = 2
    assert [len(build_data.source(tiny_config, split)) for split in ("train", "heldout")] == [22, 2]
    tiny_config.judge.train.update({"batch_size": 8, "crop": "centre"})
    mesh = sharding.make_mesh(tiny_config.mesh)
    stage = stages.stage(tiny_config, "judge", tmp_path, mesh)
    assert next(iter(stage.batches))["image"].shape == (8, SIZE, SIZE, 3)
    tiny_config.judge.train.crop = "random"
    with pytest.raises(UserError, match="packed for crop='centre'"):
        stages.stage(tiny_config, "judge", tmp_path, mesh)


@pytest.mark.parametrize(
    ("change", "said"), [({"image_size": 32}, "image_size=16, not 32"), ({"crop": "random"}, "crop")]
)
def test_another_size_or_crop_than_packed_is_refused(folder, tmp_path, change, said):
    pack(_parts(folder), tmp_path / "packed", **FORM)
    with pytest.raises(UserError, match=said):
        PackedImages(**{"path": tmp_path / "packed", "split": "train", "image_size": SIZE, **change})


def test_records_are_parsed_or_refused():
    assert packed_images.parse(packed_images.record(-3, "a/ä.png", b"image")) == (-3, "a/ä.png", b"image")
    for data in (b"", b"1234567", packed_images.record(1, "key", b"")):
        with pytest.raises(ValueError, match="too short"):
            packed_images.parse(data)


@pytest.mark.slow
def test_the_command_packs_on_all_cores(folder, tmp_path):
    command = [sys.executable, "-m", "rae_jax.data.pack", f"--path={folder}", f"--output={tmp_path / 'packed'}"]
    command += [f"--image_size={SIZE}", "--images_per_shard=5", "--num_workers=2", "--encoding=png"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "train: 22 images in 5 shards, 0 skipped" in done.stdout
    assert len(PackedImages(path=tmp_path / "packed", split="train", image_size=SIZE)) == 22
    (folder / "ant" / "003.png").write_bytes(b"")
    command[4] = f"--output={tmp_path / 'other'}"
    refused = subprocess.run(command, capture_output=True, text=True)
    assert refused.returncode == 2 and "003.png" in refused.stderr and "Traceback" not in refused.stderr


@pytest.mark.parametrize("arguments", [("rae_jax.data.pack", "--output=OUTPUT"), ("rae_jax.data.benchmark",)])
def test_commands_name_the_flag_that_is_wrong(tmp_path, arguments):
    module, *flags = (argument.replace("OUTPUT", str(tmp_path / "packed")) for argument in arguments)
    command = [sys.executable, "-m", module, "--path=nowhere", *flags]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: --path='nowhere' does not exist: name a folder")


def test_a_full_disk_is_one_line(folder, tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3_000, limits[1]))
    try:
        with pytest.raises(UserError, match="cannot be written .*: make room, and run the same command"):
            pack(_parts(folder), tmp_path / "packed", **FORM)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    pack(_parts(folder), tmp_path / "packed", **FORM)
    assert len(PackedImages(path=tmp_path / "packed", split="train", image_size=SIZE)) == 22
