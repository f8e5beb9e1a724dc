"""The real loop, all stages, on eight simulated devices: from nothing, interrupted, and on other meshes."""

import json
import os
import re
import shutil
import signal
import types

import jax
import numpy as np
import pytest
from conftest import random_like, tiny
from etils import epath
from PIL import Image
from stress import harness

import rae_jax
from rae_jax import convert
from rae_jax.build import data as build_data
from rae_jax.build import models, part_weights
from rae_jax.cli import evaluate, reconstruct, sample, train
from rae_jax.cli import results as cli_results
from rae_jax.config import checks, run_config
from rae_jax.errors import UserError
from rae_jax.runtime import checkpoint_reader, logs, sharding
from rae_jax.runtime.health import DivergedRun
from rae_jax.training.loop import InterruptedRun
from rae_jax.weights import safetensors_tree

STAGES = ("encoder", "judge", "decoder", "statistics", "dit")


def _train(config, workdir):
    mesh = sharding.make_mesh(config.mesh)
    checks.check(config, mesh)
    run_config.check(config, workdir, *config.stages)
    train.run(config, workdir, mesh, None)


def _rows(workdir, stage):
    return harness.without_perf(logs.read(workdir / "metrics" / f"{stage}.jsonl"))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The workdir of a whole uninterrupted run."""
    workdir = epath.Path(tmp_path_factory.mktemp("run"))
    _train(tiny(), workdir)
    return workdir


def test_a_run_leaves_what_the_design_says(run):
    assert len(jax.devices()) == 8
    assert json.loads((run / "config.json").read_text())["name"] == "tiny"
    for stage in STAGES:
        rows = logs.read(run / "metrics" / f"{stage}.jsonl")
        assert [row["step"] for row in rows] == list(range(1, 7))
        assert all(np.isfinite(value) for row in rows for value in row.values())
        assert {"perf/steps_per_second", "perf/data_wait"} <= rows[0].keys()
        assert checkpoint_reader.latest_step(run / "checkpoints" / stage) == 6
    results = json.loads((run / "eval" / "tiny.json").read_text())
    assert {"psnr", "ssim", "fd", "fd_real", "agreement", "judge_accuracy"} <= results.keys()
    assert "reconstructions" in (run / "report.html").read_text()
    assert Image.open(run / "samples" / "samples.png").width > 100


def test_the_adversarial_parts_start_when_they_should(run):
    rows = _rows(run, "decoder")  # row n is made from the state after n - 1 steps
    assert [row["discriminator"] != 0 for row in rows] == [False, False, True, True, True, True]
    assert [row["adversarial_weight"] != 0 for row in rows] == [False, False, False, True, True, True]


def test_statistics_are_those_of_the_latents(run):
    config = tiny()
    mesh = sharding.make_mesh(config.mesh)
    parts = {name: part_weights.load(config, name, run, mesh) for name in ("encoder", "statistics")}
    source = build_data.source(config, "train")
    images = np.stack([source[i]["image"] for i in range(len(source))]) / np.float32(255)
    latents = np.asarray(models.autoencoder(config).encode(parts["encoder"], images), np.float64)
    np.testing.assert_allclose(parts["statistics"]["mean"], latents.mean(0), atol=1e-6)
    np.testing.assert_allclose(parts["statistics"]["var"], latents.var(0), rtol=1e-5, atol=1e-6)


def test_a_finished_run_is_not_run_again(run):
    before = {stage: _rows(run, stage) for stage in STAGES}
    _train(tiny(), run)
    assert before == {stage: _rows(run, stage) for stage in STAGES}


def test_interrupted_anywhere_it_ends_the_same(run, tmp_path, monkeypatch):
    workdir = epath.Path(tmp_path)
    write = logs.Metrics.write
    interrupted = set()

    def write_then_interrupt(self, step, values):
        write(self, step, values)
        if step == 3 and self._path.stem not in interrupted:
            interrupted.add(self._path.stem)
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(logs.Metrics, "write", write_then_interrupt)
    for stage in STAGES:
        with pytest.raises(InterruptedRun, match=f"step 3 of stage '{stage}'"):
            _train(tiny(), workdir)
        # What a run that was killed later would have left behind, cut off in the middle of a line:
        with (workdir / "metrics" / f"{stage}.jsonl").open("a") as file:
            file.write('{"step": 4, "loss": 7.0}\n{"step": 5, "lo')
    _train(tiny(), workdir)
    for stage in STAGES:
        assert _rows(workdir, stage) == _rows(run, stage)
    for name in STAGES:
        mesh = sharding.make_mesh(tiny().mesh)
        ours, theirs = (part_weights.load(tiny(), name, w, mesh) for w in (workdir, run))
        jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_a_done_stage_that_is_damaged_is_set_aside(run, tmp_path):
    workdir = epath.Path(tmp_path) / "copy"
    shutil.copytree(run, workdir)
    folder = workdir / "checkpoints" / "decoder"
    largest = max((folder / "6" / "state").glob("*/d/*"), key=lambda path: path.stat().length)
    largest.write_bytes(largest.read_bytes()[:-1])
    with pytest.raises(UserError, match="all checkpoints in .*decoder are damaged"):  # it has no older one
        _train(tiny(), workdir)
    assert [path.name for path in folder.iterdir()] == ["6.damaged"]


def test_the_library_and_the_report_read_a_run(run):
    found = {**rae_jax.load_rae(run).params, **rae_jax.load_dit(str(run)).params}
    mesh = sharding.make_mesh(tiny().mesh)
    assert found.keys() == {"encoder", "decoder", "statistics", "dit"}
    for part, params in found.items():
        jax.tree.map(np.testing.assert_array_equal, params, part_weights.load(tiny(), part, run, mesh))
    convert.export(run, run / "converted", parts=["statistics", "dit"])  # what it trained besides is missed there
    jax.tree.map(np.testing.assert_array_equal, rae_jax.load_dit(run / "converted").params["dit"], found["dit"])
    with pytest.raises(UserError, match="config.encoder.weights='' names no weights"):
        rae_jax.load_rae(run / "converted")
    assert "8 x" in (run / "report.html").read_text() and (run / "environment.jsonl").exists()


@pytest.mark.slow
def test_evaluation_in_training_is_the_one_at_the_end(run, tmp_path):
    """The same metrics by the same code, of the averaged weights; and training does not notice it."""
    config = tiny()
    config.stages, config.evaluate.every = ("decoder", "dit"), 3
    workdir = epath.Path(tmp_path)
    for part in ("encoder", "judge", "statistics"):
        config[part].weights = str(tmp_path / "weights")
    convert.export(run, tmp_path / "weights")
    _train(config, workdir)
    end = json.loads((workdir / "eval" / "tiny.json").read_text())
    for stage, names in (("decoder", {"psnr", "ssim"}), ("dit", {"psnr", "ssim", "fd", "fd_real", "agreement"})):
        rows = _rows(workdir, stage)
        found = {row["step"]: row for row in rows if "eval/psnr" in row}
        assert sorted(found) == [3, 6] and {f"eval/{name}" for name in names} <= found[6].keys()
        for name in names:
            assert found[6][f"eval/{name}"] == pytest.approx(end[name], rel=1e-4), name
        assert found[3]["eval/psnr"] != found[6]["eval/psnr"] or stage == "dit"
        assert len(list((workdir / "samples" / stage).glob("0000003_*.png"))) == (1 if stage == "decoder" else 2)
    assert [row for row in _rows(workdir, "decoder") if "loss" in row] == _rows(run, "decoder")
    # A kill during the last evaluation, after the last checkpoint: the next start makes up for the evaluation.
    file = workdir / "metrics" / "decoder.jsonl"
    *kept, last = file.read_text().splitlines(keepends=True)
    assert "eval/psnr" in last
    file.write_text("".join(kept))
    _train(config, workdir)
    assert harness.without_perf(logs.read(file))[-1] == pytest.approx(json.loads(last), rel=1e-4)


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    """One line, not a bad checkpoint, and not a wait of the host for every step."""
    config = tiny()
    config.stages, config.log_every, config.checkpoint.every = ("judge",), 100, 2
    config.decoder.weights = ""
    config.judge.train.update({"learning_rate": 1e30, "num_steps": 20, "warmup_steps": 3, "final_learning_rate": 1e29})
    with pytest.raises(DivergedRun) as stop:
        _train(config, epath.Path(tmp_path))
    said = str(stop.value)
    assert (
        re.match(r"stage 'judge' stopped at step \d+, metrics are not finite: .*loss (nan|inf)", said)
        and "\n" not in said
    )
    kept = checkpoint_reader.latest_step(tmp_path / "checkpoints" / "judge")
    expected = "no checkpoint exists" if kept is None else f"checkpoint: {tmp_path}/checkpoints/judge/{kept}"
    assert said.endswith(expected)
    for row in logs.read(tmp_path / "metrics" / "judge.jsonl"):
        assert all(np.isfinite(value) for value in row.values())


def test_an_average_is_picked(run):
    """config.dit.average names the weights that others use."""
    config = tiny()
    mesh = sharding.make_mesh(config.mesh)
    tables = []
    for average in range(1 + len(config.dit.train.more_ema_decays)):
        config.dit.average = average
        tables.append(np.asarray(part_weights.load(config, "dit", run, mesh)["label_embed"]["table"]))
    assert len(tables) == 3 and len({float(np.abs(table).sum()) for table in tables}) == 3


def test_exported_weights_come_back(run, tmp_path):
    convert.export(run, tmp_path)
    config = tiny()
    mesh = sharding.make_mesh(config.mesh)
    for name in STAGES:
        read = safetensors_tree.read(tmp_path / f"{name}.safetensors", part_weights.shapes(config, name))
        jax.tree.map(np.testing.assert_array_equal, read, part_weights.load(config, name, run, mesh))


def test_a_workdir_may_be_relative(run, monkeypatch):
    monkeypatch.chdir(run.parent)
    config = tiny()
    mesh = sharding.make_mesh(config.mesh)
    ours, theirs = (part_weights.load(config, "judge", workdir, mesh) for workdir in (run.name, run))
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_weights_of_another_model_are_refused(run, tmp_path):
    convert.export(run, tmp_path)
    config = tiny()
    config.decoder.width = 32
    with pytest.raises(UserError, match="an RAE decoder .* width 16, .* needs .* width 32, .*'blocks/.*' has shape"):
        safetensors_tree.read(tmp_path / "decoder.safetensors", part_weights.shapes(config, "decoder"))
    with pytest.raises(UserError, match="lacks tensor"):
        safetensors_tree.read(tmp_path / "judge.safetensors", part_weights.shapes(config, "decoder"))
    (tmp_path / "dit.safetensors").write_bytes((tmp_path / "dit.safetensors").read_bytes()[:1000])
    with pytest.raises(UserError, match="not a whole safetensors file"):
        safetensors_tree.read(tmp_path / "dit.safetensors", part_weights.shapes(config, "dit"))


def test_sample_and_reconstruct(run, tmp_path):
    config = tiny()
    mesh = sharding.make_mesh(config.mesh)
    flags = types.SimpleNamespace(step=None, num_images=20, label=None, labels="balanced", images=None)
    sample.run(config, run, mesh, flags)
    samples = np.load(run / "samples" / "samples.npz")
    assert samples["arr_0"].shape == (20, 32, 32, 3) and samples["arr_0"].dtype == np.uint8
    assert list(samples["arr_1"]) == list(range(10)) * 2
    np.testing.assert_array_equal(Image.open(run / "samples" / "images" / "000013.png"), samples["arr_0"][13])

    config.evaluate.batch_size = 8  # the images do not depend on it
    sample.run(config, run, mesh, flags)
    again = np.load(run / "samples" / "samples.npz")["arr_0"]
    assert np.abs(again.astype(int) - samples["arr_0"]).max() <= 1

    flags.images = str(run / "samples" / "images")
    reconstruct.run(config, run, mesh, flags)
    assert json.loads((run / "eval" / "reconstruct.json").read_text())["num_images"] == 20
    flags.label = 10
    with pytest.raises(UserError, match="labels are 0 to 9"):
        sample.run(config, run, mesh, flags)


@pytest.mark.slow
def test_other_weights_in_the_same_place_draw_other_images(run, tmp_path):
    convert.export(run, tmp_path / "weights")
    config = tiny()
    config.stages = ()
    for part in ("decoder", "statistics", "dit"):
        config[part].weights = str(tmp_path / "weights")
    mesh, workdir = sharding.make_mesh(config.mesh), epath.Path(tmp_path / "work")
    flags = types.SimpleNamespace(step=None, num_images=20, label=None, labels="balanced")
    image = workdir / "samples" / "images" / "000000.png"

    def drawn():
        sample.run(config, workdir, mesh, flags)
        return image.read_bytes(), image.stat().mtime

    first = drawn()
    assert drawn() == first
    shapes = part_weights.shapes(config, "decoder")
    safetensors_tree.write(tmp_path / "weights" / "decoder.safetensors", random_like(shapes, seed=0, scale=0.2))
    assert drawn() == first  # these images stay: the other ones get a folder of their own
    (other,) = (path for path in (workdir / "samples").iterdir() if path.is_dir() and path.name != "images")
    assert (other / "images" / "000000.png").read_bytes() != first[0]


@pytest.mark.slow
def test_an_evaluation_keeps_what_was_found_of_other_weights(run, tmp_path):
    """Numbers of the shipped weights, and of the last step next to an earlier step."""
    workdir = epath.Path(tmp_path / "run")
    shutil.copytree(run, workdir)
    config, results = tiny(), workdir / "eval" / "tiny.json"
    config.evaluate.shipped = True
    before, picture = json.loads(results.read_text()), (workdir / "samples" / "samples.png").read_bytes()
    results.write_text(json.dumps({**{name: 0.5 for name in before}, "trained_fd": 0.0}))  # of other weights
    mesh = sharding.make_mesh(config.mesh)
    evaluate.run(config, workdir, mesh, types.SimpleNamespace(samples=None, step=None))
    after = json.loads(results.read_text())
    assert after.keys() == before.keys() | {f"trained_{name}" for name in before}
    assert after["fd"] == 0.5 and after["trained_fd"] == pytest.approx(before["fd"], rel=1e-4)
    assert cli_results.of_shipped(config, workdir) == {name: 0.5 for name in before}
    (workdir / "eval" / "tiny_6.json").write_text(json.dumps(before))
    config.name = "tiny_6"  # whose results are of one set of weights alone, and nothing says which
    assert cli_results.of_shipped(config, workdir) == {}
    config.name = "tiny"
    evaluate.run(config, workdir, mesh, types.SimpleNamespace(samples=None, step=6))
    assert json.loads(results.read_text()) == after and (workdir / "eval" / "tiny_6.json").exists()
    assert (workdir / "samples" / "samples.png").read_bytes() == picture
    assert (workdir / "samples" / "samples_6.png").exists()


def test_statistics_of_some_images_are_not_taken_for_those_of_all(run, tmp_path):
    workdir = epath.Path(tmp_path / "run")
    shutil.copytree(run / "checkpoints" / "statistics", workdir / "checkpoints" / "statistics")
    ((position,), manifest) = workdir.glob("checkpoints/statistics/6/data/metadata"), "manifest.json"
    position.write_text(json.dumps({**json.loads(position.read_text()), "position": 4}))
    (position.parent.parent / manifest).unlink()  # it would be taken for damaged
    with pytest.raises(UserError, match="statistics of 64 of the 96 images: finish this stage"):
        part_weights.load(tiny(), "statistics", workdir, sharding.make_mesh(tiny().mesh))


def test_another_configs_workdir_is_refused_and_left_alone(run):
    config = tiny()
    config.dit.width = 32
    before = (run / "config.json").read_text()
    with pytest.raises(UserError, match="config.dit.width=16, not 32"):
        _train(config, run)
    assert (run / "config.json").read_text() == before
