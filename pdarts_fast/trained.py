"""Trained networks as files: our own, which describe themselves, and published state dicts."""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from pdarts_fast.errors import RunError, UsageError
from pdarts_fast.genotype import Genotype, check_genotype
from pdarts_fast.network import STEM_MULTIPLIER, NetworkCIFAR, NetworkImageNet
from pdarts_fast.run.files import write_atomically

WEIGHT_FILES = {"best": "weights-best.safetensors", "last": "weights-last.safetensors"}
"""Files of a run: after the epoch of the highest test accuracy, and after the last one."""

_METADATA = "pdarts_fast"
_CLASSES: dict[str, type[NetworkCIFAR] | type[NetworkImageNet]] = {
    "cifar": NetworkCIFAR,
    "imagenet": NetworkImageNet,
}
# Under these keys published checkpoints hold the state dict beside epoch and optimiser.
_WRAPPERS = ("state_dict", "model", "network")


@dataclass(frozen=True)
class NetworkSpec:
    """How to build a derived network.

    Attributes:
        network: ``cifar`` or ``imagenet``.
        channels: Channels of the first cell's nodes.
        cells: Number of cells.
        num_classes: Size of the output.
        auxiliary: Whether it has an auxiliary head.
        genotype: The two cells.
    """

    network: str
    channels: int
    cells: int
    num_classes: int
    auxiliary: bool
    genotype: Genotype

    def build(self) -> NetworkCIFAR | NetworkImageNet:
        """A network with fresh weights from torch's random state."""
        return _CLASSES[self.network](
            self.channels, self.num_classes, self.cells, self.auxiliary, self.genotype
        )


@dataclass(frozen=True)
class Trained:
    """A network with its weights.

    Attributes:
        network: In evaluation mode, on the CPU.
        spec: How it is built.
        path: The file it came from.
        facts: What the file says of itself: epoch, accuracy, dataset (as in config.json); empty
            for a published one.
    """

    network: NetworkCIFAR | NetworkImageNet
    spec: NetworkSpec
    path: Path
    facts: dict[str, Any] = field(default_factory=dict)


def save_weights(
    path: Path,
    network: NetworkCIFAR | NetworkImageNet,
    spec: NetworkSpec,
    facts: Mapping[str, Any],
) -> None:
    """Write a network's state dict and description as one safetensors file, atomically.

    Raises:
        RunError: The disk refuses.
    """
    tensors = {k: v.detach().cpu().contiguous() for k, v in network.state_dict().items()}
    described = {"spec": asdict(spec) | {"genotype": spec.genotype._asdict()}, **facts}
    write_atomically(path, save(tensors, metadata={_METADATA: json.dumps(described)}))


def load_trained(source: Path, *, which: str = "best", genotype: Genotype | None = None) -> Trained:
    """Read a trained network.

    Args:
        source: Folder of a training run, one of its weight files or checkpoints, or a published
            checkpoint: a state dict of `torch.save`, by itself or under ``state_dict``, its names
            with or without ``module.`` in front. Never unpickles objects.
        which: ``best`` or ``last`` weights of a run.
        genotype: The cells of a published checkpoint, which does not tell them.

    Raises:
        UsageError: No such file, or a missing or superfluous genotype.
        RunError: The file is damaged, or its tensors do not fit the network.
    """
    path = source / WEIGHT_FILES[which] if source.is_dir() else source
    if not path.is_file():
        what = f"no {path.name} in it: it is no training run, or has not finished an epoch"
        raise UsageError(f"{source}: {what if source.is_dir() else 'no such file or folder'}")
    if path.suffix == ".safetensors":
        tensors, described = _read_safetensors(path)
    else:
        tensors, described = _read_pickle(path)
    if described:
        spec = _described_spec(described, path)
        if infer_spec(tensors, spec.genotype, path) != spec:
            raise RunError(f"{path}: its tensors are not those of the network it describes")
        if genotype is not None and genotype != spec.genotype:
            raise UsageError(f"--genotype is another cell than that of {path}: leave it out")
    elif genotype is None:
        raise UsageError(
            f"{path} does not say which cell it is of: give --genotype, a name or a genotype file"
        )
    else:
        spec = infer_spec(tensors, genotype, path)
    network = spec.build()
    _load_state(network, tensors, path)
    network.eval()
    facts = {name: value for name, value in described.items() if name != "spec"}
    return Trained(network, spec, path, facts)


def infer_spec(tensors: Mapping[str, Tensor], genotype: Genotype, path: Path) -> NetworkSpec:
    """What the names and shapes of a state dict tell of its network.

    Raises:
        RunError: They are not those of a derived network.
    """
    imagenet = "stem0.0.weight" in tensors
    stem = "stem0.3.weight" if imagenet else "stem.0.weight"
    indices = [int(m[1]) for name in tensors if (m := re.match(r"cells\.(\d+)\.", name))]
    missing = [name for name in (stem, "classifier.weight") if name not in tensors]
    if missing or not indices:
        raise RunError(
            f"{path}: no {missing[0] if missing else 'cells.0'} in it: wanted the state dict of a "
            "NetworkCIFAR or NetworkImageNet"
        )
    return NetworkSpec(
        network="imagenet" if imagenet else "cifar",
        channels=tensors[stem].shape[0] // (1 if imagenet else STEM_MULTIPLIER),
        cells=max(indices) + 1,
        num_classes=tensors["classifier.weight"].shape[0],
        auxiliary="auxiliary_head.classifier.weight" in tensors,
        genotype=genotype,
    )


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
        described = json.loads(metadata.get(_METADATA, "{}"))
        return _plain_names(load_file(path)), described
    except (SafetensorError, OSError, ValueError) as error:
        raise RunError(f"{path}: not a whole safetensors file ({error})") from error


def _read_pickle(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise RunError(
            f"{path}: holds other things than tensors, numbers and text, or is damaged: save its "
            "state_dict() alone"
        ) from error
    # A damaged archive raises RuntimeError, EOFError and others.
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise RunError(f"{path}: not a file of torch.save ({reason})") from error
    described: dict[str, Any] = {}
    if isinstance(content, Mapping) and {"settings", "genotype", "training"} <= content.keys():
        content, described = _own_checkpoint(content, path)
    for name in _WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(name), Mapping):
            content = content[name]
    if not isinstance(content, Mapping) or not all(isinstance(v, Tensor) for v in content.values()):
        raise RunError(f"{path}: wanted a state dict, tensors by name")
    return _plain_names(content), described


def _own_checkpoint(content: Mapping[str, Any], path: Path) -> tuple[Any, dict[str, Any]]:
    """State dict and description in a checkpoint of a training run."""
    try:
        settings, facts = content["settings"], content["dataset"]
        names = ("network", "channels", "cells", "auxiliary")
        spec = {name: settings[name] for name in names} | {
            "num_classes": facts["num_classes"],
            "genotype": content["genotype"],
        }
        described = {"spec": spec, "epoch": content["progress"]["epoch"], "dataset": facts}
        return content["training"]["network"], described
    except (KeyError, TypeError) as error:
        raise RunError(f"{path}: not a whole checkpoint of a training run ({error})") from error


def _plain_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors without the ``module.`` that data parallelism puts in front of every name."""
    return {name.removeprefix("module."): tensor for name, tensor in tensors.items()}


def _described_spec(described: Mapping[str, Any], path: Path) -> NetworkSpec:
    try:
        spec = NetworkSpec(**described["spec"])
        genotype = check_genotype(spec.genotype, f"{path}: genotype")
        if spec.network not in _CLASSES:
            raise ValueError(f"network {spec.network!r}")
    except (KeyError, TypeError, ValueError) as error:
        raise RunError(f"{path}: its description is damaged ({error})") from error
    return replace(spec, genotype=genotype)


def _load_state(
    network: NetworkCIFAR | NetworkImageNet, tensors: dict[str, Tensor], path: Path
) -> None:
    wanted = network.state_dict()
    # Checkpoints older than this counter lack it; evaluation does not need it.
    for name, tensor in wanted.items():
        if name.endswith("num_batches_tracked"):
            tensors.setdefault(name, tensor)
    wrong = [f"lacks {name}" for name in wanted if name not in tensors]
    wrong += [f"has {name}, which the network does not" for name in tensors if name not in wanted]
    wrong += [
        f"{name} is {list(tensors[name].shape)}, wanted {list(tensor.shape)}"
        for name, tensor in wanted.items()
        if name in tensors and tensors[name].shape != tensor.shape
    ]
    if wrong:
        more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        raise RunError(f"{path}: {wrong[0]}{more}; is --genotype the cell it was trained with?")
    network.load_state_dict(tensors)
