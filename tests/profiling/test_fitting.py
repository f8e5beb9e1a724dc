"""The choice that 'auto' makes in a run of several processes: every process makes the same."""

import sys
from pathlib import Path

import jax
import pairs
import pytest
from conftest import tiny

from rae_jax.config import auto
from rae_jax.profiling import fitting
from rae_jax.runtime import processes, sharding


def _main(output):
    """Compile in two processes. The first one would have room for the first choice, the second one for no choice."""
    processes.start()
    config = tiny()
    config.dit.train.batch_size = 16
    config.update({"attention": "auto", "remat": "auto", "unroll": "auto"})
    fitting.memory_of = lambda device: 2**40 if jax.process_index() == 0 else 1
    found = fitting.fitted(config, "dit", sharding.make_mesh(config.mesh))
    (Path(output) / f"{jax.process_index()}.txt").write_text(str(auto.of(found)))


@pytest.mark.slow
def test_two_processes_make_the_same_choice(tmp_path):
    said = pairs.run([__file__, tmp_path], devices=4)
    choices = {(tmp_path / f"{index}.txt").read_text() for index in (0, 1)}
    assert choices == {"attention=xla, remat=dots, unroll=False"}
    assert sum("dit: attention=xla, remat=dots" in text for text in said) == 1


if __name__ == "__main__":
    _main(sys.argv[1])
