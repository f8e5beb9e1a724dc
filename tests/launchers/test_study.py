"""The experiments of configs/study/: consistent plans, verdicts, runs that are interrupted and resumed.

    python -m pytest -m by_hand tests/launchers/test_study.py -k beginning_to_end  # all experiments at size 'fast'
    python -m pytest -m by_hand tests/launchers/test_study.py -k every_seed  # at full size: many minutes

One experiment at size 'fast' is among the slow tests that .ci/run runs.
"""

import dataclasses
import json
import os
import pickle
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
from xla_flags import FAST_COMPILE

from configs.study import base
from launch.study import __main__ as command
from launch.study import plan, pool, verdict, work
from rae_jax.config import checks
from rae_jax.errors import UserError
from rae_jax.runtime import sharding

ROOT = Path(__file__).parents[2]
FOLDER = {"data.source": "image_folder", "data.path": "FOLDER", "data.num_classes": 7}

# Claims that hold in all three seeds of docs/study.md, without those about time.
SHOWN = {
    "width": (
        "width 64 and 128 reach a lower loss than any narrower DiT",
        "twice the depth at width 32 does not bring the loss below (D - d) / D = 0.5",
    ),
    "schedule": (
        "at dimension 16,384 the shift by 2 lowers fd",
        "at dimension 1,024 the shift by 0.5 lowers fd",
    ),
    "noise": (
        "tau = 0.8 lowers psnr against 0",
        "tau = 0.8 raises rfd against 0",
        "tau = 0.4 lowers fd of a barely trained DiT's latents against 0",
    ),
    "head": (
        "head 128 x 1 has a lower fd than the same trunk without",
        "a head as wide as 128 beats one of 64",
    ),
    "vae": (
        "the linear probe reads more from RAE's latents, pooled",
        "and from the whole latents",
    ),
    "encoders": (
        "trained weights reconstruct better than random ones (psnr)",
        "several layers reconstruct better than the last (psnr)",
        "several layers give a lower fd than the last",
        "the linear probe reads more from trained weights, pooled",
    ),
    "guidance": (
        "AutoGuidance at 1.5 lowers fd against none",
        "AutoGuidance at 1.5 has a lower fd than classifier-free guidance at 1.5",
        "classifier-free guidance at 2.5 raises agreement against none",
    ),
}


@pytest.fixture
def one_device(monkeypatch):
    """Give the processes that a test starts one device each."""
    monkeypatch.setenv("XLA_FLAGS", FAST_COMPILE)
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")


def _plan(folder, *, data=None, size="fast", seeds=1, studies=plan.STUDIES):
    return plan.Plan(studies, workdir=folder, data=data or {}, size=size, seeds=seeds)


@pytest.mark.parametrize("size", base.SIZES)
@pytest.mark.parametrize("data", [{}, FOLDER], ids=["shapes", "folder"])
def test_every_run_has_a_valid_config(size, data, tmp_path):
    mesh = sharding.make_mesh(
        {"data": 1, "fsdp": 1, "tensor": 1}, sharding.make_mesh({"data": -1, "fsdp": 1, "tensor": 1}).devices.flat[:1]
    )
    before = set()
    for job in _plan(tmp_path, data=data, size=size).jobs.values():
        assert before.issuperset(job.needs), job.name
        before.add(job.name)
        for changes in job.generators.values() or [{}]:
            config = work.configured({**job.config, **changes})
            if job.kind == "run":
                checks.check(config, mesh)
        assert not any("@" in str(value) for value in job.config.values()), job.name
        assert ("small" in {job.config[f"{part}.weights"] for part in ("encoder", "judge")}) <= (not data), job.name


@pytest.mark.parametrize("name", plan.STUDIES)
def test_comparisons_and_plots_name_existing_variants(name):
    study = plan.read(name)
    assert {"title", "claim", "paper", "config", "sizes", "measure", "columns", "note"} <= study.keys()
    for comparison in study["compare"]:
        for entry in (*comparison["lower"], *comparison["higher"]):
            assert (entry if isinstance(entry, str) else entry[0]) in study["variants"], comparison["says"]
    assert not base.FOUNDATIONS.keys() & study.get("foundations", {}).keys()
    for panel in study["plots"]:
        assert all(v in study["variants"] for of in panel.get("series", {}).values() for v in of)
        assert set(panel.get("bars", ())) <= set(study["variants"])
        for variant, generators in panel.get("lines", {}).values():
            assert set(generators.values()) <= plan.generators_of(study, variant).keys()


def test_a_wrong_flag_is_reported_in_one_line(tmp_path):
    command_line = [sys.executable, "-m", "launch.study", f"--workdir={tmp_path}", "--only=width,depth"]
    done = subprocess.run(command_line, cwd=ROOT, capture_output=True, text=True)
    said = f"error: --only=depth cannot work: choose from {', '.join(plan.STUDIES)}\n"
    assert done.returncode == 2 and done.stderr == said and not any(tmp_path.iterdir())
    with pytest.raises(UserError, match="^--data='nowhere' does not exist: name a folder"):
        command.run([], tmp_path, "fast", 1, 1, "nowhere", False)
    with pytest.raises(UserError, match="^--workdir='/dev/null/study' cannot be used"):
        command.run([], "/dev/null/study", "fast", 1, 1, "", False)


def test_without_matplotlib_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(command.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="matplotlib: pip install"):
        command.run(["width"], tmp_path, "fast", 1, 1, "", False)


def test_results_on_other_foundations_are_neither_used_nor_overwritten(tmp_path, monkeypatch):
    foundations = base.FOUNDATIONS["weak"]["config"]
    first = _plan(tmp_path, studies=["reuse"]).jobs["reuse/50_steps/seed_0"]
    first.workdir.mkdir(parents=True)
    (first.workdir / "checkpoints").mkdir()
    (first.workdir / work.RESULTS).write_text(json.dumps({"request": work.request(first), "rows": []}))
    work.claim(first)
    work.claim(first)
    assert work.results(first) == [] and list(first.built_on) == ["foundations/weak"]
    monkeypatch.setitem(foundations, "dit.train.num_steps", 301)
    monkeypatch.setitem(base.SIZES["fast"], "dit.train.num_steps", 5)
    second = _plan(tmp_path, studies=["reuse"]).jobs["reuse/50_steps/seed_0"]
    assert work.results(second) is None
    with pytest.raises(UserError, match="seed_0 holds a run with other settings or foundations: remove that folder"):
        work.claim(second)


def test_only_runs_with_a_student_depend_on_the_guidance(tmp_path):
    """Runs that older versions made, before a stage read the guidance, are still theirs."""
    planned = plan.Plan(["few_step", "guidance", "raev2"], workdir=tmp_path, data={}, size="fast", seeds=1)
    for job in planned.jobs.values():
        guided = any(key.startswith("guidance.") for key in work.trained_by(job)["config"])
        assert guided == ("few_step" in job.config["stages"]), job.name


def test_a_dependent_of_a_finished_job_starts_while_another_job_runs(tmp_path, monkeypatch):
    running_at_once = []

    def wait(running):
        running_at_once.append([one.job.name for one in running])
        return running[:]

    process = types.SimpleNamespace(exitcode=0)
    monkeypatch.setattr(work, "results", lambda job: [] if job.name == "finished" else None)
    monkeypatch.setattr(pool, "_start", lambda _, job, cores: pool._Running(job, process, cores, time.monotonic()))
    monkeypatch.setattr(pool, "_wait", wait)
    jobs = [plan.Job(name, tmp_path / name, {}) for name in ("finished", "long")]
    jobs.append(plan.Job("dependent", tmp_path / "dependent", {}, needs=("finished",)))
    assert pool.run(jobs, 2, lambda line: None) == {}
    assert running_at_once == [["long", "dependent"]]


@pytest.mark.slow
def test_the_width_experiment(one_device, tmp_path, monkeypatch):
    """Run in processes: an interrupted job resumes, finished jobs do not start, a failed job is named.

    The loss decreases only when the DiT is as wide as a token.
    """
    study = plan.read("width")
    kept = {name: study["variants"][name] for name in ("16", "64")}
    longer = {"fast": {**study["sizes"]["fast"], "dit.train.num_steps": 300}}  # 60 steps may end too early
    changed = {**study, "variants": kept, "sizes": longer}
    monkeypatch.setattr(plan, "read", lambda name: {**changed} if name == "width" else {**study})
    planned = _plan(tmp_path, studies=["width"])
    jobs, said = list(planned.jobs.values()), []
    assert [job.name for job in jobs] == ["foundations/image", "width/16/seed_0", "width/64/seed_0"]

    first = _in_a_process(jobs[:2])
    metrics = tmp_path / "width" / "16" / "seed_0" / "metrics" / "dit.jsonl"
    _wait_for(lambda: metrics.exists() and metrics.read_text().count("\n") > 1)
    os.killpg(first.pid, signal.SIGINT)  # as a terminal's Ctrl-C does
    assert first.wait(60) == 75
    assert work.results(jobs[0]) == [] and work.results(jobs[1]) is None

    assert pool.run(jobs, 1, said.append) == {}
    assert "resuming from step" in (tmp_path / "width" / "16" / "seed_0" / "log.txt").read_text()
    assert not any("starts: foundations/image" in line for line in said)
    said.clear()
    assert pool.run(jobs, 1, said.append) == {} and said == []

    command.write(planned, tmp_path)
    found = {key: work.results(planned.jobs[job]) for key, job in planned.of["width"].items()}
    values = verdict.last(found)
    assert values["64", "loss"][0] < values["16", "loss"][0]  # also with the seeds 1 and 2
    assert values["16", "loss"][0] > values["16", "eigenvalue_bound"][0] > values["16", "bound"][0] - 1e-6
    assert values["16", "bound"] == {0: 0.75} and work.cpu_seconds(jobs[1]) > 0

    broken = [
        _with(
            jobs[0],
            kind="run",
            name="foundations/broken",
            workdir=tmp_path / "broken",
            config={**jobs[1].config, "dit.width": 6},
        )
    ]
    broken += [_with(jobs[1], name="width/on_it", workdir=tmp_path / "on_it", needs=("foundations/broken",))]
    failed = pool.run(broken, 1, said.append)
    assert "status 2: error: config.dit.width=6 cannot work" in failed["foundations/broken"]
    assert failed["width/on_it"] == "left out, because foundations/broken failed" and len(said) == 3


def _with(job, **changes):
    return dataclasses.replace(job, **changes)


def _in_a_process(jobs):
    """Start pool.run in a process of its own, as the command does."""
    code = (
        "import pickle, sys; from launch.study import pool\n"
        "if __name__ == '__main__':\n"
        "    try: pool.run(pickle.load(open(sys.argv[1], 'rb')), 1)\n"
        "    except KeyboardInterrupt: sys.exit(75)\n"
    )
    folder = jobs[0].workdir.parents[1]
    (folder / "run.py").write_text(code)
    (folder / "jobs.pickle").write_bytes(pickle.dumps(jobs))
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    words = [sys.executable, folder / "run.py", folder / "jobs.pickle"]
    return subprocess.Popen(words, cwd=ROOT, env=environment, start_new_session=True)


def _wait_for(condition, limit=300):
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < limit
        time.sleep(0.02)


@pytest.mark.slow
@pytest.mark.by_hand
@pytest.mark.parametrize("name", [name for name in plan.STUDIES if name != "width"])
def test_an_experiment_runs_from_beginning_to_end(name, one_device, tmp_path):
    """At the smallest size, whose results mean nothing."""
    assert command.run([name], tmp_path, "fast", 1, 1, "", False) == {}
    summary = json.loads((tmp_path / "shapes_fast" / "summary.json").read_text())["studies"][name]
    assert "not run" not in summary["verdicts"].values()
    assert all(set(plan.read(name)["columns"]) <= set(of) for of in summary["variants"].values())
    assert (tmp_path / "shapes_fast" / f"{name}.png").exists()


@pytest.mark.slow
@pytest.mark.by_hand
@pytest.mark.parametrize("name", SHOWN)
def test_claims_of_every_seed_hold(name, one_device, tmp_path):
    """Run at full size with one seed, in minutes of a CPU core for each experiment."""
    assert command.run([name], tmp_path, "full", 1, 2, "", False) == {}
    verdicts = json.loads((tmp_path / "shapes" / "summary.json").read_text())["studies"][name]["verdicts"]
    assert [verdicts[says] for says in SHOWN[name]] == ["in every seed (1 of 1)"] * len(SHOWN[name])
