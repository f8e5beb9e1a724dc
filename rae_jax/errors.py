"""The one error that means: the user can mend this. main prints its message as a single line."""


class UserError(Exception):
    """A mistake in flags, config, data or workdir; the message names the thing and the mend."""
