"""Weights & Biases: off by default, one switch, one line where it cannot be."""

import os
import subprocess
import sys

import pytest
from conftest import tiny

from rae_jax.config import checks, machine
from rae_jax.errors import UserError
from rae_jax.runtime import logs, sharding


def test_it_is_off_by_default_and_named_where_it_is_missing(monkeypatch):
    config, mesh = tiny(), sharding.make_mesh({"data": -1, "fsdp": 1, "tensor": 1})
    monkeypatch.setattr(machine.importlib.util, "find_spec", lambda name: None)
    checks.check(config, mesh)
    config.wandb = "project"
    with pytest.raises(UserError, match=r"config.wandb='project' cannot work: it needs wandb"):
        checks.check(config, mesh)


def test_metrics_are_written_offline_and_a_run_keeps_its_id(tmp_path):
    """In a process of its own, as wandb starts threads and services that outlive a test."""
    pytest.importorskip("wandb", reason="wandb is not installed")
    code = f"""
from etils import epath
from rae_jax.runtime import logs
workdir = epath.Path({str(tmp_path)!r})
for start in (0, 2):
    with logs.tracker("project", workdir, {{"name": "tiny", "dit": {{"width": 16}}}}) as tracker:
        metrics = logs.Metrics(workdir, "dit", step=start, tracker=tracker)
        for step in (start + 1, start + 2):
            metrics.write(step, {{"loss": 0.5 / step}})
"""
    environment = {"WANDB_MODE": "offline", "WANDB_SILENT": "true"}
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, **environment}, timeout=300)
    assert [row["step"] for row in logs.read(tmp_path / "metrics" / "dit.jsonl")] == [1, 2, 3, 4]
    files = list((tmp_path / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len(files) == 2  # a file for each start, of one id
    assert {file.stem for file in files} == {"run-" + (tmp_path / "wandb_id.txt").read_text()}
    assert all(b"dit/loss" in file.read_bytes() for file in files)
