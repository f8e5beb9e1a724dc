"""The command line: flags -> config -> mode.

python -m rae_jax.main --config=configs/small.py --workdir=runs/small [--mode=train] [--config.KEY=VALUE ...]

The same as `rae-jax --config=small ...`.
"""

import os
import signal
import sys

import jax
from absl import app, flags, logging
from etils import epath
from ml_collections import config_flags

from rae_jax.build import command_line_weights
from rae_jax.cli import benchmark, demo, evaluate, reconstruct, sample, train
from rae_jax.cli import compile as compile_mode
from rae_jax.config import checks, command_flag, machine, run_config, scopes
from rae_jax.config import files as config_files
from rae_jax.data import shard_index
from rae_jax.errors import UserError, one_line
from rae_jax.profiling import timing
from rae_jax.runtime import command_line, host_allocator, processes, sharding, shutdown
from rae_jax.runtime.health import DivergedRun
from rae_jax.training.loop import InterruptedRun

MODES = {
    **{"train": train.run, "evaluate": evaluate.run, "sample": sample.run, "reconstruct": reconstruct.run},
    **{"benchmark": benchmark.run, "demo": demo.run},
}
USAGE = """\
Representation autoencoders, and diffusion transformers in their latent space. The commands that people use most:

  rae-jax --config=small --workdir=runs/first                     train; the same command resumes
  rae-jax --workdir=runs/first --mode=sample                      draw images
  rae-jax --workdir=runs/first --mode=evaluate                    measure the weights
  rae-jax --workdir=runs/first --mode=reconstruct --images=PATH   encode and decode images
  rae-jax --workdir=runs/first --mode=demo                        show the model on a local web page

--config names a file or one of these configs, and is needed only to begin a run, which keeps its config:
{names}

--config.KEY=VALUE changes a key of the config; docs/config.md explains all keys.
--config=own_data --config.data.path=FOLDER --config.data.num_classes=N trains on your images.
python -m rae_jax.main is the same command. rae-jax --help lists all flags.
Pages to read: README.md and docs/README.md.
"""
_NO_CONFIG = "name a config, such as small, or its file; or set --workdir to the folder of a run, which has a config"
DOES_NOT_FIT = 1  # exit status of --mode=compile
DIVERGED = 1  # exit status after a loss that is not finite; 2 is a mistake that the user can fix
INTERRUPTED = 130  # after Ctrl-C and the last save; after SIGTERM the status is command_line.RESTART


def main():
    """Define the flags and run the command; without arguments, print how to use it."""
    if len(sys.argv) == 1:
        print(USAGE.format(names=", ".join(config_files.names())), end="", file=sys.stderr)
        sys.exit(command_line.MISTAKE)
    config = _define_flags()
    command_line.show_in_help(__name__)
    app.run(_run, flags_parser=command_flag.parser(config, command_line_weights.complete))


def _define_flags():
    """Define the command's flags and return the config's."""
    config = config_flags.DEFINE_config_file(
        "config",
        None,
        "Config: a file (configs/dit_b.py) or the name of a config that ships with rae_jax (dit_b). "
        "By default that of the run in --workdir. --config.KEY=VALUE overrides a key.",
    )
    flags.DEFINE(command_line.PATH, "workdir", None, "Folder of the run, local or gs://.")
    flags.DEFINE_enum("mode", "train", [*MODES, "compile"], "Task to run.")
    flags.DEFINE_bool("debug", False, "Show the traceback of an error, and the log messages of libraries.")
    flags.register_validator("config", lambda value: value is not None, _NO_CONFIG)
    without_workdir = ("compile", "benchmark")
    flags.register_multi_flags_validator(
        ["workdir", "mode"],
        lambda given: given["workdir"] or given["mode"] in without_workdir,
        message="this mode needs the folder of a run: set --workdir=DIR",
    )
    _define_flags_of_modes()
    return config


def _define_flags_of_modes():
    flags.DEFINE_integer("step", None, "evaluate, sample: step of the last stage's checkpoint; the newest by default.")
    flags.DEFINE(
        command_line.PATH,
        "samples",
        None,
        "evaluate: .npz with arr_0, or folder of images, to evaluate instead of the model's samples.",
    )
    flags.DEFINE(command_line.PATH, "images", None, "reconstruct: an image or a folder of images.")
    flags.DEFINE_integer("num_images", 80, "sample: number of images.")
    flags.DEFINE(
        command_line.PATH, "labels", "balanced", "sample: 'balanced' (classes in turn), 'random', or a file of labels."
    )
    flags.DEFINE_integer("label", None, "sample: draw this class only.")
    flags.DEFINE_string("topology", None, "compile: TPU slice to compile for, such as v5e:16x16.")
    flags.DEFINE_integer("num_slices", 1, "compile: number of slices.")
    flags.DEFINE_multi_enum(
        "program", ["train", "sample"], ["train", "sample"], "compile: program to compile; both by default."
    )
    flags.DEFINE_list("only", timing.DEFAULT, "benchmark: programs to time; train_few_step too, if it is named.")
    flags.DEFINE_integer("timed_steps", 10, "benchmark: timed steps of each program.", lower_bound=1)
    flags.DEFINE_integer("warmup_steps", 2, "benchmark: steps that run before the timed steps.", lower_bound=0)
    flags.DEFINE(command_line.PATH, "profile", None, "benchmark: folder for traces of some further steps.")
    flags.DEFINE_string("coordinator", None, "Several processes: HOST:PORT of process 0; detected on a cluster.")
    flags.DEFINE_integer("num_processes", None, "Several processes: number of processes.")
    flags.DEFINE_integer("process_id", None, "Several processes: index of this process, from 0.")
    flags.DEFINE_string("host", "127.0.0.1", "demo: address to listen on; 0.0.0.0 accepts other machines.")
    flags.DEFINE_integer("port", 7860, "demo: port to listen on.", lower_bound=1, upper_bound=65535)


def _run(argv):
    """Run one mode; a mistake of the user is one line on stderr and exit status 2."""
    given = flags.FLAGS
    logging.set_verbosity(logging.INFO if given.debug else logging.FATAL)
    signal.signal(signal.SIGTERM, _terminate)  # outside of the training loop, which handles it
    try:
        with shutdown.end_together((DivergedRun, InterruptedRun)):
            _run_mode(given)
    except DivergedRun as stop:
        print(
            f"error: {stop}; train in another --workdir with a lower learning_rate and final_learning_rate, or with "
            f"clip_norm; config.health.skip continues this run",
            file=sys.stderr,
        )
        sys.exit(DIVERGED)
    except InterruptedRun as stop:
        print(f"{stop}; saved: run the same command again to resume", file=sys.stderr)
        sys.exit(command_line.RESTART if stop.number == signal.SIGTERM else INTERRUPTED)


def _run_mode(given):
    """Run the mode; an error that the user can fix is one line."""
    try:
        config = given.config
        if given.mode == "compile":
            sys.exit(0 if compile_mode.run(config, given) else DOES_NOT_FIT)
        host_allocator.keep_freed_memory()
        command_line.use_own_jax_options()
        processes.start(**{name: given[name].value for name in processes.SETTINGS})
        sharding.all_devices()
        shutdown.watch()
        _keep_compiled(config.compilation_cache)
        workdir = epath.Path(given.workdir) if given.workdir else None  # --mode=benchmark needs none
        if workdir is not None:
            shard_index.keep_in(workdir / "index", copies=True)
        config, mesh = _checked(config, workdir, given.mode)
        with command_line.peers():
            processes.wait_for_all("checked")  # before process 0 writes to the workdir
            MODES[given.mode](config.lock(), workdir, mesh, given)
            processes.wait_for_all("done")
    except UserError as error:
        if given.debug:
            raise
        command_line.fail(str(error))
    except ImportError as error:
        if given.debug:
            raise
        command_line.fail_without_bucket(error, given.workdir)
    except KeyboardInterrupt as stop:  # outside of the training loop
        print("interrupted: run the same command again to resume from the last checkpoint", file=sys.stderr)
        sys.exit(command_line.RESTART if isinstance(stop, _Terminated) else INTERRUPTED)
    except jax.errors.JaxRuntimeError as error:
        if given.debug or "RESOURCE_EXHAUSTED" not in str(error):
            raise
        command_line.fail("the devices are out of memory: lower batch_size, or raise config.mesh.fsdp or microbatches")
    except (OSError, MemoryError) as error:  # of the machine, not of the program
        if given.debug:
            raise
        command_line.fail(
            f"{one_line(error)}; run again to resume from the last checkpoint, or with --debug for the traceback"
        )


def _checked(config, workdir, mode):
    """Return (config, mesh) on the devices here, after all checks of what the mode uses."""
    match mode:
        case "train":
            run_config.check(config, workdir, *config.stages)
        case "benchmark":  # it uses no weights
            pass
        case _:
            run_config.check(config, workdir, scopes.MODEL)
            config = machine.adapted(config, workdir)
    mesh = sharding.make_mesh(config.mesh)
    checks.check(config, mesh, trains=mode in ("train", "benchmark"), evaluates=mode in ("train", "evaluate"))
    return config, mesh


class _Terminated(KeyboardInterrupt):
    """SIGTERM."""


def _terminate(number, frame):
    raise _Terminated


def _keep_compiled(folder):
    """Keep compiled programs for the next start, in JAX_COMPILATION_CACHE_DIR if that is set, otherwise in `folder`.

    Programs for several simulated CPU devices are not kept: when XLA loads such a program, the order between
    collectives inside a loop and after the loop is lost (tests/stress/collectives.py).
    """
    if jax.default_backend() == "cpu" and jax.device_count() > 1:
        jax.config.update("jax_enable_compilation_cache", False)
        return
    if folder == "none" or os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        return
    folder = os.path.expanduser(folder or f"{os.environ.get('XDG_CACHE_HOME') or '~/.cache'}/rae_jax/compiled")
    if not folder.startswith("~"):  # a user without a home directory: nothing is kept
        jax.config.update("jax_compilation_cache_dir", folder)


if __name__ == "__main__":
    main()
