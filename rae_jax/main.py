"""The command line: flags -> config -> mode.

python -m rae_jax.main --config=configs/small.py --workdir=runs/small [--mode=train] [--config.KEY=VALUE ...]
"""

import os
import signal
import sys

import jax
from absl import app, flags, logging
from etils import epath
from ml_collections import config_flags

from rae_jax.cli import modes
from rae_jax.config import checks
from rae_jax.config import keys as config_keys
from rae_jax.errors import UserError
from rae_jax.profiling import timing
from rae_jax.runtime import atomic_files, command_line, host_allocator, processes, sharding, shutdown
from rae_jax.training.loop import DivergedRun, InterruptedRun

MODES = {
    **{"train": modes.train, "evaluate": modes.evaluate, "sample": modes.sample, "reconstruct": modes.reconstruct},
    **{"benchmark": modes.benchmark, "demo": modes.demo},
}
DOES_NOT_FIT = 1  # exit status of --mode=compile
DIVERGED = 1  # exit status after a loss that is not finite; 2 is a mistake that the user can mend
INTERRUPTED = 130  # after Ctrl-C, with all saved; after SIGTERM it is command.RESTART


def main():
    """Define the flags and run the command."""
    app.run(_run, flags_parser=command_line.parser(_define_flags()))


def _define_flags():
    """Define the command's flags; returns that of the config."""
    config = config_flags.DEFINE_config_file("config", None, "Config file; override its keys with --config.KEY=VALUE.")
    flags.DEFINE_string("workdir", None, "Folder of the run, local or gs://.")
    flags.DEFINE_enum("mode", "train", [*MODES, "compile"], "What to do.")
    flags.DEFINE_bool("debug", False, "Show the traceback of a mistake, and what libraries log.")
    flags.mark_flag_as_required("config")
    without_workdir = ("compile", "benchmark")
    flags.register_multi_flags_validator(
        ["workdir", "mode"],
        lambda given: given["workdir"] is not None or given["mode"] in without_workdir,
        message="flag --workdir=None: this mode needs a folder",
    )
    _define_flags_of_modes()
    return config


def _define_flags_of_modes():
    flags.DEFINE_integer("step", None, "evaluate, sample: checkpoint of the last stage; the newest by default.")
    flags.DEFINE_string(
        "samples", None, "evaluate: an .npz with arr_0, or a folder of images, judged instead of the model's own."
    )
    flags.DEFINE_string("images", None, "reconstruct: an image or a folder of images.")
    flags.DEFINE_integer("num_images", 80, "sample: how many.")
    flags.DEFINE_string("labels", "balanced", "sample: balanced (classes in turn), random, or a file of labels.")
    flags.DEFINE_integer("label", None, "sample: a single class.")
    flags.DEFINE_string("topology", None, "compile: the TPU slice to compile for, such as v5e:16x16.")
    flags.DEFINE_integer("num_slices", 1, "compile: how many such slices.")
    flags.DEFINE_multi_enum("program", ["train", "sample"], ["train", "sample"], "compile: which; both by default.")
    flags.DEFINE_list("only", list(timing.PROGRAMS), "benchmark: which programs; all by default.")
    flags.DEFINE_integer("timed_steps", 10, "benchmark: how many steps of each are timed,", lower_bound=1)
    flags.DEFINE_integer("warmup_steps", 2, "benchmark: after so many.", lower_bound=0)
    flags.DEFINE_string("profile", None, "benchmark: a folder for traces of a few more steps.")
    flags.DEFINE_string("coordinator", None, "Several processes: HOST:PORT of the first; found by itself in a cluster.")
    flags.DEFINE_integer("num_processes", None, "Several processes: how many.")
    flags.DEFINE_integer("process_id", None, "Several processes: which one this is, from 0.")
    flags.DEFINE_string("host", "127.0.0.1", "demo: the address to listen on; 0.0.0.0 lets other machines in.")
    flags.DEFINE_integer("port", 7860, "demo: the port to listen on.", lower_bound=1, upper_bound=65535)


def _run(argv):
    """Run one mode; a user's mistake ends as one line and exit status 2."""
    given = flags.FLAGS
    logging.set_verbosity(logging.INFO if given.debug else logging.FATAL)
    signal.signal(signal.SIGTERM, _terminate)  # where the loop does not handle it
    try:
        with shutdown.together((DivergedRun, InterruptedRun)):
            _run_mode(given)
    except DivergedRun as stop:
        print(f"error: {stop}; lower that stage's learning_rate, or set clip_norm", file=sys.stderr)
        sys.exit(DIVERGED)
    except InterruptedRun as stop:
        print(f"{stop}; saved: run the same command again to go on", file=sys.stderr)
        sys.exit(command_line.RESTART if stop.number == signal.SIGTERM else INTERRUPTED)


def _run_mode(given):
    """What a person can mend ends in one line."""
    try:
        config = given.config
        if given.mode == "compile":
            sys.exit(0 if modes.compile_ahead(config, given) else DOES_NOT_FIT)
        workdir = epath.Path(given.workdir or ".")  # a benchmark has none
        host_allocator.keep_freed_memory()
        processes.start(**{name: given[name].value for name in processes.SETTINGS})
        shutdown.watch()
        _keep_compiled(config.compilation_cache)
        mesh = sharding.make_mesh(config.mesh)
        checks.check(config, mesh)
        if given.workdir is not None:
            config_keys.check_workdir(config, workdir)
        with command_line.peers():
            processes.wait_for_all("checked")  # before the first one writes there
            MODES[given.mode](config.lock(), workdir, mesh, given)
            processes.wait_for_all("done")
    except UserError as error:
        if given.debug:
            raise
        command_line.fail(str(error))
    except ImportError as error:
        if given.debug or "://" not in str(given.workdir):
            raise
        command_line.fail(
            f"--workdir={given.workdir}: {atomic_files.reason(error)}; pip install -e '.[gcs]' brings what gs:// needs"
        )
    except KeyboardInterrupt as stop:  # where no stage is at its steps
        print("interrupted: run the same command again to go on from the last checkpoint", file=sys.stderr)
        sys.exit(command_line.RESTART if isinstance(stop, _Terminated) else INTERRUPTED)
    except jax.errors.JaxRuntimeError as error:
        if given.debug or "RESOURCE_EXHAUSTED" not in str(error):
            raise
        command_line.fail("the devices are out of memory: lower batch_size, or raise config.mesh.fsdp or microbatches")
    except (OSError, MemoryError) as error:  # the machine's, not the program's
        if given.debug:
            raise
        reason = " ".join(str(error).split()) or type(error).__name__
        command_line.fail(f"{reason}; run again with --debug to see where, or to go on from the last checkpoint")


class _Terminated(KeyboardInterrupt):
    """SIGTERM."""


def _terminate(number, frame):
    raise _Terminated


def _keep_compiled(folder):
    """Have JAX keep what it compiles for the next start; where JAX_COMPILATION_CACHE_DIR says, if that is set.

    Programs of several simulated CPU devices are not kept: when XLA loads such a program, the order between collectives
    inside a loop and after the loop is lost (tests/stress/collectives.py).
    """
    if jax.default_backend() == "cpu" and jax.device_count() > 1:
        jax.config.update("jax_enable_compilation_cache", False)
        return
    if folder == "none" or os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        return
    home = epath.Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    jax.config.update("jax_compilation_cache_dir", str(folder or home / "rae_jax" / "compiled"))


if __name__ == "__main__":
    main()
