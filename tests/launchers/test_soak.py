"""A short version of launch/soak.py: real processes, killed, end as one that was left alone."""

import pytest

from launch import soak


@pytest.mark.slow
def test_killed_runs_end_the_same(tmp_path, monkeypatch):
    for name in ("JAX_PLATFORMS", "JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"):
        monkeypatch.setenv(name, "")  # so that what the trials set is set back
    assert soak.main(3, 12, 0, ["first", "second"], tmp_path, toy=True) == []
