"""What the commands share: a mistake in the flags is one line on stderr, exit status 2, and no traceback."""

import contextlib
import os
import re
import sys

from absl import flags
from ml_collections import config_flags

from rae_jax.errors import UserError
from rae_jax.runtime import processes, shutdown

RESTART = 75  # exit status: a launcher runs the same command again (EX_TEMPFAIL of sysexits.h)


def parser(config_flag, values=flags.FLAGS):
    """absl's parser for a command whose --config is `config_flag`, with ml_collections' complaints as one line."""

    def parse(argv):
        try:
            arguments = values(argv)
            if config_flag.value is not None:
                config_flag.value.stages  # noqa: B018  a file that could not be loaded complains only when it is used
        except flags.Error as error:
            fail(_one_line(error))
        except OSError:
            path = config_flags.get_config_filename(values["config"])
            fail(f"cannot load --config={path}: name a file such as configs/small.py")
        except (AttributeError, KeyError) as error:
            fail(f"unknown config key {_one_line(error)}")
        except (TypeError, ValueError) as error:
            fail(f"in a --config flag: {_one_line(error)}")
        if len(arguments) > 1:
            fail(f"unknown argument {arguments[1]!r}: flags look like --name=value")
        return arguments

    return parse


def plain_parser(argv):
    """absl's parser for a command without a config, with its complaints as one line."""
    try:
        arguments = flags.FLAGS(argv)
    except flags.Error as error:
        fail(_one_line(error))
    if len(arguments) > 1:
        fail(f"unknown argument {arguments[1]!r}: flags look like --name=value")
    return arguments


@contextlib.contextmanager
def peers():
    """Where one of several processes is gone, the others cannot go on: say so, and end at once with status RESTART.

    Without the usual end of a program, which would wait for all processes.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, UserError) or not processes.lost_another(error):
            raise
        shutdown.follow()
        reason = " ".join(str(error).split())[:300]
        print(
            f"another process of this run is gone, or cannot be reached ({reason}): run the same command again on all "
            f"hosts, which goes on from the last checkpoint",
            file=sys.stderr,
            flush=True,
        )
        os._exit(RESTART)


class Failed(SystemExit):
    """The end of a command that a `message` explains; exit status 2."""

    def __init__(self, message):
        super().__init__(2)
        self.message = message


def fail(message):
    """End the command."""
    print(f"error: {message}", file=sys.stderr)
    raise Failed(message)


def _one_line(error):
    text = str(error.args[0] if error.args else error).replace("\\n", "\n")
    text = re.sub(r"(?<!\w)'|'(?!\w)|\\", "", text)  # quotes of a repr, which may come unpaired
    return ": ".join(" ".join(line.split()) for line in text.splitlines() if line.strip())
