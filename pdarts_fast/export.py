"""The export command: a trained network as a torch.export or ONNX program, checked by running it.

A program takes normalised images float32 ``[N, 3, S, S]``, N free, and gives logits
``[N, classes]``. Beside its weights it carries, as JSON, the class names, the normalisation and
the genotype.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import logging
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pdarts_fast.errors import RunError, UsageError
from pdarts_fast.evaluation import image_size_of
from pdarts_fast.genotype import load_genotype
from pdarts_fast.kernels import backends
from pdarts_fast.run.files import disk_errors, write_atomically
from pdarts_fast.trained import Trained, load_trained

EXTRA_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
METADATA_FILE = "pdarts_fast.json"
# Batch sizes at which a program is compared with the network: the traced one and others.
CHECKED_BATCHES = (2, 1, 5)
# float32 networks of 20 cells in another order of summation differ by a few 1e-6 of the logits.
TOLERANCE = 1e-4
OPSET = 18


class Logits(nn.Module):
    """A derived network without the auxiliary output."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``[N, classes]`` of normalised images ``[N, 3, S, S]``."""
        return self.network(images)[0]


def run_export(
    source: Path,
    *,
    formats: Sequence[str] = ("torch", "onnx"),
    out: Path | None = None,
    weights: str = "best",
    genotype: str | None = None,
    image_size: int | None = None,
) -> list[Path]:
    """Write the programs of a network.

    Args:
        source: Run directory, weight file or published checkpoint.
        formats: ``torch``, ``onnx`` or both.
        out: Path of the programs without suffix.
        weights: ``best`` or ``last`` weights of a run.
        genotype: The cell of a published checkpoint, as `load_genotype` takes it.
        image_size: Side of the images in pixels.

    Returns:
        The files.

    Raises:
        UsageError: A value that cannot work, or packages for ONNX are missing.
        RunError: A program's answers differ from the network's, or a file cannot be written.
    """
    if "onnx" in formats:
        require_onnx()
    cells = load_genotype(genotype) if genotype is not None else None
    trained = load_trained(source, which=weights, genotype=cells)
    side = image_size_of(trained, image_size)
    base = out or (source if source.is_dir() else source.parent) / "network"
    with disk_errors(base):
        base.parent.mkdir(parents=True, exist_ok=True)
    # Other software has no kernels of ours.
    trained.network.use_backend(backends.REFERENCE)
    network = Logits(trained.network).eval()
    metadata = json.dumps(_metadata(trained, side))
    paths = []
    for name in dict.fromkeys(formats):
        write, suffix = {"torch": (export_torch, ".pt2"), "onnx": (export_onnx, ".onnx")}[name]
        path = base.with_name(base.name + suffix)
        error = write(network, side, path, metadata)
        print(f"{path} (largest difference of a logit {error:.1e})")
        paths.append(path)
    return paths


def require_onnx() -> None:
    """Raise `UsageError` if a package that ONNX needs is not installed."""
    missing = [name for name in EXTRA_PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise UsageError(
            f"--formats onnx needs {', '.join(missing)}: pip install 'pdarts-fast[export]', or "
            "give --formats torch"
        )


def export_torch(network: nn.Module, image_size: int, path: Path, metadata: str) -> float:
    """Write a ``torch.export`` program (``.pt2``, read by `torch.export.load`) and run it.

    Args:
        network: Gives logits; in evaluation mode, on the CPU.
        image_size: Side of the images in pixels.
        path: File to write.
        metadata: JSON text stored in it as ``pdarts_fast.json``.

    Returns:
        The largest difference between its logits and the network's.

    Raises:
        RunError: They differ by more than rounding, or the disk refuses.
    """
    images = torch.zeros((CHECKED_BATCHES[0], 3, image_size, image_size))
    batch = torch.export.Dim("batch", min=1)
    program = torch.export.export(network, (images,), dynamic_shapes={"images": {0: batch}})
    content = io.BytesIO()
    torch.export.save(program, content, extra_files={METADATA_FILE: metadata})
    write_atomically(path, content.getvalue())
    loaded = torch.export.load(path).module()
    return _check(path, network, lambda x: loaded(x), image_size)


def export_onnx(network: nn.Module, image_size: int, path: Path, metadata: str) -> float:
    """Write an ONNX model and run it in onnxruntime; arguments, result and errors as above.

    The metadata is stored in the model's property ``pdarts_fast``.
    """
    import onnx
    import onnxruntime

    images = torch.zeros((CHECKED_BATCHES[0], 3, image_size, image_size))
    batch = torch.export.Dim("batch", min=1)
    with _quiet():
        program = torch.onnx.export(
            network,
            (images,),
            input_names=["images"],
            output_names=["logits"],
            dynamic_shapes={"images": {0: batch}},
            opset_version=OPSET,
            dynamo=True,
            verbose=False,
        )
    assert program is not None
    model = program.model_proto
    entry = model.metadata_props.add()
    entry.key, entry.value = "pdarts_fast", metadata
    onnx.checker.check_model(model)
    write_atomically(path, model.SerializeToString())
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])

    def run(x: Tensor) -> Tensor:
        return torch.from_numpy(session.run(["logits"], {"images": x.numpy()})[0])

    return _check(path, network, run, image_size)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps the exporter's notes about itself from the user."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


def _check(path: Path, network: nn.Module, run: Any, image_size: int) -> float:
    """The largest difference of a logit between a program and the network, over random images."""
    generator = torch.Generator().manual_seed(0)
    worst = 0.0
    for batch in CHECKED_BATCHES:
        images = torch.randn((batch, 3, image_size, image_size), generator=generator)
        with torch.inference_mode():
            want = network(images)
            got = run(images)
        error = float((got - want).abs().max())
        if got.shape != want.shape or not error <= TOLERANCE * max(1.0, float(want.abs().max())):
            raise RunError(
                f"{path}: for a batch of {batch} its logits differ from the network's by {error}: "
                "this version of torch or onnxruntime exports it wrongly, do not use the file"
            )
        worst = max(worst, error)
    return worst


def _metadata(trained: Trained, image_size: int) -> dict[str, Any]:
    dataset = trained.facts.get("dataset", {})
    return {
        "genotype": trained.spec.genotype._asdict(),
        "network": trained.spec.network,
        "cells": trained.spec.cells,
        "channels": trained.spec.channels,
        "image_size": image_size,
        "classes": dataset.get("classes"),
        "mean": dataset.get("mean"),
        "std": dataset.get("std"),
    }
