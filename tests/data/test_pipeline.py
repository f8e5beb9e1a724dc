"""Order, sharing out and resuming of batches; what becomes of images that cannot be read."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from numbers_source import Numbers

from rae_jax.data import pipeline
from rae_jax.errors import UserError
from rae_jax.runtime import checkpoint, logs


def _training(source=None, *, batch_size=8, seed=3, process=(0, 1), num_threads=2, **options):
    options = {"random_crop": True, "flip": True, **options}
    source = Numbers() if source is None else source
    return pipeline.training_batches(
        source,
        **{"batch_size": batch_size, "seed": seed, "num_threads": num_threads, **options},
        rows=_rows(batch_size, *process),
    )


def _rows(batch_size, index, count):
    """The rows of a process, where its devices follow each other."""
    return range(batch_size)[index * batch_size // count : (index + 1) * batch_size // count]


def _take(batches, count):
    iterator = iter(batches)
    return [next(iterator) for _ in range(count)]


def _joined(parts):
    """Global batches from the processes' parts of them."""
    return [{key: np.concatenate([part[key] for part in step]) for key in step[0]} for step in zip(*parts, strict=True)]


def _assert_same(ours, theirs):
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        assert one.keys() == other.keys()
        for key in one:
            np.testing.assert_array_equal(one[key], other[key])


@pytest.mark.parametrize("processes", [1, 2, 4])
@pytest.mark.parametrize("num_images", [8, 30, 47])
def test_each_epoch_shows_each_image_at_most_once(num_images, processes):
    steps, source = num_images // 8, Numbers(num_images)
    parts = [_take(_training(source, process=(p, processes)), 3 * steps) for p in range(processes)]
    labels = np.stack([batch["label"] for batch in _joined(parts)]).reshape(3, steps * 8)
    for epoch in labels:
        assert len(set(epoch)) == steps * 8 and set(epoch) <= set(range(num_images))
    assert len({tuple(epoch) for epoch in labels}) == 3


def test_what_is_left_over_is_not_always_the_same():
    labels = np.stack([batch["label"] for batch in _take(_training(Numbers(9)), 20)])
    left_over = [set(range(9)) - set(epoch) for epoch in labels]
    assert len(set.union(*left_over)) > 4


@pytest.mark.parametrize("processes", [2, 4])
def test_global_batches_do_not_depend_on_processes_and_threads(processes):
    whole = _take(_training(), 12)
    parts = [_take(_training(process=(p, processes), num_threads=p), 12) for p in range(processes)]
    _assert_same(_joined(parts), whole)


def test_flips_and_crops_depend_on_seed_epoch_and_index_alone():
    """So another batch size, which puts an image into another row of another batch, leaves them alone."""

    def epoch_of(batch_size):
        batches = _take(_training(Numbers(24), batch_size=batch_size), 2 * 24 // batch_size)
        images = np.concatenate([batch["image"] for batch in batches])
        labels = np.concatenate([batch["label"] for batch in batches])
        return [{label: images[24 * e + i] for i, label in enumerate(labels[24 * e : 24 * e + 24])} for e in (0, 1)]

    ours, theirs = epoch_of(8), epoch_of(4)
    for epoch in (0, 1):
        for label in range(24):
            np.testing.assert_array_equal(ours[epoch][label], theirs[epoch][label])
    assert any((ours[0][label] != ours[1][label]).any() for label in range(24))


def test_half_of_the_images_are_mirrored_left_to_right():
    """The first half of the rows is dark, the left column too: no other turn makes the same."""
    image = np.zeros((4, 6, 3), np.uint8)
    image[2:] = np.arange(18).reshape(6, 3)

    class Same:
        def __len__(self):
            return 400

        def __getitem__(self, index):
            return {"image": image, "label": np.int32(index)}

    how = {"batch_size": 400, "seed": 0, "random_crop": False, "flip": True, "num_threads": 0}
    (batch,) = _take(pipeline.training_batches(Same(), **how), 1)
    mirrored = (batch["image"] == image[:, ::-1]).all((1, 2, 3))
    assert (mirrored | (batch["image"] == image).all((1, 2, 3))).all()
    assert 160 < mirrored.sum() < 240  # four deviations


def test_interrupted_anywhere_it_goes_on_with_the_next_batch():
    whole = _take(_training(batch_size=4), 16)  # more than two epochs
    rng = np.random.default_rng(0)
    for stop in rng.integers(0, 16, 20):
        iterator = iter(_training(batch_size=4, num_threads=int(rng.integers(3))))
        for _ in range(stop):
            next(iterator)
        state = iterator.get_state()
        again = iter(_training(batch_size=4, num_threads=int(rng.integers(3))))
        again.set_state(state)
        _assert_same([next(again) for _ in range(16 - stop)], whole[stop:])


def test_a_checkpoint_of_one_process_is_gone_on_from_by_two(tmp_path):
    whole = _take(_training(), 12)
    iterator = iter(_training())
    for _ in range(5):
        next(iterator)
    with checkpoint.Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(5, {"step": jnp.int32(5)}, iterator)
    parts = []
    for process in (0, 1):
        again = iter(_training(process=(process, 2)))
        with checkpoint.Checkpoints(tmp_path, keep=1) as checkpoints:
            checkpoints.restore(5, {"step": jnp.int32(0)}, again)
        parts.append([next(again) for _ in range(7)])
    _assert_same(_joined(parts), whole[5:])


@pytest.mark.parametrize("other", [{"source": Numbers(31)}, {"batch_size": 10}, {"seed": 4}])
def test_a_position_in_other_data_is_refused(other):
    with pytest.raises(UserError, match="num_images=30|batch_size=8|seed=3"):
        iter(_training(**other)).set_state(iter(_training()).get_state())


@pytest.mark.parametrize("processes", [1, 2, 4])
@pytest.mark.parametrize("num_images", [30, 32])
def test_a_pass_counts_every_image_once(num_images, processes):
    source, options = Numbers(num_images), {"batch_size": 8, "num_threads": 2}
    parts = [list(pipeline.one_pass(source, rows=_rows(8, p, processes), **options)) for p in range(processes)]
    batches = _joined(parts)
    mask = np.concatenate([batch["mask"] for batch in batches]) > 0
    np.testing.assert_array_equal(np.concatenate([batch["label"] for batch in batches])[mask], range(num_images))
    assert len(batches) == pipeline.num_batches(source, 8)


def test_a_broken_image_stops_or_is_skipped_and_reported(capfd):
    broken = Numbers(broken=(5, 17))
    with pytest.raises(UserError, match="image (5|17) is broken"):
        _take(_training(broken), 3)
    skipping = [_take(_training(broken, on_error="skip", num_threads=t), 6) for t in (0, 2)]
    _assert_same(*skipping)
    whole = _take(_training(), 6)
    labels, expected = (np.concatenate([b["label"] for b in batches]) for batches in (skipping[0], whole))
    places = np.isin(expected, (5, 17))
    assert places.any() and not np.isin(labels, (5, 17)).any()
    np.testing.assert_array_equal(labels[~places], expected[~places])
    said = [line for line in capfd.readouterr().err.splitlines() if line.startswith("skipped: image")]
    assert len(said) == 2 * places.sum() and said[-1].endswith(f"({places.sum()} so far)")


def test_a_pass_leaves_out_what_is_broken(capfd):
    broken, options = Numbers(10, broken=(0, 5)), {"batch_size": 4, "num_threads": 2}
    with pytest.raises(UserError, match="image 0 is broken"):
        list(pipeline.one_pass(broken, **options))
    batches = list(pipeline.one_pass(broken, on_error="skip", **options))
    seen = np.concatenate([batch["label"][batch["mask"] > 0] for batch in batches])
    assert list(seen) == [1, 2, 3, 4, 6, 7, 8, 9]
    assert "image 5 is broken (2 so far)" in capfd.readouterr().err


def test_where_nothing_can_be_read_it_stops():
    with pytest.raises(UserError, match="10 images in a row"):
        _take(_training(Numbers(broken=range(30)), on_error="skip"), 1)
    with pytest.raises(UserError, match="none of the images"):
        list(pipeline.one_pass(Numbers(4, broken=range(4)), batch_size=4, num_threads=0, on_error="skip"))


@pytest.mark.slow
def test_workers_read_the_same_and_a_killed_one_is_reported():
    """Two processes that read: the same batches, also after a restart; the broken image is named; and a kill."""
    whole = _take(_training(), 8)
    iterator = iter(_training(num_workers=2, num_threads=1))
    _assert_same([next(iterator) for _ in range(4)], whole[:4])
    state = iterator.get_state()
    iterator.close()
    iterator.set_state(state)
    _assert_same([next(iterator) for _ in range(4)], whole[4:])
    for worker in multiprocessing.active_children():
        os.kill(worker.pid, signal.SIGKILL)
    began = time.monotonic()
    with pytest.raises(UserError, match="a worker process that reads data is gone"):
        for _ in range(20):
            next(iterator)
    assert time.monotonic() - began < 60
    iterator.close()
    with pytest.raises(UserError, match="image 3 is broken"):
        _take(_training(Numbers(broken=(3,)), num_workers=1), 4)


@pytest.mark.slow
def test_a_run_whose_worker_is_killed_ends_in_one_line_and_goes_on(tmp_path):
    """The whole command, with two processes that read."""
    command = [sys.executable, "-m", "rae_jax.main", "--config=configs/small.py", f"--workdir={tmp_path / 'run'}"]
    command += ["--config.stages=('judge',)", "--config.judge.widths=(8,)", "--config.data.num_workers=2"]
    command += ["--config.checkpoint.every=5", "--config.log_every=1", "--config.judge.train.num_steps=100000"]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    options = {"cwd": Path(__file__).parents[2], "env": environment, "stderr": subprocess.PIPE, "text": True}
    metrics = tmp_path / "run" / "metrics" / "judge.jsonl"
    steps = []
    for _ in range(2):  # the second one goes on where the first was left
        run = subprocess.Popen(command, **options)
        while len(logs.read(metrics)) < 12 + len(steps):
            assert run.poll() is None, run.stderr.read()
            time.sleep(0.2)
        children = [c for f in Path(f"/proc/{run.pid}/task").glob("*/children") for c in f.read_text().split()]
        workers = [int(c) for c in children if b"spawn_main" in Path(f"/proc/{c}/cmdline").read_bytes()]
        assert len(workers) == 2
        os.kill(workers[1], signal.SIGKILL)
        said = run.communicate(timeout=100)[1]
        assert run.returncode == 2, said
        errors = [line for line in said.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1 and "a worker process that reads data is gone" in errors[0], said
        assert "Traceback" not in said
        steps = [row["step"] for row in logs.read(metrics)]
        assert steps == list(range(1, len(steps) + 1))
    assert "resuming from step" in said


def test_a_checkpoint_without_its_position_is_named(tmp_path):
    """As earlier versions wrote them, with a file for each process."""
    with checkpoint.Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(5, {"step": jnp.int32(5)}, iter(_training()))
    for file in (tmp_path / "5" / "data").iterdir():
        file.rename(file.with_name("process_0-of-1.json"))
    with (
        checkpoint.Checkpoints(tmp_path, keep=1) as checkpoints,
        pytest.raises(UserError, match=f"{tmp_path}/5 is not a whole checkpoint"),
    ):
        checkpoints.restore(5, {"step": jnp.int32(0)}, iter(_training()))
