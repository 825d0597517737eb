"""Errors that end a command with one line for the user instead of a traceback."""


class UsageError(ValueError):
    """A flag or value that cannot be used as given; the command line exits with status 2."""


class RunError(RuntimeError):
    """Something outside the command (data, disk, a checkpoint) failed; exit status 1."""
