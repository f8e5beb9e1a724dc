"""The flag --config of the commands: a file or the name of a config, and its keys as --config.KEY=VALUE.

Without the flag, the config of the run in --workdir is used.
"""

import os

from absl import flags
from etils import epath

from rae_jax.config import files, run_config
from rae_jax.errors import UserError
from rae_jax.runtime import atomic_files, command_line


class FlagParser(flags.ArgumentParser):
    """Parses --config=SOURCE, --config=SOURCE:ARGUMENT, which calls get_config(ARGUMENT), and a run's config.json."""

    def parse(self, text):
        if _is_of_run(text):
            return run_config.read(epath.Path(text).parent).lock()
        source, *arguments = text.split(":", 1)
        return files.load(source, *arguments).lock()


def parser(config_flag, complete, values=flags.FLAGS):
    """Return absl's parser for a command with the flag `config_flag`; a mistake ends the command with one line.

    `complete(config, given, run, resumed=)` sets further keys of the config: see build/command_line_weights.
    """
    values[config_flag.name].parser = FlagParser()

    def parse(argv):
        try:
            argv = _with_config_of_run(argv)
            rest = command_line.plain_parser(argv, values)
            flag = values[config_flag.name]
            if flag.value is not None:
                run, resumed = _run(argv)
                complete(flag.value, set(flag.override_values), run, resumed=resumed)
            return rest
        except UserError as error:
            command_line.fail(str(error))
        except ImportError as error:
            command_line.fail_without_bucket(error, _value(argv, "workdir"))
        except (AttributeError, KeyError) as error:
            command_line.fail(f"unknown config key {command_line.words_of(error)}")
        except (TypeError, ValueError) as error:
            command_line.fail(f"a flag --config cannot be used: {command_line.words_of(error)}")
        except Exception as error:  # of many kinds, if a bucket cannot be reached
            if not isinstance(error, OSError) and "://" not in str(_value(argv, "workdir")):
                raise
            command_line.fail(f"--workdir={_value(argv, 'workdir')}: {atomic_files.reason(error)}")

    return parse


def _with_config_of_run(argv):
    """Return the arguments with the config of the run in --workdir, if they name no config and the run exists."""
    workdir = _value(argv, "workdir")
    if not workdir or _value(argv, "config") is not None:
        return argv
    path = epath.Path(os.path.expanduser(workdir)) / run_config.FILE
    return [argv[0], f"--config={path.parent}/{path.name}", *argv[1:]] if path.exists() else argv


def _is_of_run(config):
    """Return whether a value of --config is the config.json of a run."""
    return config.endswith(f"/{run_config.FILE}") and epath.Path(config).exists()


def _run(argv):
    """Return the folder of the run that --config or --workdir may name, or None; and whether --config names it."""
    config, workdir = _value(argv, "config"), _value(argv, "workdir")
    if config and _is_of_run(config):
        return os.path.dirname(config), True
    return (os.path.expanduser(workdir) if workdir else None), False


def _value(argv, name):
    """Return the last value of a flag in arguments that are not parsed yet; None without the flag."""
    found = None
    for argument, following in zip(argv[1:], [*argv[2:], ""], strict=False):
        flag, assigned, value = argument.partition("=")
        if flag in (f"-{name}", f"--{name}"):
            found = value if assigned else following
    return found
