"""README and docs: every command is checked as written, and the commands that need nothing special run, in small."""

import importlib.util
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import doc_commands
import numpy as np
import pytest
from conftest import tiny
from PIL import Image

from configs import small
from rae_jax.config import keys as config_keys

ROOT = Path(__file__).parents[1]
PAGES = ["README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]
OTHERS = ["CONTRIBUTING.md", "CHANGELOG.md"]  # texts whose commands are not checked: old commands, or hours
INDEX = "docs/README.md"
# Pages whose commands take too long or need other machines, and the test that runs them in small instead.
ELSEWHERE = {
    "docs/benchmark.md": "profiling/test_timing.py",
    "docs/scale.md": "profiling/test_compile_ahead.py",
    "docs/robustness.md": "launchers/test_soak.py",
    "docs/processes.md": "cli/test_main_processes.py",
    "docs/study.md": "launchers/test_study.py",
}
PLACEHOLDERS = {"--mode=MODE": None, "--config.KEY=VALUE": None, "...": None}
VALUES = {"N": "10", "VIRTUAL_imagenet256_labeled.npz": "README.md", "cudnn": "xla"}  # a file that exists; on a CPU
LAUNCHERS = ("launch/local.sh", "launch/slurm.sh", "launch/tpu_vm.sh", "launch.gke", "launch.xm")


def _words(command):
    """Return the words of a command, with values for placeholders."""
    words = [PLACEHOLDERS.get(word, word) for word in command]
    split = [word.partition("=") for word in words if word is not None]
    return [f"{name}{equals}{VALUES.get(value, value)}" for name, equals, value in split]


def _all():
    """Yield (page, block, command) of all pages."""
    for page in PAGES:
        for block in doc_commands.blocks(page):
            for command in doc_commands.commands(block):
                yield page, block, _words(command)


def _called(command):
    """Return (module or script of this project, arguments) of a command; (None, words) for other programs."""
    match command:
        case ["python" | ".venv/bin/python", "-m", module, *arguments] if module.startswith(("rae_jax", "launch")):
            return module, arguments
        case ["bash", script, *arguments] if script.startswith("launch/"):
            return script, arguments
    return None, command


def test_every_command_exists():
    """Flags, config keys and their values, extras, launchers' options: as the programs themselves see them."""
    pages, calls, wrong, begun = [], [], [], {}
    for page, block, command in _all():
        name, arguments = _called(command)
        completed = _with_config_of_run(begun, page, arguments)
        if name in ("rae_jax.main", "rae_jax.convert"):
            arguments = completed
        if name in LAUNCHERS:
            wrong += _dry_run(page, name, arguments)
        elif name is None:
            _known(page, block, command)
        elif name.endswith(".sh"):
            assert (ROOT / name).exists(), (page, command)
        else:
            pages.append(page)
            calls.append((name, arguments))
    modules = {"rae_jax.main", "rae_jax.convert", "rae_jax.data.pack", "rae_jax.pack_latents", "rae_jax.report"}
    assert modules <= {name for name, _ in calls}
    wrong += [(pages[number], *calls[number], reason) for number, reason in doc_commands.check(calls).items()]
    assert not wrong, "\n".join(map(str, wrong))


def _with_config_of_run(begun, page, arguments):
    """Return the arguments with the --config with which an earlier command of the page began the run in --workdir."""
    given = dict(argument.partition("=")[::2] for argument in arguments)
    run = page, given.get("--workdir")
    if "--config" in given:
        begun[run] = given["--config"]
    elif run in begun:
        return [f"--config={begun[run]}", *arguments]
    return arguments


def _dry_run(page, name, arguments):
    command = ["bash", name] if name.endswith(".sh") else [sys.executable, "-m", name]
    environment = {**os.environ, "HF_TOKEN": "a-secret"}
    done = subprocess.run(
        [*command, "--dry_run", *arguments], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    return [(page, name, arguments, done.stderr)] if done.returncode or not done.stdout else []


def _known(page, block, command):
    """Check a command of another program: extras of pip exist; the rest needs something, or is harmless."""
    match command:
        case ["pip", "install", *words]:
            extras = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"])
            named = re.findall(r"\.\[([a-z,]+)\]", " ".join(words))
            assert {extra for group in named for extra in group.split(",")} <= extras, (page, command)
        case ["python", "-c", code]:
            compile(code, page, "exec")
        case ["source" | "sleep", *_]:
            pass
        case _:
            assert block.startswith(doc_commands.NEEDS), (page, command)


def test_a_wrong_command_is_detected():
    (block,) = ["python -m rae_jax.main --config=configs/small.py --workdir=DIR \\\n  --config.dit.wide=3 # comment\n"]
    (command,) = doc_commands.commands(block)
    assert command == [
        "python",
        "-m",
        "rae_jax.main",
        "--config=configs/small.py",
        "--workdir=DIR",
        "--config.dit.wide=3",
    ]
    right = ["--config=configs/small.py", "--workdir=DIR"]
    tried = [command[3:], right, [*right, "--config.dit.width=95"], [*right, "--steps=3"]]
    wrong = doc_commands.check([("rae_jax.main", arguments) for arguments in tried])
    assert set(wrong) == {0, 2, 3}
    assert "wide" in wrong[0] and "config.dit.width=95" in wrong[2] and "steps" in wrong[3]


def test_links_lead_somewhere_and_the_index_has_every_page():
    for page in [*PAGES, *OTHERS]:
        for target in _linked((ROOT / page).read_text()):
            assert ((ROOT / page).parent / target).exists(), (page, target)
    assert _linked("[a](b.md) [c](d.md#e) [f](https://g) [h](#i)") == ["b.md", "d.md"]
    index = (ROOT / INDEX).read_text()
    others = [Path(page).name for page in PAGES if page.startswith("docs/") and page != INDEX]
    assert [name for name in others if f"]({name})" not in index] == []
    assert INDEX in (ROOT / "README.md").read_text()
    assert all((ROOT / "tests" / test).exists() for test in ELSEWHERE.values())


def _linked(text):
    """Return the files that the links of a page lead to, without anchors."""
    return re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text)


@pytest.mark.parametrize("page", [*PAGES, "CONTRIBUTING.md"])  # not the old commands of CHANGELOG.md
def test_modules_that_a_page_runs_exist(page):
    named = set(re.findall(r"python -m ((?:rae_jax|launch|tests)\b[\w.]*\w)", (ROOT / page).read_text()))
    assert [name for name in named if importlib.util.find_spec(name) is None] == []


@pytest.mark.parametrize("page", [page for page in PAGES if page != "docs/from_pytorch.md"])  # which names their files
def test_files_that_a_page_names_exist(page):
    named = set(re.findall(r"`((?:[\w-]+/)*[\w-]+\.(?:py|sh|yaml|toml|ipynb))`", (ROOT / page).read_text()))
    places = [ROOT, *(ROOT / folder for folder in ("rae_jax", "configs", "tests", "launch/bench"))]
    assert [name for name in named if not any((place / name).exists() for place in places)] == []


def test_the_readme_is_read_in_three_minutes():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


# Run for real.


def _tiny_flags():
    wanted, plain = (config_keys.flatten(c.to_dict()) for c in (tiny(), small.get_config()))
    changed = {key: value for key, value in wanted.items() if plain[key] != value and key != "name"}
    return [f"--config.{key}={value}" for key, value in changed.items()]


def _in_small(name, arguments):
    """Return the arguments of a call, with sizes that take seconds."""
    given = dict(argument.partition("=")[::2] for argument in arguments)
    if name == "rae_jax.main" and given.get("--workdir") == "runs/first":  # the shipped weights
        return [*arguments, "--num_images=8", "--config.evaluate.batch_size=8", "--config.sampler.num_steps=2"]
    if name == "rae_jax.main" and given.get("--workdir", "").startswith(
        "runs/student"
    ):  # a student of the shipped weights
        few = {"data.num_train": 64, "data.num_heldout": 32, "few_step.train.num_steps": 2}
        few |= {"evaluate.num_images": 8, "evaluate.batch_size": 8, "evaluate.probe": False}
        return [*arguments, "--num_images=8", *(f"--config.{key}={value}" for key, value in few.items())]
    if name == "rae_jax.main":
        return [*arguments, *_tiny_flags(), *(["--num_images=8"] if "sample" in given.get("--mode", "") else [])]
    if name == "launch/local.sh":
        few = {"data.num_train": 128, "data.num_heldout": 32, "judge.train.num_steps": 2, "sampler.num_steps": 2}
        few |= {"evaluate.num_images": 8, "evaluate.batch_size": 8, "evaluate.probe": False}
        flags = [f"--config.{key}={value}" for key, value in few.items()]
        return [*arguments, "--config.stages=('judge',)", *flags]  # the other parts are the shipped weights
    return arguments


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if page not in ELSEWHERE])
def test_the_commands_of_a_page_run(page, tmp_path):
    for name in ("configs", "launch", "rae_jax"):
        (tmp_path / name).symlink_to(ROOT / name)
    rng = np.random.default_rng(0)
    for label in range(10):
        folder = tmp_path / "FOLDER" / f"class{label}"
        folder.mkdir(parents=True)
        for index in range(10):
            Image.fromarray(rng.integers(0, 256, (40, 40, 3), np.uint8)).save(folder / f"{index}.png")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
    for block in doc_commands.blocks(page):
        for command in [] if block.startswith(doc_commands.NEEDS) else doc_commands.commands(block):
            name, arguments = _called(_words(command))
            if name is None or "quickstart.sh" in name or "test.sh" in name:  # tests/cli runs the quickstart
                continue
            program = ["bash", str(ROOT / name)] if name.endswith(".sh") else [sys.executable, "-m", name]
            done = subprocess.run(
                [*program, *_in_small(name, arguments)], cwd=tmp_path, env=environment, capture_output=True, text=True
            )
            assert done.returncode == 0, (command, done.stderr[-3000:])
