"""What a search leaves behind: the trained supernets and the genotypes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from safetensors.torch import save
from torch import nn

from pdarts_fast.alphas import save_alphas
from pdarts_fast.distributed import Ranks
from pdarts_fast.errors import RunError
from pdarts_fast.genotype import GENOTYPE_FILE, save_genotype
from pdarts_fast.run.directory import RunDirectory
from pdarts_fast.run.files import write_atomically
from pdarts_fast.search_space import Alphas, Derivation
from pdarts_fast.shared_step import require_same
from pdarts_fast.strategies.base import Result


def write_supernet(path: Path, network: nn.Module) -> None:
    """Write a network's parameters and buffers as safetensors, under the stock names.

    Raises:
        RunError: The file cannot be written.
    """
    tensors = {name: value.contiguous().cpu() for name, value in network.state_dict().items()}
    write_atomically(path, save(tensors))


def write_stage(
    run: RunDirectory,
    ranks: Ranks,
    stage: int,
    network: nn.Module,
    finished: Sequence[Alphas],
) -> None:
    """Write the supernet of a stage that has ended, and the alphas of all stages so far.

    Args:
        run: Run directory.
        ranks: The processes that have trained it.
        stage: 0-based stage.
        network: Its supernet.
        finished: Alphas at the end of each stage so far, raw (before softmax).

    Raises:
        RunError: The ranks do not have the same weights and alphas, or a file cannot be written.
    """
    require_same(network, ranks)
    ranks.average_statistics(network)
    if run.writes:
        write_supernet(run.path / f"supernet-stage{stage + 1}.safetensors", network)
        save_alphas(run.path / "alphas.json", finished)


def write_genotypes(run: RunDirectory, ranks: Ranks, result: Result, max_skips: int) -> Derivation:
    """Write the genotypes of a search into genotype.json.

    Args:
        run: Run directory to write into.
        ranks: The processes that have made the search.
        result: What the strategy derived.
        max_skips: Skips allowed in the normal cell of the result.

    Raises:
        RunError: No cell has that few skips, the ranks have found different cells, or the file
            cannot be written.
    """
    derivation = result.derivation
    ranks.require_equal("the genotypes", repr(derivation))
    if max_skips not in derivation.restricted:
        message = (
            f"--max-skips {max_skips} cannot be reached with the ops of the last stage; the alphas "
            f"are kept: `pdarts-fast derive {run.path}` lists the genotypes that can"
        )
        raise ranks.agreed(RunError(message))
    if not run.writes:
        return derivation
    save_genotype(
        run.path / GENOTYPE_FILE,
        derivation.restricted[max_skips],
        max_skips=max_skips,
        unrestricted=derivation.genotype,
        restricted=derivation.restricted,
        facts=result.facts,
    )
    return derivation
