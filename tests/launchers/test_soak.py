"""A short run of tests/stress/soak.py: killed and resumed processes end like an undisturbed one."""

import pytest
from stress import soak


@pytest.mark.slow
def test_killed_runs_end_the_same(tmp_path, monkeypatch):
    for name in ("JAX_PLATFORMS", "JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"):
        monkeypatch.setenv(name, "")  # restores these variables after the test
    assert soak.main(3, 12, 0, ["first", "second"], tmp_path, toy=True) == []
