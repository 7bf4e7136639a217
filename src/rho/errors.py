"""The errors a user can cause. Each message says what was expected, what was found, where, and what to do."""


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
