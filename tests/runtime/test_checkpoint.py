"""Checkpoints: what stays, what is damaged, what cannot be written, and other meshes."""

import json
import resource
import shutil
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from stress import harness, toy_stage

from rae_jax.errors import UserError
from rae_jax.runtime import checkpoint, checkpoint_manifest, checkpoint_reader, sharding


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The workdir of a run of 8 steps that was left alone."""
    workdir = epath.Path(tmp_path_factory.mktemp("whole"))
    toy_stage.run(workdir, 8)
    return workdir


@pytest.fixture
def begun(tmp_path):
    """The workdir of a run that ended after 6 steps."""
    workdir = epath.Path(tmp_path / "begun")
    toy_stage.run(workdir, 6)
    return workdir


def _folder(workdir):
    return workdir / "checkpoints" / "toy"


def _largest(path):
    """The file with the arrays."""
    return max((p for p in (path / "state").glob("*/d/*")), key=lambda p: p.stat().length)


def _flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


DAMAGE = {
    "truncated": (lambda path: _largest(path).write_bytes(_largest(path).read_bytes()[:-10]), "bytes, not"),
    "a shard missing": (lambda path: _largest(path).unlink(), "is missing"),
    "a bit of an array": (lambda path: _flip(_largest(path)), "differs from the file that was written"),
    "metadata": (lambda path: (path / "state" / "_METADATA").write_text("{]"), "_METADATA has 2 bytes"),
    "data position": (
        lambda path: _flip(path / "data" / "metadata"),
        "data/metadata differs from the file that was written",
    ),
    "manifest": (lambda path: (path / checkpoint_manifest.NAME).write_text("{]"), "manifest.json is not readable"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_newest_one_is_set_aside_and_the_run_ends_the_same(begun, whole, capfd, kind):
    damage, said = DAMAGE[kind]
    damage(_folder(begun) / "6")
    toy_stage.run(begun, 8)
    told = capfd.readouterr().err
    assert "6 is damaged" in told and said in told and "resuming from step 4" in told
    assert (_folder(begun) / "6.damaged").exists()  # nothing is deleted
    assert checkpoint_reader.steps(_folder(begun)) == [4, 6, 8]
    assert harness.differences(begun, whole, ["toy"]) == []


def test_where_all_are_damaged_nothing_begins_anew(begun):
    for step in checkpoint_reader.steps(_folder(begun)):
        DAMAGE["truncated"][0](_folder(begun) / str(step))
    for _ in range(2):  # and not the second time, either
        with pytest.raises(UserError, match="all checkpoints in .* are damaged"):
            toy_stage.run(begun, 8)
    assert checkpoint_reader.steps(_folder(begun)) == []


def test_a_done_stage_that_is_damaged_is_named(begun):
    DAMAGE["a bit of an array"][0](_folder(begun) / "6")
    with pytest.raises(checkpoint_reader.DamagedCheckpoint, match="toy/6 is damaged .*move it away"):
        checkpoint_reader.restore_entries(_folder(begun), 6, {"step": jax.ShapeDtypeStruct((), jnp.int32)})


def test_what_was_half_written_is_not_taken_for_whole(begun, whole):
    unfinished = _folder(begun) / "8.orbax-checkpoint-tmp"
    shutil.copytree(_folder(begun) / "6", unfinished)
    assert checkpoint_reader.latest_step(_folder(begun)) == 6
    toy_stage.run(begun, 8)
    assert not unfinished.exists()
    assert harness.differences(begun, whole, ["toy"]) == []


def test_the_newest_every_so_many_and_the_best_stay(tmp_path):
    scores = {2: 0.1, 4: 0.9, 6: 0.5, 8: 0.2, 10: 0.3, 12: 0.3}
    how = {"evaluate": lambda state, step: {"score": scores[step], "psnr": 1.0}, "evaluate_every": 2, "scored": True}
    toy_stage.run(epath.Path(tmp_path), 12, keep=2, keep_every=6, **how)
    assert checkpoint_reader.steps(_folder(tmp_path)) == [4, 6, 10, 12]
    assert all("eval/score" not in row for row in toy_stage.rows(tmp_path))


def test_the_best_one_is_kept_although_none_is_due(tmp_path):
    scores = {1: 0.5, 2: 0.9, 3: 0.1, 4: 0.2}
    how = {"evaluate": lambda state, step: {"score": scores[step]}, "evaluate_every": 1, "checkpoint_every": 100}
    toy_stage.run(epath.Path(tmp_path), 4, keep=1, scored=True, **how)
    assert checkpoint_reader.steps(_folder(tmp_path)) == [2, 4]


def test_a_score_that_is_no_number_is_not_the_best(tmp_path):
    scores = {1: float("nan"), 2: 0.9, 3: float("inf"), 4: 0.2}
    how = {"evaluate": lambda state, step: {"score": scores[step]}, "evaluate_every": 1, "checkpoint_every": 100}
    toy_stage.run(epath.Path(tmp_path), 4, keep=1, scored=True, **how)
    assert checkpoint_reader.steps(_folder(tmp_path)) == [2, 4]


def test_a_score_is_noted_and_the_checkpoint_stays_whole(begun):
    path = _folder(begun) / "6"
    assert checkpoint_manifest.score(path) is None
    checkpoint_manifest.note_score(path, 0.5)
    assert checkpoint_manifest.score(path) == 0.5 and checkpoint_manifest.damage(path) is None
    (path / checkpoint_manifest.NAME).unlink()
    checkpoint_manifest.note_score(path, 0.7)
    assert checkpoint_manifest.score(path) is None and not (path / checkpoint_manifest.NAME).exists()


def test_a_bucket_s_path_stays_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert str(checkpoint_reader.absolute("gs://bucket/run/checkpoints/dit")) == "gs://bucket/run/checkpoints/dit"
    assert checkpoint_reader.absolute("run") == epath.Path(tmp_path).resolve() / "run"


def test_checkpoints_copied_from_an_object_store_are_whole(begun):
    """Their manifests have sizes alone: the store has checked the rest."""
    path = _folder(begun) / "6" / checkpoint_manifest.NAME
    written = json.loads(path.read_text())
    files = {name: (size, None) for name, (size, _) in written["files"].items()}
    path.write_text(json.dumps({**written, "files": files}))
    assert checkpoint_manifest.damage(path.parent) is None
    DAMAGE["truncated"][0](path.parent)
    assert "bytes, not" in checkpoint_manifest.damage(path.parent)


def test_other_meshes_restore_the_same(tmp_path):
    """8 -> 4 -> 1 devices, and back, split and not."""
    states, workdir = [], epath.Path(tmp_path)
    for number, (data, fsdp) in enumerate([(2, 4), (1, 4), (1, 1), (1, 2), (8, 1)]):
        how = {"checkpoint_every": 1, "keep": 20}
        toy_stage.run(workdir, 4 * number + 3, on=toy_stage.mesh(data, fsdp), **how)
        mesh, shapes = toy_stage.mesh(data, fsdp), jax.eval_shape(toy_stage.stage(1).init, jax.random.key(0))
        placed = sharding.shardings(shapes, mesh)
        abstract = jax.tree.map(lambda s, p: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=p), shapes, placed)
        step = checkpoint_reader.latest_step(_folder(workdir))
        with checkpoint.Checkpoints(_folder(workdir), keep=20) as checkpoints:
            restored = checkpoints.restore(step, abstract, iter(toy_stage.stage(1).batches))
        on_disk = harness.read_state(_folder(workdir) / str(step))
        for name in ("params", "ema_params"):
            np.testing.assert_array_equal(restored[name]["kernel"], on_disk[f"['{name}']['kernel']"])
        np.testing.assert_array_equal(
            restored["opt_state"][0].mu["kernel"], on_disk["['opt_state'][0]['mu']['kernel']"]
        )
        states.append(int(restored["step"]))
    assert states == [3, 7, 11, 15, 19]


def _no_file_above(size):
    """As on a full disk: every write beyond so many bytes fails."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def test_a_checkpoint_that_cannot_be_written_is_tried_again(tmp_path, whole, capsys):
    """Training goes on, the older ones stay, and nothing is lost when there is room again."""
    workdir, newest = epath.Path(tmp_path), []

    def seen(step):
        if step == 3:
            while checkpoint_reader.latest_step(_folder(workdir)) is None:
                time.sleep(0.01)
            _no_file_above(100)
        if step == 6:
            newest.append(checkpoint_reader.latest_step(_folder(workdir)))
            _no_file_above(resource.RLIM_INFINITY)
        return {}

    try:
        how = {"evaluate": lambda state, step: seen(step) or {"x": 1.0}, "evaluate_every": 1}
        toy_stage.run(workdir, 8, on_error="continue", **how)
    finally:
        _no_file_above(resource.RLIM_INFINITY)
    told = capsys.readouterr().err
    assert (
        "the checkpoint of step 4 cannot be written (File too large)" in told
        and "training continues" in told
        and newest == [2]
    )
    assert "metrics/toy.jsonl cannot be written" in told and "no line is lost" in told
    assert checkpoint_reader.latest_step(_folder(workdir)) == 8
    assert [row for row in toy_stage.rows(workdir) if "loss" in row] == toy_stage.rows(whole)


def test_it_stops_when_it_is_asked_to(tmp_path, capsys):
    workdir = epath.Path(tmp_path)
    toy_stage.run(workdir, 2)
    try:
        _no_file_above(1000)
        with pytest.raises(
            UserError,
            match="the checkpoint of step 4 cannot be written .* run the same command again; last good .*toy/2$",
        ):
            toy_stage.run(workdir, 8, log_every=100)
    finally:
        _no_file_above(resource.RLIM_INFINITY)
    assert checkpoint_reader.steps(_folder(workdir)) == [2]
    found = json.loads((_folder(workdir) / "2" / checkpoint_manifest.NAME).read_text())
    assert found["files"]["data/metadata"][0] > 0


def test_a_state_that_is_donated_at_once_is_written_as_it_was(tmp_path):
    """The write reads what the next step would overwrite."""
    state = {"step": jnp.int32(0), "kernel": jnp.zeros((512, 2048))}
    add = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)
    iterator = iter(toy_stage.stage(1).batches)
    with checkpoint.Checkpoints(tmp_path, keep=100) as checkpoints:
        for step in range(1, 7):
            state = add(state)
            checkpoints.save(step, state, iterator)
            for _ in range(5):
                state = add(state)
    for step in range(1, 7):
        found = harness.read_state(epath.Path(tmp_path) / str(step))
        assert (found["['kernel']"] == 6 * step - 5).all()


def test_the_last_checkpoint_is_written_before_the_last_evaluation(tmp_path):
    workdir, seen = epath.Path(tmp_path), []

    def killed(state, step):
        seen.append((step, checkpoint_reader.latest_step(_folder(workdir))))
        raise KeyboardInterrupt

    how = {"evaluate_every": 4, "checkpoint_every": 100, "scored": True}
    with pytest.raises(KeyboardInterrupt):
        toy_stage.run(workdir, 4, evaluate=killed, **how)
    assert seen == [(4, 4)]
    toy_stage.run(workdir, 4, evaluate=lambda state, step: {"x": 1.0, "score": 2.0}, **how)
    assert toy_stage.rows(workdir)[-1] == {"step": 4, "eval/x": 1.0}
    assert checkpoint_manifest.score(_folder(workdir) / "4") == 2.0
    whole = epath.Path(tmp_path) / "whole"
    toy_stage.run(whole, 4, evaluate=lambda state, step: {"x": 1.0, "score": 3.0}, **how)
    assert checkpoint_manifest.score(_folder(whole) / "4") == 3.0


def test_a_partial_checkpoint_that_cannot_be_removed_does_not_stop_the_next_one(tmp_path, monkeypatch, capsys):
    """Such as one with a file that another program holds open on a network disk."""
    workdir = epath.Path(tmp_path)
    partial = _folder(workdir) / "4.orbax-checkpoint-tmp"
    (partial / "state").mkdir(parents=True)
    rmtree, broken = type(partial).rmtree, True

    def refused(path, *arguments, **options):
        if broken and (path.name.startswith(".discarded-") or path == partial):
            raise OSError(16, "Device or resource busy")
        return rmtree(path, *arguments, **options)

    monkeypatch.setattr(type(partial), "rmtree", refused)
    toy_stage.run(workdir, 4)
    assert checkpoint_reader.steps(_folder(workdir)) == [2, 4]
    assert "cannot remove the partial checkpoint" in capsys.readouterr().err
    assert [path for path in _folder(workdir).iterdir() if path.name.startswith(".discarded-")]
    broken = False
    toy_stage.run(workdir, 6)
    assert not [path for path in _folder(workdir).iterdir() if path.name.startswith(".discarded-")]
