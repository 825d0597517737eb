"""Starts ``pdarts-fast`` commands as processes of their own, without importing torch each time.

Reads one JSON object a line: a job to start (answer: its process id) or a process to wait for
(answer: its exit status, negative for a signal). A job may name a call at which it kills itself
with SIGKILL, so that a test can kill a search in the middle of anything.
"""

from __future__ import annotations

import errno
import functools
import importlib
import json
import os
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import torch

from pdarts_fast import cli, run_search, run_select, run_train, search, selection

sys.path.insert(0, str(Path(__file__).parent))

import toy_network

# What a first search would import on its way: seconds, but for every process.
for module in ("torch._dynamo", "pdarts_fast.data.image_folder"):
    importlib.import_module(module)

calls: Counter[str] = Counter()


def serve() -> None:
    """Answer requests until standard input ends."""
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            status = os.waitpid(request["wait"], 0)[1]
            print(os.waitstatus_to_exitcode(status), flush=True)
            continue
        child = os.fork()
        if child == 0:
            run(request)
        print(child, flush=True)


def run(job: dict[str, Any]) -> NoReturn:
    """Be the process of a job."""
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(job[name], os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    os.chdir(job["cwd"])
    os.environ.update(job["environment"])
    torch.set_num_threads(1)
    for module, name, replacement in TOYS if job["toy"] else ():
        setattr(importlib.import_module(module), name, replacement)
    if job["toy"]:
        search.Network = selection.Network = getattr(toy_network, job["network"])
    if job["kill"] is not None:
        place, call, when = job["kill"]
        watch(place, kill_at(place, call, when))
    if job["fault"] is not None:
        place, call, kind = job["fault"]
        watch(place, fail_at(place, call, kind))
    for place in job["counts"]:
        watch(place, lambda original, *args, **kwargs: original(*args, **kwargs))
    for place, seconds in job["pauses"].items():
        watch(place, functools.partial(pause, seconds))
    code = 1
    try:
        code = cli.main(job["arguments"])
    except SystemExit as stop:
        code = int(stop.code or 0)
    except BaseException:
        traceback.print_exc()
    if job["counts"]:
        Path(job["stdout"]).with_suffix(".counts").write_text(json.dumps(calls))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def watch(place: str, wrapper: Callable[..., Any]) -> None:
    """Replace ``module:attribute`` by ``wrapper(original, ...)``, counting its calls."""
    module, _, path = place.partition(":")
    *owners, name = path.split(".")
    owner = functools.reduce(getattr, owners, importlib.import_module(module))
    original = getattr(owner, name)

    def replacement(*args: Any, **kwargs: Any) -> Any:
        calls[place] += 1
        return wrapper(original, *args, **kwargs)

    setattr(owner, name, replacement)


def kill_at(place: str, call: int, when: str) -> Callable[..., Any]:
    """A wrapper that kills this process before or after the n-th call, or half-way through it."""

    def wrapper(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if calls[place] != call:
            return original(*args, **kwargs)
        if when == "after":
            original(*args, **kwargs)
        if when == "half":
            half_a_line(*args)
        return os.kill(os.getpid(), signal.SIGKILL)

    return wrapper


def fail_at(place: str, call: int, kind: str) -> Callable[..., Any]:
    """A wrapper whose n-th and later calls fail.

    Args:
        kind: Name of an errno to raise as OSError, ``bug`` for a RuntimeError, ``nan`` to turn
            the second argument, a tensor, into NaN, or ``drift`` to change the alphas of the
            first argument, a step, a little.
    """

    def wrapper(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if calls[place] < call:
            return original(*args, **kwargs)
        if kind == "nan":
            return original(args[0], args[1] * float("nan"), *args[2:], **kwargs)
        if kind == "drift":
            args[0].alphas[0].data.add_(1e-6)
            return original(*args, **kwargs)
        if kind == "bug":
            raise RuntimeError("a bug")
        number = getattr(errno, kind)
        raise OSError(number, os.strerror(number))

    return wrapper


def half_a_line(file: Any, record: dict[str, Any]) -> None:
    """Do what a `JsonLines.write` does that is killed when half of its bytes are written."""
    text = json.dumps(record)
    with open(file.path, "a") as stream:
        stream.write(text[: len(text) // 2])


def pause(seconds: float, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Make a call slow, so that a signal from outside hits it."""
    time.sleep(seconds)
    return original(*args, **kwargs)


def draw(genotype: Any, stem: Path) -> None:
    """Stands in for the drawings, which take longer than a toy search."""


def write_report(run_dir: Path, *, train_command: str | None = None) -> Path:
    """Stands in for the report."""
    return run_dir


TOYS = [
    (run_search.__name__, "draw_genotype", draw),
    (run_search.__name__, "write_report", write_report),
    (run_select.__name__, "draw_genotype", draw),
    (run_select.__name__, "write_report", write_report),
    (run_train.__name__, "draw_genotype", draw),
    (run_train.__name__, "write_train_report", write_report),
]

if __name__ == "__main__":
    serve()
