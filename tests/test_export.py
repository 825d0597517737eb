"""Exported programs: they load and run elsewhere, at any batch size, with the same answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pdarts_fast import export
from pdarts_fast.errors import RunError, UsageError
from pdarts_fast.export import EXTRA_PACKAGES, run_export
from pdarts_fast.genotype import Genotype
from pdarts_fast.trained import NetworkSpec, save_weights

pytestmark = pytest.mark.usefixtures("one_thread")
# Every kind of operation in two nodes: exporting takes seconds for each hundred layers.
CELLS = Genotype(
    [("skip_connect", 0), ("sep_conv_3x3", 1), ("dil_conv_5x5", 2), ("avg_pool_3x3", 1)],
    [2, 3],
    [("max_pool_3x3", 0), ("skip_connect", 1), ("sep_conv_5x5", 1), ("dil_conv_3x3", 2)],
    [2, 3],
)
SPECS = {
    "cifar": NetworkSpec("cifar", 4, 3, 5, True, CELLS),
    "imagenet": NetworkSpec("imagenet", 4, 3, 5, False, CELLS),
}
SIZES = {"cifar": 16, "imagenet": 64}


def require_extra() -> None:
    for name in EXTRA_PACKAGES:
        pytest.importorskip(name, reason=f"{name} is missing: pip install 'pdarts-fast[export]'")


def weights(kind: str, folder: Path) -> tuple[Path, nn.Module]:
    torch.manual_seed(0)
    network = SPECS[kind].build().eval()
    path = folder / "w.safetensors"
    facts = {"dataset": {"image_size": SIZES[kind], "classes": list("abcde"), "mean": [0.1] * 3}}
    save_weights(path, network, SPECS[kind], facts)
    return path, network


def images(kind: str, count: int) -> Tensor:
    side = SIZES[kind]
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(9))


@pytest.mark.parametrize("kind", SPECS)
def test_torch_program(kind: str, tmp_path: Path) -> None:
    source, network = weights(kind, tmp_path)
    source.rename(tmp_path / "weights-best.safetensors")
    # A run directory works as well as its file.
    (path,) = run_export(tmp_path, formats=["torch"])
    assert path == tmp_path / "network.pt2"
    extra = {"pdarts_fast.json": ""}
    program = torch.export.load(path, extra_files=extra).module()
    for count in (1, 4):
        x = images(kind, count)
        with torch.no_grad():
            torch.testing.assert_close(program(x), network(x)[0], rtol=1e-5, atol=1e-5)
    metadata = json.loads(extra["pdarts_fast.json"])
    assert metadata["classes"] == list("abcde")
    assert metadata["image_size"] == SIZES[kind]
    assert metadata["genotype"]["normal_concat"] == [2, 3]


def test_onnx_program(tmp_path: Path) -> None:
    require_extra()
    import onnxruntime

    source, network = weights("cifar", tmp_path)
    (path,) = run_export(source, formats=["onnx"], out=tmp_path / "new" / "cell")
    assert path == tmp_path / "new" / "cell.onnx"
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    for count in (1, 4):
        x = images("cifar", count)
        (got,) = session.run(None, {"images": x.numpy()})
        with torch.no_grad():
            want = network(x)[0]
        torch.testing.assert_close(torch.from_numpy(got), want, rtol=1e-4, atol=1e-4)
    properties = session.get_modelmeta().custom_metadata_map
    assert json.loads(properties["pdarts_fast"])["mean"] == [0.1] * 3


def test_onnx_says_which_packages_are_missing(tmp_path: Path, monkeypatch: Any) -> None:
    source, _ = weights("cifar", tmp_path)
    monkeypatch.setattr(export, "EXTRA_PACKAGES", ("nowhere_to_be_found",))
    with pytest.raises(UsageError) as caught:
        run_export(source)
    assert "needs nowhere_to_be_found: pip install 'pdarts-fast[export]'" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert sorted(tmp_path.iterdir()) == [source]


def test_a_program_with_other_answers_is_reported(tmp_path: Path) -> None:
    _, network = weights("cifar", tmp_path)
    logits = export.Logits(network).eval()

    def wrong(x: Tensor) -> Tensor:
        return logits(x) + (1e-2 if len(x) == 5 else 0.0)

    with pytest.raises(RunError, match=r"cell\.onnx: for a batch of 5 its logits differ"):
        export._check(Path("cell.onnx"), logits, wrong, SIZES["cifar"])
