"""Tries a recognised cell out against its own forward, in float64.

Structure does not tell how a cell's ``forward`` uses its modules. So both run once, on copies, on
small random inputs, in training with gradients and in evaluation: what differs by more than
rounding is not accelerated.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from pdarts_fast.dropin import fused
from pdarts_fast.dropin.modules import Modules
from pdarts_fast.dropin.recognise import NotRecognised, Recipe
from pdarts_fast.kernels.backends import REFERENCE
from pdarts_fast.kernels.plan import FACTORIZED

BATCH, SIDE = 2, 4
TOLERANCE = 1e-8
_SEED = 1904
_DROP_PATH = 0.3


@contextmanager
def random_state_kept(device: torch.device) -> Iterator[None]:
    """Leaves the generators of torch, numpy and Python as they were."""
    devices = [device] if device.type == "cuda" else []
    of_numpy, of_python = np.random.get_state(), random.getstate()
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        np.random.set_state(of_numpy)
        random.setstate(of_python)


def _seed() -> None:
    torch.manual_seed(_SEED)
    np.random.seed(_SEED)
    random.seed(_SEED)


class _Trial(NamedTuple):
    """One call: inputs, weights of the edges as a matrix, and the drop-path probability."""

    s0: Tensor
    s1: Tensor
    alphas: Tensor
    drop_path: float


def preprocess(cell: nn.Module, recipe: Recipe, s0: Tensor, s1: Tensor) -> tuple[Tensor, Tensor]:
    """Both inputs through their own modules, if the plan wants that."""
    if not recipe.plan.outside:
        return s0, s1
    first, second = (cell.get_submodule(path) for path in recipe.input_paths)
    return first(s0), second(s1)


def weights_argument(recipe: Recipe, alphas: Tensor) -> Any:
    """What a search cell is called with."""
    if recipe.weights_as_list:
        return [row[:size] for row, size in zip(alphas, recipe.plan.sizes, strict=True)]
    return alphas


def _own(cell: nn.Module, own_class: Any, recipe: Recipe, trial: _Trial) -> Tensor:
    third: Any = trial.drop_path
    if recipe.searches:
        third = weights_argument(recipe, trial.alphas)
    return own_class.forward(cell, trial.s0, trial.s1, third)


def _ours(cell: nn.Module, recipe: Recipe, trial: _Trial) -> Tensor:
    s0, s1 = preprocess(cell, recipe, trial.s0, trial.s1)
    return fused.run(
        recipe.plan,
        Modules.of(cell, recipe.plan),
        REFERENCE,
        s0,
        s1,
        trial.alphas if recipe.searches else torch.ones_like(trial.alphas),
        training=cell.training,
        drop_path=trial.drop_path if cell.training else 0.0,
    )


def _input_channels(module: nn.Module) -> int:
    for child in module.modules():
        if isinstance(child, nn.Conv2d):
            return child.in_channels
    raise NotRecognised("its preprocessing has no convolution")


def _trial(cell: nn.Module, recipe: Recipe, side: int, drop_path: float) -> _Trial:
    first, second = (cell.get_submodule(path) for path in recipe.input_paths)
    device = next(cell.parameters()).device
    _seed()

    def images(module: nn.Module, side: int) -> Tensor:
        shape = (BATCH, _input_channels(module), side, side)
        return torch.randn(shape, dtype=torch.float64, device=device, requires_grad=True)

    # An input that is reduced on its way in comes twice as large.
    strides = [c.stride[0] for c in first.modules() if isinstance(c, nn.Conv2d)]
    larger = recipe.plan.reduction_prev or (recipe.plan.outside and 2 in strides)
    s0, s1 = images(first, 2 * side if larger else side), images(second, side)
    shape = (len(recipe.plan.sizes), recipe.plan.num_ops)
    alphas = torch.rand(shape, dtype=torch.float64, device=device).add_(0.1).requires_grad_()
    return _Trial(s0, s1, alphas, drop_path)


def _close(got: Tensor | None, wanted: Tensor | None) -> bool:
    if got is None or wanted is None:
        known = wanted if got is None else got
        return known is None or not known.any()
    if got.shape != wanted.shape:
        return False
    scale = max(1.0, wanted.abs().max().item()) if wanted.numel() else 1.0
    return bool((got - wanted).abs().max().item() <= TOLERANCE * scale) if got.numel() else True


def _results(cell: nn.Module, out: Tensor, trial: _Trial) -> dict[str, Tensor | None]:
    """Output, buffers and, in training, all gradients of a call, by name."""
    found: dict[str, Tensor | None] = {"output": out.detach()}
    if cell.training:
        parameters = dict(cell.named_parameters())
        tensors = [trial.s0, trial.s1, trial.alphas, *parameters.values()]
        wanted = [tensor for tensor in tensors if tensor.requires_grad]
        _seed()
        direction = torch.randn(out.shape, dtype=out.dtype, device=out.device)
        grads = torch.autograd.grad(out, wanted, direction, allow_unused=True)
        of = {id(tensor): grad for tensor, grad in zip(wanted, grads, strict=True)}
        names = ["its first input", "its second input", "the weights", *parameters]
        for name, tensor in zip(names, tensors, strict=True):
            found[f"gradient of {name}"] = of.get(id(tensor))
    for name, buffer in cell.named_buffers():
        found[name] = buffer.to(torch.float64, copy=True)
    return found


def _compare(cell: nn.Module, own_class: Any, recipe: Recipe, trial: _Trial) -> Recipe:
    """Raises NotRecognised where the two differ; returns the recipe with the output's nodes."""
    with _buffers_kept(cell):
        _seed()
        try:
            out = _own(cell, own_class, recipe, trial)
        except Exception as error:  # whatever a class of somebody else's may raise
            line = " ".join(str(error).split())[:120]
            raise NotRecognised(
                f"its forward does not take (s0, s1, weights): {type(error).__name__}: {line}"
            ) from error
        recipe = _with_outputs(recipe, out)
        wanted = _results(cell, out, trial)
    with _buffers_kept(cell):
        _seed()
        got = _results(cell, _ours(cell, recipe, trial), trial)
    for name, tensor in wanted.items():
        if not _close(got[name], tensor):
            raise NotRecognised(f"its forward differs from that of the method ({name})")
    return recipe


@contextmanager
def _buffers_kept(cell: nn.Module) -> Iterator[None]:
    """Undoes changes to running statistics."""
    kept = [(buffer, buffer.clone()) for buffer in cell.buffers()]
    try:
        yield
    finally:
        for buffer, value in kept:
            buffer.copy_(value)


def _with_outputs(recipe: Recipe, out: Any) -> Recipe:
    """The recipe of a search cell with as many of the last nodes as the output has."""
    if not isinstance(out, Tensor) or out.dim() != 4:
        raise NotRecognised("its forward does not return images")
    plan = recipe.plan
    count, rest = divmod(out.shape[1], plan.channels)
    if rest or not 1 <= count <= plan.steps:
        raise NotRecognised(f"its output has {out.shape[1]} channels, its nodes {plan.channels}")
    if not recipe.searches:
        return recipe
    concat = tuple(range(plan.steps))[-count:]
    changes: dict[str, Any] = {"concat": concat, "multiplier": count}
    return replace(recipe, plan=replace(plan, **changes))


def _check_extras(cell: nn.Module, recipe: Recipe) -> None:
    """Refuses custom operations whose gradients reach further than their own parameters."""
    for extra in recipe.plan.extras:
        module = cell.get_submodule(extra.path)
        shape = (BATCH, recipe.plan.channels, SIDE, SIDE)
        device = next(cell.parameters()).device
        image = torch.randn(shape, dtype=torch.float64, device=device, requires_grad=True)
        known = {id(tensor) for tensor in (image, *module.parameters())}
        try:
            out = module(image)
        except Exception as error:  # whatever a class of somebody else's may raise
            raise NotRecognised(f"{extra.path} does not run: {error}") from error
        waiting, seen = [out.grad_fn], set()
        while waiting:
            function = waiting.pop()
            if function is None or function in seen:
                continue
            seen.add(function)
            variable = getattr(function, "variable", None)
            if variable is not None and id(variable) not in known:
                raise NotRecognised(f"{extra.path} uses parameters that are not its own")
            waiting += [after for after, _ in function.next_functions]


def try_out(cell: nn.Module, own_class: type, recipe: Recipe) -> Recipe:
    """The recipe, completed by what only a trial tells.

    Args:
        cell: The cell, on any device; left as it is.
        own_class: Its own class, whose ``forward`` is right.
        recipe: What its structure says.

    Raises:
        NotRecognised: The cell computes something else.
    """
    twin = copy.deepcopy(cell)
    twin.__class__ = own_class
    twin = twin.double()
    for parameter in twin.parameters():
        parameter.requires_grad_()
    with random_state_kept(next(cell.parameters()).device), torch.enable_grad():
        _randomise(twin)
        with _buffers_kept(twin):
            _check_extras(twin, recipe)
        if recipe.searches and len(set(recipe.plan.sizes)) > 1:
            recipe = _with_weights_form(twin, own_class, recipe)
        for training in (True, False):
            twin.train(training)
            recipe = _compare(twin, own_class, recipe, _trial(twin, recipe, SIDE, 0.0))
        twin.train()
        if not recipe.searches:
            recipe = replace(recipe, drop_path=_agrees(twin, own_class, recipe, SIDE, _DROP_PATH))
        odd = recipe.plan.reduction or recipe.plan.input_kind(0) == FACTORIZED
        even = odd and not _agrees(twin, own_class, recipe, SIDE + 1, 0.0)
    return replace(recipe, even=even)


def _agrees(cell: nn.Module, own_class: type, recipe: Recipe, side: int, drop_path: float) -> bool:
    try:
        _compare(cell, own_class, recipe, _trial(cell, recipe, side, drop_path))
    except NotRecognised:
        return False
    return True


def _with_weights_form(cell: nn.Module, own_class: type, recipe: Recipe) -> Recipe:
    """Whether edges with different numbers of operations take a matrix or a list of vectors."""
    cell.train()
    if _agrees(cell, own_class, recipe, SIDE, 0.0):
        return recipe
    return replace(recipe, weights_as_list=True)


def _randomise(cell: nn.Module) -> None:
    """Moves statistics, scales and shifts off 0 and 1, where much would look alike."""
    _seed()
    for module in cell.modules():
        if isinstance(module, nn.BatchNorm2d):
            with torch.no_grad():
                for tensor in (module.weight, module.running_var):
                    if tensor is not None:
                        tensor.uniform_(0.5, 1.5)
                for tensor in (module.bias, module.running_mean):
                    if tensor is not None:
                        tensor.uniform_(-0.5, 0.5)
