"""Several processes of one run: how they connect, and how they agree on a value.

All processes compute the same program on the devices of all; the first process writes files and messages.
"""

import contextlib
import functools
import os
import re
import signal
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from rae_jax.errors import UserError, one_line

SETTINGS = {  # flag: environment variable
    "coordinator": "JAX_COORDINATOR_ADDRESS",
    "num_processes": "JAX_NUM_PROCESSES",
    "process_id": "JAX_PROCESS_ID",
}
# Text of JAX's errors if another process is lost: in errors of other types, and in JaxRuntimeError.
_GONE = re.compile(r"gloo|coordination.?service|another task", re.IGNORECASE)
_NO_ANSWER = (
    *("UNAVAILABLE", "DEADLINE_EXCEEDED", "ABORTED", "CANCELLED", "INTERNAL", "UNKNOWN"),
    *("FAILED_PRECONDITION", "DATA_LOSS"),
)
# Text of errors of this process itself.
_OWN = re.compile(r"compil|mosaic|engine config|lowering|autotun|resource_exhausted", re.IGNORECASE)
SHUTDOWN_TIMEOUT = 60  # seconds that a process waits at its end for the others, of which one may have failed


def start(coordinator=None, num_processes=None, process_id=None):
    """Connect to the other processes of the run, if any exist; call it before JAX initialises its devices.

    A setting that is None is read from the environment (SETTINGS). If none is set, jax.distributed detects TPU hosts,
    SLURM, Kubernetes (JobSet, GKE) and Open MPI. A run of one process does nothing here. Raises UserError for settings
    that cannot work.
    """
    given = dict(zip(SETTINGS, (coordinator, num_processes, process_id), strict=True))
    given = {flag: os.environ.get(SETTINGS[flag]) if value is None else value for flag, value in given.items()}
    alone = all(value is None for value in given.values())
    if alone and not _in_cluster(os.environ):
        return
    settings = {} if alone else _checked(**given)
    if settings.get("num_processes") == 1:
        return
    # The training loop handles SIGTERM itself, by an Agreement.
    jax.config.update("jax_enable_preemption_service", False)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    # Gloo identifies messages by their order alone: on CPU a program must not start before the previous one ends.
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    print(
        f"waiting for the other processes of this run ({_in_words(settings, os.environ)})", file=sys.stderr, flush=True
    )
    try:
        with _default_signals():  # Python's handlers do not run during the wait
            jax.distributed.initialize(**settings, shutdown_timeout_seconds=SHUTDOWN_TIMEOUT)
    except (ValueError, RuntimeError) as error:
        flags = ", ".join(f"--{flag}" for flag in SETTINGS)
        raise UserError(
            f"the processes of this run cannot connect ({one_line(error, longest=300)}): set {flags}"
        ) from error
    if jax.default_backend() == "cpu":
        # If one process loads a program from the cache and another compiles it, the order of its collectives may
        # differ, and Gloo confuses their messages.
        jax.config.update("jax_enable_compilation_cache", False)


def _in_words(settings, environment):
    """Return for whom a process waits, in words."""
    if settings:
        count, index = settings["num_processes"], settings["process_id"]
        return f"{count} in all, this is {index}; coordinator {settings['coordinator_address']}"
    names = (
        "SLURM_STEP_NUM_TASKS",
        "SLURM_NTASKS",
        "OMPI_COMM_WORLD_SIZE",
        "TPU_WORKER_HOSTNAMES",
        "JOB_COMPLETION_INDEX",
    )
    found = [f"{name}={environment[name]}" for name in names if name in environment]
    return f"found by {found[0]}; to run one process alone, unset it" if found else "found by JAX"


@contextlib.contextmanager
def _default_signals():
    numbers = (signal.SIGINT, signal.SIGTERM)
    previous = {number: signal.signal(number, signal.SIG_DFL) for number in numbers}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def is_first():
    """Return whether this process writes files and prints results."""
    return jax.process_index() == 0


def agreed(value):
    """Return the first process's number or array, on every process."""
    if jax.process_count() == 1:
        return value
    return multihost_utils.broadcast_one_to_all(np.asarray(value))


def lost_another(error):
    """Return whether an error says that another process of this run cannot be reached."""
    if jax.process_count() == 1:
        return False
    gone = _GONE.search(str(error)) is not None
    if isinstance(error, jax.errors.JaxRuntimeError):
        return not _OWN.search(str(error)) and (gone or str(error).startswith(_NO_ANSWER))
    return gone


def wait_for_all(name):
    """Return when every process has called this function with this name."""
    multihost_utils.sync_global_devices(name)


class Agreement:
    """A number that any process may report by `read()` (None: no number) and that all see after the same step.

    In a run of one process `value` is the current result of `read`.
    """

    def __init__(self, read):
        self._read, self._alone = read, jax.process_count() == 1
        self._asked, self._agreed = None, 0

    def exchange(self, *, last=False):
        """Exchange the numbers; all processes call it once a step, after its dispatch.

        The result arrives one step later, so that no process waits; on the last step it arrives at once.
        """
        if self._alone:
            return
        before, self._asked = self._asked, _largest(self._read() or 0)
        for asked in (before, self._asked if last else None):
            if asked is not None:
                self._agreed = max(self._agreed, int(asked))

    def at_the_end(self):
        """Return the number that was reported until now, or None. All processes call it after the last step."""
        if not self._alone:
            self._agreed = max(self._agreed, int(_largest(self._read() or 0)))
        return self.value

    @property
    def value(self):
        """The number that was reported, or None."""
        return self._read() if self._alone else self._agreed or None


def _largest(number):
    """Return the largest number of all processes, an array on every device that may still be in transit."""
    devices = np.asarray(jax.devices())
    split = NamedSharding(Mesh(devices, "all"), P("all"))
    mine = jax.make_array_from_callback(devices.shape, split, lambda index: np.full(1, number, np.int32))
    return _maximum(split.mesh)(mine)


@functools.cache
def _maximum(mesh):
    return jax.jit(jnp.max, out_shardings=NamedSharding(mesh, P()))


def _in_cluster(environment):
    """Return whether jax.distributed can detect several processes from this environment."""

    def count(name):
        value = environment.get(name, "")
        return int(value) if value.isdecimal() else 1

    # Inside a step of srun. The allocation may have more tasks than the step, such as an interactive shell.
    tasks = count("SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in environment else "SLURM_NTASKS")
    slurm = tasks > 1 and "SLURM_STEP_NODELIST" in environment
    mpi = count("OMPI_COMM_WORLD_SIZE") > 1
    kubernetes = "KUBERNETES_SERVICE_HOST" in environment and "JOB_COMPLETION_INDEX" in environment
    # JAX sets one of these two variables when it is imported: the first on a TPU host, the second otherwise.
    tpu = environment.get("TPU_ML_PLATFORM") == "JAX" and "TPU_SKIP_MDS_QUERY" not in environment
    tpu = tpu or "," in environment.get("TPU_WORKER_HOSTNAMES", "")
    return slurm or mpi or kubernetes or (tpu and environment.get("JAX_PLATFORMS", "tpu").startswith("tpu"))


def _checked(coordinator, num_processes, process_id):
    given = {"coordinator": coordinator, "num_processes": num_processes, "process_id": process_id}
    for flag, value in given.items():
        if value is None:
            names = ", ".join(f"--{name}" for name in SETTINGS)
            raise UserError(f"--{flag} (or {SETTINGS[flag]}) is missing: set all of {names}")
    address, _, port = str(coordinator).rpartition(":")
    if not address or not port.isdecimal():
        raise UserError(f"--coordinator={coordinator} cannot work: set HOST:PORT of the process with id 0")
    try:
        count, index = int(num_processes), int(process_id)
    except ValueError as error:
        raise UserError(f"--num_processes={num_processes} and --process_id={process_id} must be numbers") from error
    if not 0 <= index < count:
        raise UserError(f"--process_id={index} cannot work: with --num_processes={count}, ids are 0 to {count - 1}")
    return {"coordinator_address": coordinator, "num_processes": count, "process_id": index}
