"""The package as others install it: its metadata, and a wheel that works in a folder without the checkout."""

import importlib
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml
from packaging.version import Version

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_the_console_script_is_the_command():
    module, _, function = PROJECT["scripts"]["rae-jax"].partition(":")
    assert callable(getattr(importlib.import_module(module), function))


def test_the_citation_is_of_this_version_and_names_the_paper():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == PROJECT["version"] and citation["license"] == PROJECT["license"]
    (paper,) = citation["references"]
    assert paper["url"] == PROJECT["urls"]["Paper"]


def test_the_workflow_runs_the_checks_on_the_oldest_and_the_newest_python():
    """As the classifiers have them."""
    (job,) = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())["jobs"].values()
    versions = [found for line in PROJECT["classifiers"] if (found := re.search(r":: (3\.\d+)$", line))]
    versions = sorted((found[1] for found in versions), key=Version)
    assert job["strategy"]["matrix"]["python"] == [versions[0], versions[-1]]
    assert PROJECT["requires-python"] == f">={versions[0]}"
    assert job["steps"][-1]["run"] == "bash .ci/run"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy, as setuptools writes to the folder that it builds."""
    setuptools = pytest.importorskip("setuptools", reason="the extra `test` brings it")
    if Version(setuptools.__version__) < Version("77"):
        pytest.skip("builds need setuptools 77")
    copy, out = tmp_path_factory.mktemp("copy"), tmp_path_factory.mktemp("wheel")
    for name in ("rae_jax", "configs", "launch"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    _pip("wheel", "--no-deps", "--no-build-isolation", f"--wheel-dir={out}", copy)
    (built,) = out.glob("*.whl")
    return built


def _pip(*arguments):
    command = [
        sys.executable,
        "-m",
        "pip",
        *map(str, arguments),
        "--quiet",
        "--disable-pip-version-check",
        "--no-index",
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_a_wheel_holds_the_package_the_shipped_weights_and_the_configs(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    ours = {path.relative_to(ROOT) for path in (ROOT / "rae_jax").rglob("*") if path.is_file()}
    ours = {path.as_posix() for path in ours if path.suffix != ".pyc"}
    configs = {f"rae_jax/configs/{path.name}" for path in (ROOT / "configs").glob("*.py")}
    assert {name for name in names if ".dist-info/" not in name} == ours | configs
    assert "rae_jax/py.typed" in ours and any(name.endswith("dit.safetensors") for name in ours)


@pytest.mark.slow
def test_an_installed_wheel_works_without_the_checkout(wheel, tmp_path):
    site, empty = tmp_path / "site", tmp_path / "empty"
    empty.mkdir()
    _pip("install", "--no-deps", f"--target={site}", wheel)
    environment = {**os.environ, "PYTHONPATH": str(site), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}

    def run(*command):
        return subprocess.run(command, cwd=empty, env=environment, capture_output=True, text=True, timeout=300)

    code = (
        "import rae_jax; from rae_jax.config import files; print(rae_jax.__file__, files.FOLDER);"
        "rae, dit = rae_jax.load_rae(), rae_jax.load_dit('quickstart');"
        "print(rae_jax.sample(rae, dit, [0], num_steps=1).shape)"
    )
    done = run(sys.executable, "-c", code)
    assert done.stdout.split("\n")[:2] == [
        f"{site / 'rae_jax' / '__init__.py'} {site / 'rae_jax' / 'configs'}",
        "(1, 32, 32, 3)",
    ], done.stderr
    script = str(site / "bin" / "rae-jax")
    refused = run(script, "--config=dit_xl", "--workdir=run", "--config.dit.num_head=3")
    assert (refused.returncode, refused.stderr.count("\n")) == (2, 1) and "num_heads" in refused.stderr
    sizes = ["--num_images=2", "--config.sampler.num_steps=1", "--config.evaluate.batch_size=2"]
    done = run(script, "--config=quickstart", "--workdir=run", "--mode=sample", *sizes)
    assert done.returncode == 0, done.stderr
    assert (empty / "run" / "samples" / "sampled.png").exists()
