"""Commands of the launchers, and the function that runs them."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
RUN = ("--", "--config=configs/small.py", "--workdir=gs://BUCKET/run", "--config.name=two words")
TPU = ("--name=b1", "--image=IMAGE", "--accelerator=tpu-v5-lite-podslice", "--topology=4x4")
GPU = ("--name=b1", "--image=IMAGE", "--accelerator=nvidia-h100-80gb", "--gpus=8", "--hosts=2")


def do(command, *, status=0, **environment):
    """Run a launcher; return its standard output, or its error output if another `status` than 0 is expected."""
    name, *options = command
    command = (
        ["bash", f"launch/{Path(name).name}"] if name.endswith(".sh") else [sys.executable, "-m", f"launch.{name}"]
    )
    environment = {**os.environ, **environment}
    done = subprocess.run([*command, *options], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == status, done.stderr
    return done.stderr if status else done.stdout
