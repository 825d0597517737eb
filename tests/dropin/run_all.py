"""Runs several command lines of ``pdarts-fast``, each in a fork of one process.

Importing torch and its compiler takes longer than the searches of the tests do. Reads a JSON list
of ``{"argv": [...], "log": path}`` from standard input; writes the list of exit statuses.
"""

from __future__ import annotations

import json
import os
import sys
import traceback

import torch
import torch._dynamo

import pdarts_fast.dropin.runner  # noqa: F401
from pdarts_fast.cli import main


def run(argv: list[str], log: str) -> int:
    """Exit status of one command line in a child process; its output goes to a file."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    status = 1
    try:
        with open(log, "w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
            status = main(argv)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    torch.set_num_threads(1)
    jobs = json.load(sys.stdin)
    print(json.dumps([run(job["argv"], job["log"]) for job in jobs]))
