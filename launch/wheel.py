"""The build step of setuptools that pyproject.toml names: a wheel holds the configs as rae_jax/configs."""

import shutil
from pathlib import Path

from setuptools.command.build_py import build_py

CONFIGS = Path(__file__).parents[1] / "configs"


class BuildWithConfigs(build_py):
    """Copy configs/*.py into the package; an editable install uses the checkout's own."""

    def run(self):
        if not any(CONFIGS.glob("*.py")):  # a source distribution that lost them
            raise FileNotFoundError(f"{CONFIGS} holds no configs")
        super().run()
        if not self.editable_mode:
            target = Path(self.build_lib, "rae_jax", "configs")
            shutil.rmtree(target, ignore_errors=True)  # build/ may hold an older copy
            target.mkdir(parents=True)
            for path in CONFIGS.glob("*.py"):
                shutil.copy(path, target)
