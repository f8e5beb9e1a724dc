"""The flag --config of the commands: a file or the name of a config, and its keys as --config.KEY=VALUE."""

from absl import flags

from rae_jax.config import files
from rae_jax.errors import UserError
from rae_jax.runtime import command_line


class FlagParser(flags.ArgumentParser):
    """Parses --config=SOURCE, and --config=SOURCE:ARGUMENT, which calls get_config(ARGUMENT)."""

    def parse(self, text):
        source, *arguments = text.split(":", 1)
        return files.load(source, *arguments).lock()


def parser(config_flag, values=flags.FLAGS):
    """Return absl's parser for a command with the flag `config_flag`; a mistake ends the command with one line."""
    values[config_flag.name].parser = FlagParser()

    def parse(argv):
        try:
            return command_line.plain_parser(argv, values)
        except UserError as error:
            command_line.fail(str(error))
        except (AttributeError, KeyError) as error:
            command_line.fail(f"unknown config key {command_line.words_of(error)}")
        except (TypeError, ValueError) as error:
            command_line.fail(f"a flag --config cannot be used: {command_line.words_of(error)}")

    return parse
