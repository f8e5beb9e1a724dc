"""Eight simulated CPU devices, exact matrix products, and one compilation cache for the whole run."""

import atexit
import contextlib
import os
import shutil
import signal
import tempfile

from xla_flags import EIGHT_DEVICES, FAST_COMPILE

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {EIGHT_DEVICES} {FAST_COMPILE}"

# pytest-xdist's workers inherit it, and compile nothing that another one has.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="rae_jax_cache_")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

from configs import small
from rae_jax.data import parquet_files, shard_index
from rae_jax.runtime import host_allocator, sharding

# Started in the background of a shell, or below a `trap "" INT`, a process ignores it, and so do those that it starts:
# tests that send it would wait in vain.
signal.signal(signal.SIGINT, signal.default_int_handler)

host_allocator.keep_freed_memory()
jax.config.update("jax_default_matmul_precision", "highest")
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


# The files that take longest: begun last, one would keep one core while the other has nothing left.
_FIRST = ("training/test_loop.py", "profiling/test_compile_ahead.py", "training/test_decoder_step.py")
_FIRST += ("training/test_loop_on_meshes.py",)


def pytest_collection_modifyitems(items):
    """For several workers the longest first; for the rest, within a file, and for one process, the order stays."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        items.sort(key=lambda item: not item.path.as_posix().endswith(_FIRST))


def tiny():
    """The small job with every size cut down to what compiles in seconds."""
    c = small.get_config()
    c.name, c.unroll, c.log_every = "tiny", False, 1
    c.data.update({"num_train": 96, "num_heldout": 80})
    c.encoder.update({"width": 16, "depth": 2})
    c.judge.widths = (8, 8)
    c.decoder.update({"width": 16, "depth": 1, "num_heads": 2, "hidden": 32})
    c.discriminator.layers = (0, 1)
    c.dit.update({"width": 16, "depth": 1, "num_heads": 1, "head_width": 32, "head_depth": 1, "head_num_heads": 1})
    for stage in ("encoder", "judge", "decoder", "dit"):
        c[stage].train.update({"num_steps": 6, "batch_size": 16, "warmup_steps": 2})
    c.dit.train.update({"optimizer": "adamw", "more_ema_decays": (0.5, 0.0)})  # compiles faster than Muon
    c.decoder.train.update({"discriminator_start": 2, "adversarial_start": 3})
    c.statistics.batch_size = 16
    c.sampler.num_steps = 3
    c.evaluate.update({"num_images": 20, "batch_size": 16, "probe": False})
    c.checkpoint.every = 100
    return c


def random_like(shapes, *, seed, scale):
    """Random numbers, none of them zero, in the shapes of a tree: weights without compiling an initialiser."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: (scale * rng.normal(size=leaf.shape)).astype(np.float32), shapes)


def one_device():
    """A mesh on which eight simulated devices do not all compute the same."""
    return sharding.make_mesh({"data": 1, "fsdp": 1, "tensor": 1}, jax.devices()[:1])


@contextlib.contextmanager
def uncached():
    """Compile without the cache: for programs that gather kernels on a mesh.

    When XLA loads such a program on CPU, the order between collectives inside a loop or branch and after it is lost
    (tests/stress/collectives.py).
    """
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()  # JAX asks once
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", True)
        compilation_cache.reset_cache()


@pytest.fixture
def tiny_config():
    return tiny()


@pytest.fixture
def nothing_kept(monkeypatch):
    """No index of shards is kept from one test to the next."""
    for name, value in (("_folder", None), ("_copies", False), ("_indices", {})):
        monkeypatch.setattr(shard_index, name, value)
    monkeypatch.setattr(parquet_files, "_rows", {})
