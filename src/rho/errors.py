"""The errors a user can cause. Each message says what was expected, what was found, where, and what to do."""

from pathlib import Path


class RhoError(Exception):
    """Base of every error that the command line prints without a traceback."""


class ConfigError(RhoError):
    """A setting is missing, unknown, out of range, or differs from the one an existing folder was made with."""


class DataError(RhoError):
    """An input file or record can't be used; the message names the file and, where there is one, the line."""


class UnscorableError(DataError):
    """A reference can't score one text; it may well score others."""


class MismatchError(RhoError):
    """Two artefacts don't belong together (corpus, tokenizer, scores, model); the message names both sides."""


class Stopped(RhoError):
    """A stage was asked to stop and did so in good order; the same command goes on. Not a failure."""


def check_path_or_name(place: str) -> None:
    """Refuse what is a path and leads nowhere: as a name on the Hub it would be asked for, several times.

    Raises:
        ConfigError: there is nothing, and no name on the Hub looks like this.
    """
    if not Path(place).exists() and (place.count("/") > 1 or place[:1] in "./~" or place.endswith(".json")):
        raise ConfigError(f"{place}: no such file or folder (seen from {Path.cwd()}).")


def unless_here(name: str) -> str:
    """A sentence for what was asked for on the Hub, where a misspelt path would be too."""
    return "" if Path(name).exists() else f" No file or folder of that name is in {Path.cwd()}: check the path."
