"""From the flags of the search command to its settings: for that command and for sweeps of it."""

from __future__ import annotations

from collections.abc import Sequence

from pdarts_fast.config import SearchConfig, preset
from pdarts_fast.flags import gathered, parse, run_defaults


def search_settings(arguments: Sequence[str]) -> SearchConfig:
    """The settings that the flags of a search give; they are not validated yet.

    Args:
        arguments: The command line after the command's name.

    Raises:
        UsageError: A flag or value is wrong.
        SystemExit: Help was asked for and printed.
    """
    words = gathered(arguments, "--target")
    return parse(SearchConfig, "search", words, run_defaults(words, preset, ["strategy"]))
