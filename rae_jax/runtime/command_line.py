"""Flags and exit status of all commands: a mistake in the flags is one line on stderr, status 2, and no traceback."""

import contextlib
import os
import re
import sys

import jax
from absl import flags

from rae_jax.errors import UserError, one_line
from rae_jax.runtime import atomic_files, processes, shutdown

MISTAKE = 2  # exit status of a mistake that the user can fix
RESTART = 75  # exit status: a launcher runs the same command again (EX_TEMPFAIL of sysexits.h)


def show_in_help(module):
    """Let --help list the flags that `module` defines; absl lists only the flags of the script sys.argv[0]."""
    for flag in flags.FLAGS.get_flags_for_module(module):
        flags.FLAGS.register_key_flag_for_module(sys.argv[0], flag)


def use_own_jax_options():
    """Undo options of the environment that are meant for other programs: with 64 bits other numbers would be drawn."""
    for name, value in (
        ("enable_x64", False),
        ("numpy_rank_promotion", "allow"),
        ("numpy_dtype_promotion", "standard"),
    ):
        jax.config.update(f"jax_{name}", value)


class _PathParser(flags.ArgumentParser):
    """Parses a path; ~ is the user's home, which shells do not expand in --flag=~/folder."""

    syntactic_help = "a path"

    def parse(self, text):
        return os.path.expanduser(text)


PATH = _PathParser()  # for flags.DEFINE: a file or a folder, local or gs://


def plain_parser(argv, values=flags.FLAGS):
    """Parse the flags as absl does; report a mistake as one line."""
    try:
        return _without_words(values(argv))
    except flags.Error as error:
        fail(words_of(error))


def _without_words(arguments):
    """Return the program's name, the only argument that may be left when the flags are taken."""
    if len(arguments) > 1:
        fail(f"unknown argument {arguments[1]!r}: flags look like --name=value")
    return arguments


@contextlib.contextmanager
def peers():
    """Report the loss of another process of the run, and end at once with status RESTART.

    The usual end of a program would wait for all processes.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, UserError) or not processes.lost_another(error):
            raise
        shutdown.end_if_another_has()
        reason = one_line(error, longest=300)
        print(
            f"another process of this run is lost or cannot be reached ({reason}): run the same command again on all "
            f"hosts; it resumes from the last checkpoint",
            file=sys.stderr,
            flush=True,
        )
        os._exit(RESTART)


def fail_without_bucket(error, workdir):
    """End the command if a package is missing that reaches the workdir's bucket; otherwise raise the error again."""
    if "://" not in str(workdir):
        raise error
    fail(f"--workdir={workdir}: {atomic_files.reason(error)}; gs:// needs an extra: pip install -e '.[gcs]'")


class Failed(SystemExit):
    """Exit with the status MISTAKE after a `message`."""

    def __init__(self, message):
        super().__init__(MISTAKE)
        self.message = message


def fail(message):
    """Print the message and end the command."""
    print(f"error: {message}", file=sys.stderr)
    raise Failed(message)


def words_of(error):
    """Return the message of an error of absl or ml_collections as one line, without the quotes of a repr."""
    text = str(error.args[0] if error.args else error).replace("\\n", "\n")
    text = re.sub(r"(?<!\w)'|'(?!\w)|\\", "", text)  # quotes of a repr, which may be unpaired
    return ": ".join(" ".join(line.split()) for line in text.splitlines() if line.strip())
