"""Start runs as the work units of an XManager experiment: one for each combination of the values of --sweep.

    python -m launch.xm --title=seeds --sweep=config.seed=0,1 \
        -- bash launch/local.sh -- --config=configs/small.py --workdir=runs/seeds/{}
    python -m launch.xm --title=seeds --sweep=config.seed=0,1 \
        -- python -m launch.gke --name=seeds-{} --image=IMAGE ... -- --config=... --workdir=gs://BUCKET/seeds/{}

The first -- is followed by a launcher's command. {} in it becomes the number of the work unit, and the values of the
sweep are added at its end. Work units run one after the other; with launch.gke this means their submissions. XManager's
own executor for Kubernetes supports neither TPU slices nor several hosts. --dry_run only prints the commands; otherwise
run `pip install xmanager` first.
"""

import argparse
import itertools
import shlex
import shutil
import sys


def main(argv):
    """Run the work units, or print them."""
    given = _parse(argv)
    units = work_units(given.command, given.sweep)
    if given.dry_run:
        for unit in units:
            print(shlex.join(unit))
        return
    try:
        from absl import flags
        from xmanager import xm, xm_local
    except ImportError:
        raise SystemExit("error: XManager is not installed: pip install xmanager") from None
    flags.FLAGS(["xm", "--noxm_use_multiplexer"], known_only=True)

    @xm.run_in_asyncio_loop
    async def launch():
        async with xm_local.create_experiment(experiment_title=given.title) as experiment:
            for unit in units:
                program = xm.Packageable(xm.Binary(path=shutil.which(unit[0])), xm_local.Local.Spec(), args=unit[1:])
                (executable,) = experiment.package([program])
                added = await experiment.add(xm.Job(executable, xm_local.Local()))
                await added.wait_until_complete()

    launch()


def work_units(command, sweep):
    """Return one command for each combination of the values of `sweep`: {key: values}."""
    combinations = itertools.product(*([f"--{key}={value}" for value in values] for key, values in sweep))
    return [
        [word.replace("{}", str(number)) for word in command] + list(combination)
        for number, combination in enumerate(combinations, 1)
    ]


def _parse(argv):
    command = []
    if "--" in argv:
        argv, command = argv[: argv.index("--")], argv[argv.index("--") + 1 :]
    parser = argparse.ArgumentParser(prog="python -m launch.xm", allow_abbrev=False)
    parser.add_argument("--title", required=True, help="title of the experiment")
    parser.add_argument(
        "--sweep", default=[], action="append", type=_sweep, help="KEY=VALUE,VALUE,...; repeat it for more keys"
    )
    parser.add_argument("--dry_run", action="store_true", help="only print the commands of the work units")
    given = parser.parse_args(argv, argparse.Namespace(command=command))
    if not command or shutil.which(command[0]) is None:
        parser.exit(2, "error: no command after --, or an unknown one: add bash launch/local.sh -- ...\n")
    if given.sweep and not any(word.startswith("--workdir=") and "{}" in word for word in command):
        parser.exit(2, "error: each run of a sweep needs its own workdir: set --workdir=DIR/{}\n")
    return given


def _sweep(text):
    key, equals, values = text.lstrip("-").partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text} is not KEY=VALUE,VALUE,...")
    return key, values.split(",")


if __name__ == "__main__":
    main(sys.argv[1:])
