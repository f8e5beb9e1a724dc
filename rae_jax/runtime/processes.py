"""Several processes that are one run: how they find each other, and how they agree.

All of them compute the same program on the devices of all; the first one writes files and speaks.
"""

import functools
import os
import re

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from rae_jax.errors import UserError

SETTINGS = {  # flag: environment variable
    "coordinator": "JAX_COORDINATOR_ADDRESS",
    "num_processes": "JAX_NUM_PROCESSES",
    "process_id": "JAX_PROCESS_ID",
}
# What JAX says where another process is gone: in errors that are none of its own type, and in those that are.
_GONE = re.compile(r"gloo|coordination.?service|another task", re.IGNORECASE)
_NO_ANSWER = (
    *("UNAVAILABLE", "DEADLINE_EXCEEDED", "ABORTED", "CANCELLED", "INTERNAL", "UNKNOWN"),
    *("FAILED_PRECONDITION", "DATA_LOSS"),
)
_OWN = re.compile(r"compil|mosaic|engine config|lowering|autotun|resource_exhausted", re.IGNORECASE)  # and not in these
FAREWELL = 60  # seconds for which a process that ends waits for the others, where one of them fails


def start(coordinator=None, num_processes=None, process_id=None):
    """Join the other processes of the run, if there are any; to be called before JAX looks for its devices.

    What is None is taken from the environment (SETTINGS). Without any of it, jax.distributed finds out by itself on
    TPU hosts and under SLURM, Kubernetes (JobSet, GKE) and Open MPI. A process that is alone stays so, and nothing
    happens. Raises UserError for settings that cannot work.
    """
    given = dict(zip(SETTINGS, (coordinator, num_processes, process_id), strict=True))
    given = {flag: os.environ.get(SETTINGS[flag]) if value is None else value for flag, value in given.items()}
    alone = all(value is None for value in given.values())
    if alone and not _in_cluster(os.environ):
        return
    settings = {} if alone else _checked(**given)
    if settings.get("num_processes") == 1:
        return
    # The loop handles SIGTERM itself, and finds an agreement: see Agreement.
    jax.config.update("jax_enable_preemption_service", False)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    # Gloo tells what it receives apart by its order alone: on CPU no program may begin before another one's end.
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    try:
        jax.distributed.initialize(**settings, shutdown_timeout_seconds=FAREWELL)
    except (ValueError, RuntimeError) as error:
        flags = ", ".join(f"--{flag}" for flag in SETTINGS)
        raise UserError(f"the processes of this run do not come together ({error}): name {flags}") from error
    if jax.default_backend() == "cpu":
        # Of two processes one found a program in the cache, the other compiled it anew, with its collectives in another
        # order; and Gloo took the ones for the others.
        jax.config.update("jax_enable_compilation_cache", False)


def is_first():
    """Whether this process is the one that writes files and prints results."""
    return jax.process_index() == 0


def agreed(value):
    """The first process's number or array, on every process."""
    if jax.process_count() == 1:
        return value
    return multihost_utils.broadcast_one_to_all(np.asarray(value))


def lost_another(error):
    """Whether an error says that another process of this run cannot be reached."""
    if jax.process_count() == 1:
        return False
    gone = _GONE.search(str(error)) is not None
    if isinstance(error, jax.errors.JaxRuntimeError):
        return not _OWN.search(str(error)) and (gone or str(error).startswith(_NO_ANSWER))
    return gone


def wait_for_all(name):
    """Return when every process has come to this place."""
    multihost_utils.sync_global_devices(name)


class Agreement:
    """A number that any process may raise, `read()`, None for not; all see it after the same step.

    In one process `value` is what `read` says at that moment.
    """

    def __init__(self, read):
        self._read, self._alone = read, jax.process_count() == 1
        self._asked, self._agreed = None, 0

    def exchange(self, *, last=False):
        """To be called by all once a step, after it was dispatched. Answers come a step later, so that none waits; on
        the last step at once.
        """
        if self._alone:
            return
        before, self._asked = self._asked, _largest(self._read() or 0)
        for asked in (before, self._asked if last else None):
            if asked is not None:
                self._agreed = max(self._agreed, int(asked))

    def at_the_end(self):
        """What was raised until now, or None. To be called by all, when no step comes any more."""
        if not self._alone:
            self._agreed = max(self._agreed, int(_largest(self._read() or 0)))
        return self.value

    @property
    def value(self):
        """What was raised, or None."""
        return self._read() if self._alone else self._agreed or None


def _largest(number):
    """The largest of all processes' numbers, on its way to every device."""
    devices = np.asarray(jax.devices())
    split = NamedSharding(Mesh(devices, "all"), P("all"))
    mine = jax.make_array_from_callback(devices.shape, split, lambda index: np.full(1, number, np.int32))
    return _maximum(split.mesh)(mine)


@functools.cache
def _maximum(mesh):
    return jax.jit(jnp.max, out_shardings=NamedSharding(mesh, P()))


def _in_cluster(environment):
    """Whether the environment is one of several processes that jax.distributed knows."""

    def count(name):
        value = environment.get(name, "")
        return int(value) if value.isdecimal() else 1

    slurm = count("SLURM_NTASKS") > 1 and "SLURM_STEP_NODELIST" in environment  # in a step of srun, not beside it
    mpi = count("OMPI_COMM_WORLD_SIZE") > 1
    kubernetes = "KUBERNETES_SERVICE_HOST" in environment and "JOB_COMPLETION_INDEX" in environment
    # JAX sets these two where it is imported: the first on a TPU host, the second where there is none.
    tpu = environment.get("TPU_ML_PLATFORM") == "JAX" and "TPU_SKIP_MDS_QUERY" not in environment
    tpu = tpu or "," in environment.get("TPU_WORKER_HOSTNAMES", "")
    return slurm or mpi or kubernetes or (tpu and environment.get("JAX_PLATFORMS", "tpu").startswith("tpu"))


def _checked(coordinator, num_processes, process_id):
    given = {"coordinator": coordinator, "num_processes": num_processes, "process_id": process_id}
    for flag, value in given.items():
        if value is None:
            together = ", ".join(f"--{name}" for name in SETTINGS)
            raise UserError(f"--{flag} (or {SETTINGS[flag]}) is missing: {together} go together")
    address, _, port = str(coordinator).rpartition(":")
    if not address or not port.isdecimal():
        raise UserError(f"--coordinator={coordinator} cannot work: name HOST:PORT of the process with id 0")
    try:
        count, index = int(num_processes), int(process_id)
    except ValueError as error:
        raise UserError(f"--num_processes={num_processes} and --process_id={process_id} must be numbers") from error
    if not 0 <= index < count:
        raise UserError(f"--process_id={index} cannot work: ids are 0 to {count - 1}, by --num_processes={count}")
    return {"coordinator_address": coordinator, "num_processes": count, "process_id": index}
