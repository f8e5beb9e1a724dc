"""The environment of a run: software, devices and revision, one line of environment.jsonl for each start."""

import datetime
import importlib.metadata
import json
import platform
import subprocess
import sys
from pathlib import Path

import jax
from etils import epath

from rae_jax.runtime import atomic_files

FILE = "environment.jsonl"
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


def record(workdir):
    """Add a line to WORKDIR/environment.jsonl, in the first process."""
    if jax.process_index() != 0:
        return
    path = epath.Path(workdir) / FILE
    atomic_files.append_text(path, json.dumps(describe()) + "\n")


def starts(workdir):
    """Return the dicts that `record` wrote, one for each start, up to the first truncated line."""
    path, found = epath.Path(workdir) / FILE, []
    for line in path.read_bytes().decode(errors="replace").splitlines() if path.exists() else ():
        try:
            found.append(dict(json.loads(line)))
        except (ValueError, TypeError):
            break
    return found


def describe():
    """Return {name: value} of this environment."""
    devices = jax.devices()
    return {
        "began": f"{datetime.datetime.now().astimezone():%Y-%m-%d %H:%M %Z}",
        "command": " ".join(sys.argv),
        "devices": f"{len(devices)} x {devices[0].device_kind} ({devices[0].platform})",
        "processes": jax.process_count(),
        "host": f"{platform.system()} {platform.machine()}",
        "revision": _revision(Path(__file__).parents[2]),
        "python": platform.python_version(),
        **{name: version for name in _PACKAGES if (version := _version(name))},
    }


def _version(package):
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _revision(checkout):
    """Return Git's revision, marked if tracked files differ from it; '' if the folder is not a checkout."""
    if not (checkout / ".git").exists():
        return ""
    try:
        revision = _git(checkout, "rev-parse", "--short=12", "HEAD")
        return f"{revision}, changed" if _git(checkout, "status", "--porcelain", "--untracked-files=no") else revision
    except (OSError, subprocess.SubprocessError):  # git is not installed, or it refuses or does not answer
        return ""


def _git(checkout, *arguments):
    done = subprocess.run(["git", "-C", checkout, *arguments], capture_output=True, text=True, check=True, timeout=10)
    return done.stdout.strip()
