"""What a search leaves behind: the trained supernets and the genotypes."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import save
from torch import nn

from pdarts_fast.errors import RunError
from pdarts_fast.genotype import GENOTYPE_FILE, save_genotype
from pdarts_fast.run.files import write_atomically
from pdarts_fast.search_space import Derivation
from pdarts_fast.strategies.base import Result


def write_supernet(path: Path, network: nn.Module) -> None:
    """Write a network's parameters and buffers as safetensors, under the stock names.

    Raises:
        RunError: The file cannot be written.
    """
    tensors = {name: value.contiguous().cpu() for name, value in network.state_dict().items()}
    write_atomically(path, save(tensors))


def write_genotypes(run_dir: Path, result: Result, max_skips: int) -> Derivation:
    """Write the genotypes of a search into genotype.json.

    Args:
        run_dir: Folder to write into.
        result: What the strategy derived.
        max_skips: Skips allowed in the normal cell of the result.

    Raises:
        RunError: No cell has that few skips, or the file cannot be written.
    """
    derivation = result.derivation
    if max_skips not in derivation.restricted:
        raise RunError(
            f"--max-skips {max_skips} cannot be reached with the ops of the last stage; the alphas "
            f"are kept: `pdarts-fast derive {run_dir}` lists the genotypes that can"
        )
    save_genotype(
        run_dir / GENOTYPE_FILE,
        derivation.restricted[max_skips],
        max_skips=max_skips,
        unrestricted=derivation.genotype,
        restricted=derivation.restricted,
        facts=result.facts,
    )
    return derivation
