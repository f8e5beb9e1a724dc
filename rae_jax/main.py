"""The command line: flags -> config -> mode.

python -m rae_jax.main --config=configs/small.py --workdir=runs/small [--mode=train] [--config.KEY=VALUE ...]
"""

import signal
import sys

import jax
from absl import app, flags, logging
from etils import epath
from ml_collections import config_flags

from rae_jax import command, malloc, modes, sharding
from rae_jax import config as config_lib
from rae_jax.errors import UserError
from rae_jax.train import DivergedRun, InterruptedRun

MODES = {"train": modes.train, "evaluate": modes.evaluate, "sample": modes.sample, "reconstruct": modes.reconstruct}
DIVERGED = 1  # exit status after a loss that is not finite; 2 is a mistake that the user can mend
INTERRUPTED = 130  # after Ctrl-C, with all saved; after SIGTERM it is command.RESTART

_CONFIG = config_flags.DEFINE_config_file("config", None, "Config file; override its keys with --config.KEY=VALUE.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run, local or gs://.")
_MODE = flags.DEFINE_enum("mode", "train", list(MODES), "What to do.")
flags.DEFINE_integer("step", None, "evaluate, sample: checkpoint of the last stage; the newest by default.")
flags.DEFINE_string(
    "samples", None, "evaluate: an .npz with arr_0, or a folder of images, judged instead of the model's own."
)
flags.DEFINE_string("images", None, "reconstruct: an image or a folder of images.")
flags.DEFINE_integer("num_images", 80, "sample: how many.")
flags.DEFINE_string("labels", "balanced", "sample: balanced (classes in turn), random, or a file, one label a line.")
flags.DEFINE_integer("label", None, "sample: a single class.")
flags.DEFINE_bool("debug", False, "Show the traceback of a mistake, and what libraries log.")
flags.mark_flags_as_required(["config", "workdir"])


def run(argv):
    """Run one mode; a user's mistake ends as one line and exit status 2."""
    logging.set_verbosity(logging.INFO if flags.FLAGS.debug else logging.FATAL)
    signal.signal(signal.SIGTERM, _terminate)  # where the loop does not handle it
    try:
        config, workdir = _CONFIG.value, epath.Path(_WORKDIR.value)
        malloc.keep_freed_memory()
        mesh = sharding.make_mesh(config.mesh)
        config_lib.check(config, mesh)
        config_lib.check_workdir(config, workdir)
        with command.peers():
            MODES[_MODE.value](config.lock(), workdir, mesh, flags.FLAGS)
    except UserError as error:
        if flags.FLAGS.debug:
            raise
        command.fail(str(error))
    except DivergedRun as stop:
        print(f"error: {stop}; lower that stage's learning_rate, or set clip_norm", file=sys.stderr)
        sys.exit(DIVERGED)
    except InterruptedRun as stop:
        print(f"{stop}; saved: run the same command again to go on", file=sys.stderr)
        sys.exit(command.RESTART if stop.number == signal.SIGTERM else INTERRUPTED)
    except KeyboardInterrupt as stop:  # where no stage is at its steps
        print("interrupted: run the same command again to go on from the last checkpoint", file=sys.stderr)
        sys.exit(command.RESTART if isinstance(stop, _Terminated) else INTERRUPTED)
    except jax.errors.JaxRuntimeError as error:
        if flags.FLAGS.debug or "RESOURCE_EXHAUSTED" not in str(error):
            raise
        command.fail("the devices are out of memory: lower batch_size, or raise config.mesh.fsdp or microbatches")
    except (OSError, MemoryError) as error:  # the machine's, not the program's
        if flags.FLAGS.debug:
            raise
        reason = " ".join(str(error).split()) or type(error).__name__
        command.fail(f"{reason}; run again with --debug to see where, or to go on from the last checkpoint")


class _Terminated(KeyboardInterrupt):
    """SIGTERM."""


def _terminate(number, frame):
    raise _Terminated


if __name__ == "__main__":
    app.run(run, flags_parser=command.parser(_CONFIG))
