"""A run remembers: its workdir alone names config and weights, on other devices, with its data in another place."""

import json
import os
import pwd
import shutil
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import random_like, tiny
from etils import epath
from PIL import Image
from xla_flags import EIGHT_DEVICES, FAST_COMPILE

from rae_jax import convert, main
from rae_jax.build import data as build_data
from rae_jax.build import objectives
from rae_jax.cli import results, train
from rae_jax.config import command_flag, machine, run_config
from rae_jax.config import keys as config_keys
from rae_jax.data.shapes import Shapes
from rae_jax.errors import UserError
from rae_jax.inference import sample_files
from rae_jax.runtime import checkpoint, sharding
from rae_jax.ui import report

ROOT = Path(__file__).parents[2]


class _AllRead:
    """The position of a stage that has read all images."""

    def get_state(self):
        return {"position": 6, "batch_size": 16, "num_images": 95}


def _config(path):
    config = tiny()
    config.data.update({"source": "image_folder", "path": str(path)})
    config.evaluate.update({"num_images": 12, "batch_size": 8})
    return config


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A folder of class folders, ten shapes of ten images."""
    folder, source = tmp_path_factory.mktemp("images"), Shapes(split="train", num_images=100, image_size=32, seed=0)
    for i in range(100):
        example = source[i]
        file = folder / source.class_names[int(example["label"])] / f"{i}.png"
        file.parent.mkdir(exist_ok=True)
        Image.fromarray(example["image"]).save(file)
    return folder


@pytest.fixture(scope="module")
def finished(images, tmp_path_factory):
    """The workdir of a run of all stages with random weights, whose data has been moved away since."""
    workdir, config = epath.Path(tmp_path_factory.mktemp("runs")) / "run", _config(images / "moved")
    run_config.save(config, workdir)
    for stage in config_keys.STAGES:
        init, _ = objectives.init_and_step(config, stage)
        shapes = jax.eval_shape(init, jax.random.key(0))
        state = random_like(shapes, seed=1, scale=0.1)
        if stage == "statistics":
            state = jax.tree.map(lambda leaf: np.abs(leaf) + 10.0, state)
        state["step"] = np.int32(6)
        with checkpoint.Checkpoints(workdir / "checkpoints" / stage, keep=1) as checkpoints:
            checkpoints.save(6, jax.tree.map(jax.numpy.asarray, state), _AllRead())
    data = build_data.identity(build_data.source(_config(images), "train"))
    (workdir / "inputs.json").write_text(json.dumps({"data": data, "weights": {}}))
    return workdir


def _command(*arguments, module="rae_jax.main", devices=None, cwd=ROOT, **environment):
    flags = f"{EIGHT_DEVICES if devices is None else EIGHT_DEVICES.replace('8', str(devices))} {FAST_COMPILE}"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": flags, **environment}
    command = [sys.executable, "-m", module, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment, timeout=300)


def test_a_workdir_alone_names_the_config(finished, monkeypatch):
    for given in ([f"--workdir={finished}"], ["--workdir", str(finished)], [f"-workdir={finished}"]):
        argv = ["main", *given, "--mode=sample"]
        assert command_flag._with_config_of_run(argv) == ["main", f"--config={finished}/config.json", *argv[1:]]
    for given in (["--config=small", f"--workdir={finished}"], [f"--workdir={finished / 'none'}"], ["--workdir="], []):
        assert command_flag._with_config_of_run(["main", *given]) == ["main", *given]
    found = command_flag.FlagParser().parse(f"{finished}/config.json")
    assert found.to_dict() == _config(found.data.path).to_dict() and found.is_locked
    monkeypatch.setenv("HOME", str(finished.parent))
    assert f"--config={finished}/config.json" in command_flag._with_config_of_run(
        ["main", f"--workdir=~/{finished.name}"]
    )


@pytest.mark.parametrize("kind", ["weights", "another program", "a truncated file"])
def test_a_folder_that_holds_no_run_names_no_config(finished, tmp_path, kind):
    """Otherwise the weights that its config names, such as the shipped ones, would be taken for the folder's own."""
    if kind == "weights":
        convert.export(finished, tmp_path, parts=["dit"])
    else:
        (tmp_path / "config.json").write_text('{"hidden_size": 768}' if kind == "another program" else '{"encoder": ')
    words = "truncated or not JSON" if kind == "a truncated file" else "not a run: name a config by --config"
    with pytest.raises(UserError, match=words):
        command_flag.FlagParser().parse(f"{tmp_path}/config.json")


def test_it_samples_on_fewer_devices_than_it_was_trained_on(finished, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(finished, workdir)
    saved = json.loads((workdir / "config.json").read_text())
    saved["mesh"] = {"data": 8, "fsdp": 1, "tensor": 1}
    (workdir / "config.json").write_text(json.dumps(saved))
    done = _command(f"--workdir={workdir}", "--mode=sample", "--num_images=12", "--config.seed=7", devices=6)
    assert done.returncode == 0, done.stderr
    assert "does not fit the 6 devices here: all are used" in done.stderr
    assert len(list((workdir / "samples" / "images").glob("*.png"))) == 12
    refused = _command(f"--workdir={workdir}", "--mode=sample", "--config.mesh.data=5", devices=6)
    assert refused.returncode == 2 and "config.mesh.data=5" in refused.stderr
    wrong = _command(f"--workdir={workdir}", "--mode=sample", "--config.dit.width=32", devices=6)
    assert wrong.returncode == 2 and "holds a run with config.dit.width=16, not 32" in wrong.stderr


@pytest.mark.slow
def test_killed_sampling_resumes_with_other_threads_mesh_and_batch_to_the_same_bytes(finished, tmp_path):
    command = ["--mode=sample", "--num_images=96", "--config.sampler.num_steps=20"]
    for name in ("whole", "killed"):
        shutil.copytree(finished, tmp_path / name)
    whole = _command(f"--workdir={tmp_path / 'whole'}", *command, "--config.evaluate.batch_size=8", devices=2)
    assert whole.returncode == 0, whole.stderr
    folder = tmp_path / "killed" / "samples" / "images"
    arguments = [sys.executable, "-m", "rae_jax.main", f"--workdir={tmp_path / 'killed'}", *command]
    environment = {**os.environ, "XLA_FLAGS": f"{EIGHT_DEVICES.replace('8', '2')} {FAST_COMPILE}"}
    process = subprocess.Popen([*arguments, "--config.evaluate.batch_size=8"], cwd=ROOT, env=environment)
    while len(list(folder.glob("*.png"))) < 16 and process.poll() is None:
        time.sleep(0.01)
    process.kill()
    process.wait()
    left = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.png")}
    assert 16 <= len(left) < 96
    other = ["--config.data.num_threads=0", "--config.mesh.fsdp=2", "--config.evaluate.batch_size=48"]
    resumed = _command(f"--workdir={tmp_path / 'killed'}", *command, *other, devices=4)
    assert resumed.returncode == 0, resumed.stderr
    found, wanted = (
        {p.name: p.read_bytes() for p in (tmp_path / n / "samples" / "images").glob("*.png")}
        for n in ("killed", "whole")
    )
    assert found == wanted and len(found) == 96
    assert {name: (folder / name).stat().st_mtime_ns for name in left} == left
    archives = [np.load(tmp_path / name / "samples" / "samples.npz")["arr_0"] for name in ("killed", "whole")]
    np.testing.assert_array_equal(*archives)


def test_the_run_s_own_mesh_and_kernel_are_adapted_but_not_those_of_the_command(tmp_path):
    config = tiny()
    config.mesh.update({"data": 2, "fsdp": 6})
    config.attention, config.dtype = "cudnn", "bfloat16"
    run_config.save(config, tmp_path)
    found = machine.adapted(config, tmp_path)
    assert found.mesh.to_dict() == {"data": -1, "fsdp": -1, "tensor": 1} and found.attention == "xla"
    assert sharding.make_mesh(found.mesh).size == 8
    config.mesh.fsdp = 5
    assert machine.adapted(config, tmp_path).mesh.to_dict() == {"data": 2, "fsdp": 5, "tensor": 1}
    config.attention = "flash"
    assert machine.adapted(config, tmp_path).attention == "flash"


@pytest.mark.slow
def test_every_mode_takes_the_workdir_alone(finished, images, tmp_path):
    """Evaluation and training also need the data, which lies elsewhere now."""
    workdir, moved = tmp_path / "run", f"--config.data.path={images}"
    shutil.copytree(finished, workdir)
    for arguments in (["--mode=sample", "--num_images=10"], ["--mode=reconstruct", f"--images={images}"]):
        done = _command(f"--workdir={workdir}", *arguments)
        assert done.returncode == 0, done.stderr
    refused = _command(f"--workdir={workdir}", "--mode=evaluate")
    assert refused.returncode == 2 and "moved' does not exist: name a folder" in refused.stderr
    for mode in ("evaluate", "train"):
        done = _command(f"--workdir={workdir}", f"--mode={mode}", moved)
        assert done.returncode == 0, done.stderr
    assert json.loads((workdir / "config.json").read_text())["data"]["path"] == str(images)
    (tmp_path / "less").mkdir()
    shutil.copytree(images, tmp_path / "less", dirs_exist_ok=True)
    next((tmp_path / "less").glob("*/*.png")).unlink()
    refused = _command(f"--workdir={workdir}", f"--config.data.path={tmp_path / 'less'}")
    assert refused.returncode == 2 and "holds a run on other data than config.data.path=" in refused.stderr
    for module, arguments in (("rae_jax.convert", [f"--output={tmp_path / 'w'}"]), ("rae_jax.report", [])):
        done = _command(f"--workdir={workdir}", *arguments, module=module)
        assert done.returncode == 0, done.stderr


def test_names_of_classes_come_from_the_run_s_record(finished):
    config = run_config.complete(run_config.read_json(finished / "config.json"))
    assert results.held_out(config) is None
    assert list(results.class_names(config, finished)) == sorted(Shapes.class_names)


def test_other_data_and_other_weights_are_refused_before_anything_is_written(finished, images, tmp_path):
    config = _config(images)
    source = build_data.source(config, "train")
    assert build_data.identity(source) == json.loads((finished / "inputs.json").read_text())["data"]
    shutil.copytree(images, tmp_path / "other")
    first = sorted((tmp_path / "other").glob("*/*.png"))[1]
    first.rename(first.with_name("renamed.png"))
    config.data.path = str(tmp_path / "other")
    before = {path: path.read_bytes() for path in finished.glob("*.json")}
    with pytest.raises(
        UserError, match=r"on other data than config.data.path='.*other': 95 images of 10 classes, names"
    ):
        train.in_workdir(config, finished, sharding.make_mesh(config.mesh), None)
    assert {path: path.read_bytes() for path in finished.glob("*.json")} == before


def test_an_encoder_alone_is_trained_without_the_weights_that_only_an_evaluation_needs(tmp_path):
    config = tiny()
    config.update({"stages": ("encoder",)})
    config.data.num_classes = 10
    config.judge.widths = (32, 64)
    config.encoder = type(config)(run_config.complete({}).encoder.to_dict())
    config.decoder = type(config)(run_config.complete({}).decoder.to_dict())
    with pytest.raises(
        UserError, match=r"config.judge.weights='small': .*; or evaluate without it: --config.judge.weig"
    ):
        train.run(config, epath.Path(tmp_path), sharding.make_mesh(config.mesh), None)
    assert not (tmp_path / "metrics").exists()


@pytest.mark.parametrize("kind", ["samples", "samples of another request"])
def test_samples_are_evaluated_without_the_picture_of_all(tmp_path, kind):
    from rae_jax.data import decode

    (tmp_path / "config.json").write_text("{}")
    folder = tmp_path / "samples" if kind == "samples" else tmp_path / "samples" / "1234abcd"
    (folder / "images").mkdir(parents=True)
    for name in ("images/000000.png", "images/000001.png", "sampled.png"):
        Image.new("RGB", (8, 8)).save(folder / name)
    if kind == "samples":
        with pytest.raises(UserError, match="samples holds pictures of several images each: run --mode=sample first"):
            decode.find_images(folder)
    (folder / "images" / "request.json").write_text("{}")
    assert [file.name for file in decode.find_images(folder)] == ["000000.png", "000001.png"]
    assert sample_files._read_request(folder) is None


@pytest.mark.parametrize(
    "arguments, environment, status, words",
    [
        ([], {}, 2, "rae-jax --workdir=runs/first --mode=sample"),
        (["--workdir=~/run", "--mode=sample"], {}, 2, "name a config, such as small, or its file; or set --workdir to"),
        (["--config=small", "--workdir=", "--mode=sample"], {}, 2, "set --workdir=DIR"),
        (
            ["--config=small", "--workdir=~/run"],
            {"JAX_PLATFORMS": "cuda"},
            2,
            "JAX_PLATFORMS='cuda' cannot work here (",
        ),
        (["--config=mine.py", "--workdir=~/run"], {}, 2, "mine.py: line 2: ImportError: cannot import name 'base'"),
        (["--config=small", "--workdir=~/run", "--config.seed=-1"], {}, 2, "config.seed=-1 cannot work"),
        (["--config=small", "--workdir=~/run", "--config.data.path=~/x", "--config.data.source=image_folder"],)
        + ({}, 2, "config.data.path='~/x' does not exist"),
    ],
)
def test_mistakes_are_one_line_and_nothing_is_written(tmp_path, arguments, environment, status, words):
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "__init__.py").write_text("base = 1\n")
    (tmp_path / "mine.py").write_text("\nfrom configs import base, small\nget_config = small.get_config\n")
    before = sorted(tmp_path.rglob("*"))
    done = _command(*arguments, cwd=tmp_path, HOME=str(tmp_path), **environment)
    assert done.returncode == status and words in done.stderr, done.stderr
    assert done.stderr.count("\n") == (15 if not arguments else 1), done.stderr
    assert [p for p in sorted(tmp_path.rglob("*")) if "__pycache__" not in str(p)] == before


def test_a_user_without_a_name_converts_and_reports(finished, tmp_path, monkeypatch):
    """As in a container that runs with a user id of its own."""

    def unknown(uid):
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    workdir = tmp_path / "run"
    shutil.copytree(finished, workdir)
    sizes = convert.export(workdir, tmp_path / "weights")
    assert all(size > 1000 for size in sizes.values())
    folder = workdir / "samples" / "dit"
    folder.mkdir(parents=True)
    for step in (3, 6):
        Image.new("RGB", (8, 8)).save(folder / f"{step:07d}_samples.png")
    assert report.write_report(workdir).exists()


def test_the_home_directory_is_found_in_every_path(finished, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(finished.parent))
    done = _command("--workdir=~/run", "--output=~/weights", "--parts=dit", module="rae_jax.convert")
    assert done.returncode == 0, done.stderr
    assert (finished.parent / "weights" / "dit.safetensors").exists() and not (ROOT / "~").exists()
    config = convert._config_of(finished)
    config.dit.weights, config.stages = "~/weights", ()
    from rae_jax.build import part_weights

    assert "trunk" in part_weights.load(config, "dit", None, sharding.make_mesh(config.mesh))
    assert main.USAGE.count("\n") == 15
