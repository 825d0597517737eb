"""Reading trained networks: our files, published checkpoints, and what must be refused."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from pdarts_fast.errors import RunError, UsageError
from pdarts_fast.genotype import DARTS_V2, PDARTS
from pdarts_fast.trained import NetworkSpec, load_trained, save_weights

pytestmark = pytest.mark.usefixtures("one_thread")
SPECS = {
    "cifar": NetworkSpec("cifar", 4, 3, 7, True, PDARTS),
    "imagenet": NetworkSpec("imagenet", 4, 3, 7, False, PDARTS),
}
KINDS = pytest.mark.parametrize("kind", SPECS)


def build(kind: str) -> Any:
    torch.manual_seed(0)
    return SPECS[kind].build().eval()


def assert_same_answers(kind: str, got: Any) -> None:
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.equal(got(images)[0], build(kind)(images)[0])


def published(state: dict[str, Tensor], form: str) -> Any:
    """A state dict in the forms in which checkpoints are published."""
    wrapped = {f"module.{name}": tensor for name, tensor in state.items()}
    old = {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}
    return {
        "plain": state,
        "module": wrapped,
        "under state_dict": {"epoch": 3, "best_acc_top1": 75.0, "state_dict": wrapped},
        "without counters": old,
    }[form]


@KINDS
def test_our_weight_files_describe_themselves(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "weights-best.safetensors"
    save_weights(path, build(kind), SPECS[kind], {"epoch": 3, "dataset": {"name": "digits"}})
    for source in (tmp_path, path):
        trained = load_trained(source)
        assert trained.spec == SPECS[kind]
        assert trained.facts == {"epoch": 3, "dataset": {"name": "digits"}}
        assert not trained.network.training
        assert_same_answers(kind, trained.network)
    with pytest.raises(UsageError, match="--genotype is another cell"):
        load_trained(path, genotype=DARTS_V2)


@KINDS
@pytest.mark.parametrize("form", ["plain", "module", "under state_dict", "without counters"])
def test_published_checkpoints(kind: str, form: str, tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    torch.save(published(build(kind).state_dict(), form), path)
    trained = load_trained(path, genotype=PDARTS)
    assert trained.spec == SPECS[kind]
    assert trained.facts == {}
    assert_same_answers(kind, trained.network)


def test_a_published_checkpoint_as_safetensors(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    save_file({f"module.{k}": v for k, v in build("cifar").state_dict().items()}, path)
    assert_same_answers("cifar", load_trained(path, genotype=PDARTS).network)


class Harmful:
    """Would write a file when unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


def test_objects_are_never_unpickled(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    torch.save({"state_dict": Harmful(mark)}, tmp_path / "zip.pt")
    (tmp_path / "raw.pt").write_bytes(pickle.dumps(Harmful(mark)))
    for name in ("zip.pt", "raw.pt"):
        with pytest.raises(RunError, match=f"{name}: ") as caught:
            load_trained(tmp_path / name, genotype=PDARTS)
        assert "\n" not in str(caught.value)
    assert not mark.exists()


def write_broken(folder: Path, case: str) -> Path:
    path = folder / f"{case.replace(' ', '-')}.pt"
    state = build("cifar").state_dict()
    if case == "cut off":
        torch.save(state, path)
        path.write_bytes(path.read_bytes()[:-2000])
    elif case == "text":
        path.write_text("no weights here")
    elif case == "empty":
        path.touch()
    elif case == "a list":
        torch.save([1, 2], path)
    elif case == "a supernet":
        torch.save({"alphas_normal": torch.zeros(14, 8)}, path)
    elif case == "cut safetensors":
        path = path.with_suffix(".safetensors")
        save_file(state, path)
        path.write_bytes(path.read_bytes()[:-2000])
    return path


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("cut off", "not a file of torch.save"),
        ("text", "text.pt: "),
        ("empty", "empty.pt: "),
        ("a list", "wanted a state dict"),
        ("a supernet", "wanted the state dict of a NetworkCIFAR or NetworkImageNet"),
        ("cut safetensors", "not a whole safetensors file"),
    ],
)
def test_files_that_are_no_weights_are_named(case: str, message: str, tmp_path: Path) -> None:
    path = write_broken(tmp_path, case)
    with pytest.raises(RunError) as caught:
        load_trained(path, genotype=PDARTS)
    assert message in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_another_cell_than_that_of_the_weights_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    torch.save(build("cifar").state_dict(), path)
    with pytest.raises(RunError, match="is --genotype the cell it was trained with"):
        load_trained(path, genotype=DARTS_V2)


def test_a_description_that_does_not_fit_the_tensors_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    other = NetworkSpec("cifar", 4000, 3, 7, True, PDARTS)
    save_weights(path, build("cifar"), other, {})
    with pytest.raises(RunError, match="are not those of the network it describes"):
        load_trained(path)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere", "no such file or folder"),
        (".", "no weights-best.safetensors in it: it is no training run"),
        ("weights.pt", "does not say which cell it is of: give --genotype"),
    ],
    ids=["missing", "no run", "no genotype"],
)
def test_usage_errors(name: str, message: str, tmp_path: Path) -> None:
    torch.save(build("cifar").state_dict(), tmp_path / "weights.pt")
    with pytest.raises(UsageError, match=message):
        load_trained(tmp_path / name)
