"""Going on with a run: its checkpoint, if it fits the settings and the images."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pdarts_fast.errors import RunError
from pdarts_fast.run.directory import RunDirectory
from pdarts_fast.settings import Settings, differing


def load_matching(
    config: Settings, facts: Mapping[str, Any], run: RunDirectory
) -> dict[str, Any] | None:
    """Read the newest whole checkpoint and cut the growing files back to its moment.

    Args:
        config: Settings, compared with the entry ``settings``.
        facts: What identifies the data set, as `Dataset.facts` gives it, compared with the entry
            ``dataset``.
        run: Open run directory; the entry ``files`` holds the lengths of its growing files.

    Returns:
        The checkpoint, or None if there is none: the run starts from the beginning.

    Raises:
        RunError: The checkpoint was made with other settings (names the flags) or other images.
    """
    saved = run.checkpoints.load()
    if saved is None:
        run.truncate({})
        return None
    others = differing(saved["settings"], config)
    if others:
        raise RunError(
            f"the checkpoint in {run.path} was made with other settings: {', '.join(others)}; "
            "leave those flags out to resume, or give another --run-dir"
        )
    changed = [key for key in facts if saved["dataset"].get(key) != facts[key]]
    if changed:
        raise RunError(
            f"the images differ from those of the checkpoint in {run.path} "
            f"({', '.join(changed)}): restore the folder of --data, or give another --run-dir"
        )
    run.truncate(saved["files"])
    return saved
