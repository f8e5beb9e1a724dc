"""Commands of the pages: bash itself reads them from their blocks, and each runs up to the point where work begins."""

import argparse
import importlib
import json
import os
import re
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
NEEDS = "# needs"  # start of a block that needs something that the tests do not have
_PROGRAMS = ("python", ".venv/bin/python", "pip", "bash", "source", "docker", "uv", "srun", "mpirun", "sleep")
# Replaces all programs, and records the calls.
_RECORD = """
record() { printf '%s\\0' "$@" $'\\1' >> "$CALLS"; }
""" + "\n".join(f'{program}() {{ record {program} "$@"; }}' for program in _PROGRAMS)


def blocks(page):
    """Return the blocks of commands of a page."""
    return re.findall(r"^```bash\n(.*?)^```", (ROOT / page).read_text(), re.MULTILINE | re.DOTALL)


def commands(block):
    """Return [[word, ...]] of the programs that a block calls, as bash reads it; [optional] words included."""
    with tempfile.NamedTemporaryFile() as calls:
        script = f"set -f\n{_RECORD}\n{block}\nwait"
        done = subprocess.run(
            ["bash", "-c", script], env={**os.environ, "CALLS": calls.name}, capture_output=True, text=True, timeout=60
        )
        said = Path(calls.name).read_text()
    if done.returncode or done.stderr:
        raise ValueError(f"bash cannot read the block ({done.stderr}):\n{block}")
    found = [call.split("\0")[:-1] for call in said.split("\1\0")[:-1]]
    return [[word.strip("[]") for word in call] for call in found]


def check(calls):
    """Return {number: error} of calls (module, arguments): flags, config keys and values, as the programs see them."""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    done = subprocess.run(
        [sys.executable, "-c", "import doc_commands; doc_commands._check()"],
        **{"input": json.dumps(calls), "cwd": ROOT, "env": environment, "capture_output": True, "text": True},
    )
    if done.returncode:
        raise RuntimeError(done.stderr)
    return {int(number): reason for number, reason in json.loads(done.stdout).items()}


def _check():
    """Run in a process of its own, which imports once; each call runs in a fork, up to the point where work begins."""
    for name in ("rae_jax.main", "rae_jax.convert", "rae_jax.data.pack"):
        importlib.import_module(name)
    wrong = {}
    for number, (module, arguments) in enumerate(json.load(sys.stdin)):
        read, write = os.pipe()
        if child := os.fork():
            os.close(write)
            with os.fdopen(read) as file:
                said = file.read()
            if os.waitpid(child, 0)[1]:
                wrong[number] = said
        else:
            os.dup2(write, 2)
            sys.argv = ["command", *arguments]
            _begin(module)
    print(json.dumps(wrong))


def _begin(module):
    from absl import app, flags

    def stop(main, flags_parser):
        flags_parser(sys.argv)
        if "config" in flags.FLAGS and flags.FLAGS["config"].value is not None:
            from rae_jax.config import checks
            from rae_jax.runtime import sharding

            given = flags.FLAGS["config"].value
            mode = flags.FLAGS["mode"].value if "mode" in flags.FLAGS else "train"
            trains = mode in ("train", "benchmark") or (mode == "compile" and "train" in flags.FLAGS["program"].value)
            checks.check(given, sharding.make_mesh(given.mesh), trains=trains)
        os._exit(0)

    parse_args = argparse.ArgumentParser.parse_args

    def parse_and_stop(parser):
        parse_args(parser)
        os._exit(0)

    app.run, argparse.ArgumentParser.parse_args = stop, parse_and_stop
    try:
        runpy.run_module(module, run_name="__main__")
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
    os._exit(1)
