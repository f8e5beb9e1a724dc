"""The error that a user can fix, and the words of errors."""

import contextlib


class UserError(Exception):
    """A mistake in flags, config, data or workdir. Its message is one line: what is wrong, and what to do."""


@contextlib.contextmanager
def prefixed(prefix):
    """Put 'prefix: ' in front of the message of a UserError that is raised inside."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{prefix}: {error}") from error


def one_line(error, longest=None):
    """Return the words of an error as one line of at most `longest` characters, or its type's name if it has none."""
    return " ".join(str(error).split())[:longest] or type(error).__name__
