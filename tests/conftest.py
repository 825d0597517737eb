"""Fixtures that several test files share."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Runs a test on one core: tiny networks lose more to thread hand-overs than they gain."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image-folder of three classes with eleven images of 8×8 pixels each."""
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(20190430)
    for label, name in enumerate(["circle", "cross", "star"]):
        (folder / name).mkdir()
        for index in range(11):
            pixels = rng.integers(0, 120, (8, 8, 3)) + 60 * label
            Image.fromarray(pixels.astype(np.uint8)).save(folder / name / f"{index}.png")
    return folder


TINY = (
    "--dataset image-folder --image-size 8 --channels 1 --cells 3 3 3 --epochs 2 --warmup-epochs 1 "
    "--validation-epochs 1 --batch-size 5 --backend reference --skip-dropout 0 0.4 0.7 "
    "--alpha-lr 0.01 --threads 1 --log-interval 2 --device cpu"
)


@pytest.fixture(scope="session")
def tiny(images: Path) -> Callable[..., list[str]]:
    """Makes the command line of a search of seconds; later flags win over its own."""
    return lambda run, *flags: [
        "search", *TINY.split(), "--data", str(images), "--run-dir", str(run), *map(str, flags)
    ]  # fmt: skip


class Processes:
    """Starts commands as processes through `search_process/server.py`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._number = 0
        server = Path(__file__).parent / "search_process" / "server.py"
        self._server = subprocess.Popen(
            [sys.executable, str(server)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"},
        )

    def start(
        self,
        arguments: Sequence[str],
        *,
        toy: bool = True,
        kill: tuple[str, int, str] | None = None,
        fault: tuple[str, int, str] | None = None,
        counts: Sequence[str] = (),
        pauses: Mapping[str, float] | None = None,
        terminal: str | None = None,
        environment: Mapping[str, str] | None = None,
        network: str = "ToyNetwork",
    ) -> Process:
        """Starts ``pdarts-fast arguments``.

        Args:
            toy: Replace the supernet, the drawings and the report by quick stand-ins.
            kill: ``(module:attribute, n, before|after|half)``: SIGKILL at the n-th call.
            fault: ``(module:attribute, n, kind)``: the n-th and later calls fail; the kinds are
                those of `fail_at`.
            counts: Calls to count.
            pauses: Calls to make slower, in seconds.
            terminal: Path of a terminal that takes the place of standard error.
            environment: Variables to add.
            network: Which of the stand-ins of `toy_network.py` takes the place of the supernet.
        """
        self._number += 1
        outputs = {
            name: str(self._folder / f"{self._number}.{name}") for name in ("stdout", "stderr")
        }
        job = {
            "arguments": list(arguments), "toy": toy, "kill": kill, "fault": fault,
            "counts": list(counts), "pauses": dict(pauses or {}), "cwd": str(self._folder),
            "environment": dict(environment or {}), "network": network,
            **outputs, **({"stderr": terminal} if terminal else {}),
        }  # fmt: skip
        return Process(self, int(self.ask(job)), Path(outputs["stdout"]))

    def run(self, arguments: Sequence[str], **options: Any) -> Process:
        """Starts a command and waits for its end."""
        process = self.start(arguments, **options)
        process.wait()
        return process

    def ask(self, request: dict[str, Any]) -> str:
        """Sends a request to the server; returns its answer."""
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        return self._server.stdout.readline()

    def close(self) -> None:
        """Ends the server."""
        self._server.communicate(timeout=10)


class Process:
    """One command that was started.

    Attributes:
        pid: Process id.
        status: Exit status once it was waited for, negative for a signal.
    """

    def __init__(self, processes: Processes, pid: int, stdout: Path) -> None:
        self.pid = pid
        self.status: int | None = None
        self._processes = processes
        self._stdout = stdout

    def wait(self) -> int:
        """Exit status, negative for a signal."""
        self.status = int(self._processes.ask({"wait": self.pid}))
        return self.status

    @property
    def stdout(self) -> str:
        """What it has written to standard output."""
        return self._stdout.read_text()

    @property
    def stderr(self) -> str:
        """What it has written to standard error."""
        path = self._stdout.with_suffix(".stderr")
        return path.read_text() if path.exists() else ""

    def error_line(self, status: int) -> str:
        """The one error line of a command that ended with a status, at the end of its log."""
        assert self.status == status, self.stderr
        lines = self.stderr.splitlines()
        errors = [line for line in lines if line.startswith("pdarts-fast: error: ")]
        assert errors == lines[-1:], self.stderr
        assert "Traceback" not in self.stderr
        return errors[0]

    @property
    def counts(self) -> dict[str, int]:
        """How often the counted calls were made."""
        return json.loads(self._stdout.with_suffix(".counts").read_text())


@pytest.fixture(scope="session")
def processes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Processes]:
    """Starts ``pdarts-fast`` commands as processes of their own."""
    started = Processes(tmp_path_factory.mktemp("processes"))
    yield started
    started.close()


TIMING = ("seconds", "overhead_seconds", "images_per_second", "peak_memory_mib")


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The records of metrics.jsonl without those keys that differ from run to run."""
    records = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [{k: v for k, v in record.items() if k not in TIMING} for record in records]


@pytest.fixture(scope="session")
def outcome() -> Callable[[Path], dict[str, Any]]:
    """Reads everything of a run that has to be the same when it is repeated or resumed."""

    def read(run: Path) -> dict[str, Any]:
        files = ["alphas.json", "genotype.json", "alphas.jsonl"]
        files += sorted(path.name for path in run.glob("supernet-stage*.safetensors"))
        return {name: (run / name).read_bytes() for name in files} | {"metrics": read_metrics(run)}

    return read


@pytest.fixture(scope="session")
def jpeg_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of JPEGs in ImageNet's layout: train/ and val/, three classes, sizes of all kinds.

    A class has one colour, so that it can be told from the others after any crop.
    """
    rng = np.random.default_rng(7)
    folder = tmp_path_factory.mktemp("jpegs")
    for split, count in (("train", 6), ("val", 3)):
        for label, name in enumerate(("red", "green", "blue")):
            (folder / split / name).mkdir(parents=True)
            for number in range(count):
                height, width = rng.integers(20, 60, size=2)
                pixels = rng.integers(0, 60, size=(height, width, 3), dtype=np.uint8)
                pixels[..., label] += 150
                Image.fromarray(pixels).save(folder / split / name / f"{number}.jpg", quality=95)
    return folder


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Headless Chromium."""
    path = Path(__file__).parent / "browser.py"
    spec = importlib.util.spec_from_file_location("browser_of_tests", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if module.CHROMIUM is None:
        pytest.skip("no Chromium on PATH: apt-get install chromium")
    browser = module.Browser(tmp_path_factory.mktemp("profile"))
    try:
        yield browser
    finally:
        browser.close()


@pytest.fixture
def page(browser: Any) -> Any:
    """A fresh tab of the browser."""
    browser.open_page()
    return browser
