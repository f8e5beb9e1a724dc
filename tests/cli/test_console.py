"""The commands as a user starts them: a mistake is one line with the fix, exit status 2, and nothing is written."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    "arguments, status, words",
    [
        (
            ["--config=dit_xl", "--config.dit.num_head=3"],
            2,
            'error: unknown config key num_head: Did you mean "num_heads"',
        ),
        (
            ["--config=dit_x1"],
            2,
            "error: cannot load the config dit_x1: neither a file nor the name of a config; did you",
        ),
        (["--config", "dit_xl", "--config.data.path=nowhere"], 2, "error: config.data.path='nowhere'"),
        (["--help"], 1, "--topology: compile: TPU slice"),
    ],
)
def test_the_console_script(elsewhere, arguments, status, words):
    """As pip writes it: a file in another folder that imports main, and a working directory that is not on the path."""
    script = elsewhere / "bin" / "rae-jax"
    script.parent.mkdir()
    script.write_text(f"import sys\nsys.path.append({str(ROOT)!r})\nfrom rae_jax.main import main\nsys.exit(main())\n")
    command = [sys.executable, str(script), "--workdir=run", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=elsewhere, timeout=120)
    assert done.returncode == status, done.stderr
    said = done.stdout if status == 1 else done.stderr
    assert words in said and (status == 1 or said.count("\n") == 1), said
    assert not (elsewhere / "run").exists()


@pytest.mark.parametrize(
    "command, status, words",
    [
        (["rae_jax.main", "--workdir=run"], 2, "error: flag --config=None: name a config, such as small, or its file"),
        (["rae_jax.main", "--config=small"], 2, "this mode needs the folder of a run: set --workdir=DIR"),
        (["rae_jax.pack_latents", "--output=run"], 2, "error: flag --config=None: name a config, such as dit_b"),
        (["rae_jax.report", "--help"], 1, "--workdir: Folder of a run"),
    ],
)
def test_doors_name_the_flag_that_is_missing_and_list_theirs(elsewhere, command, status, words):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", *command]
    done = subprocess.run(command, capture_output=True, text=True, cwd=elsewhere, env=environment, timeout=120)
    assert done.returncode == status and not (elsewhere / "run").exists(), done.stderr
    assert words in (done.stdout if status == 1 else done.stderr)
    assert status == 1 or done.stderr.count("\n") == 1, done.stderr


_PUBLISHED = ("--config.encoder.family=dinov2", "--config.encoder.weights=nowhere/at/all")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--config.dit.train.num_step=3"], 'unknown config key num_step: Did you mean "num_steps"'),
        (["--config.dit.train.num_steps=many"], "num_steps"),
        (["--config=configs/none.py"], "configs/none.py"),
        (["--mode=dream"], "--mode=dream"),
        (["--mode=reconstruct", "--images=.", "--config.stages=()", *_PUBLISHED], "'nowhere/at/all'"),
        (["--mode=evaluate", "--samples=nowhere.npz"], "--samples=nowhere.npz: it does not exist"),
        (["--mode=evaluate", "--samples=a.npz", "--step=5"], "leave one out"),
        (["--config.data.source=image_folder", "--config.data.path=nowhere"], "config.data.path='nowhere'"),
        (["--workdir=/dev/null/run"], "--workdir=/dev/null/run"),
    ],
)
def test_the_command_line_says_it_in_one_line(tmp_path, arguments, message):
    workdir = tmp_path / "run"
    command = [sys.executable, "-m", "rae_jax.main", "--config=configs/small.py", f"--workdir={workdir}", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2], timeout=120)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    assert message in done.stderr
    assert not workdir.exists()
