"""Several real processes that are one run, on this machine's CPU."""

import os
import socket
import subprocess
import sys
from pathlib import Path

from xla_flags import FAST_COMPILE

ROOT = Path(__file__).parents[1]


def free_port():
    """A number."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def start(command, count=2, *, devices=1, places=None):
    """`count` processes of Python's `command`, each with so many devices; what one says goes to one pipe.

    They find each other by processes.start(). One alone is told of no others. `places`: the folder each is in.
    """
    address = f"localhost:{free_port()}"
    flags = f"--xla_force_host_platform_device_count={devices} {FAST_COMPILE}"
    together = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(count)}
    started = []
    for index in range(count):
        mine = {**together, "JAX_PROCESS_ID": str(index)} if count > 1 else {}
        place = places[index] if places else ROOT
        environment = {
            **os.environ,
            "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}",
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": flags,
            **mine,
        }
        pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        words = [sys.executable, *map(str, command)]
        started.append(subprocess.Popen(words, cwd=place, env=environment, **pipe))
    return started


def run(command, count=2, *, devices=1, status=0):
    """Run a pair; return the output of each process. All must end with `status`."""
    started = start(command, count, devices=devices)
    said = [process.communicate(timeout=3000)[0] for process in started]
    assert [process.returncode for process in started] == [status] * count, "\n".join(said)
    return said
