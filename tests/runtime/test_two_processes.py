"""A run of two processes of which one is killed: the other ends soon and says why, and the pair goes on exactly."""

import os
import signal
import sys
import time

import jax
import pairs
import pytest
from etils import epath
from stress import harness, toy_stage

from rae_jax.runtime import command_line, logs, processes

STEPS, BOUND = 60, 120.0  # seconds


def _main(workdir):
    processes.start()
    assert len(jax.devices()) == 2
    how = {"evaluate": lambda state, step: time.sleep(0.05) or {"x": 0.0}, "evaluate_every": 1}
    with command_line.peers():
        toy_stage.run(epath.Path(workdir), STEPS, on=toy_stage.mesh(data=2), checkpoint_every=5, **how)


def _start(workdir):
    return pairs.start([__file__, workdir])


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_where_one_is_killed_the_other_stops_and_both_go_on(tmp_path, victim):
    whole, workdir = tmp_path / "whole", tmp_path / "killed"
    said = [process.communicate(timeout=600)[0] for process in _start(whole)]
    assert len(toy_stage.rows(whole)) == 2 * STEPS, said
    pair = _start(workdir)
    while len(logs.read(workdir / "metrics" / "toy.jsonl")) < 40:
        assert all(process.poll() is None for process in pair)
        time.sleep(0.02)
    os.kill(pair[victim].pid, signal.SIGKILL)
    began = time.monotonic()
    said = pair[1 - victim].communicate(timeout=BOUND)[0]
    seconds, status = time.monotonic() - began, pair[1 - victim].returncode
    print(f"the other one ended after {seconds:.1f} s with status {status}: {said[:3000]}")
    # JAX's service ends it from a thread of its own, if the loop does not see first that the other one is gone.
    ours = status == command_line.RESTART and "another process of this run is lost" in said
    assert ours or (status == -signal.SIGABRT and "another task died" in said), said
    assert "Traceback" not in said
    pair[victim].communicate()
    said = [process.communicate(timeout=600)[0] for process in _start(workdir)]
    assert "resuming from step" in said[0], said
    assert harness.differences(workdir, whole, ["toy"]) == []


if __name__ == "__main__":
    _main(sys.argv[1])
