"""``accelerate``: makes the cells of somebody else's network run on this package's kernels.

And its stem, where that is the usual one.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from pdarts_fast.dropin import fused, probe, swap
from pdarts_fast.dropin.modules import Modules
from pdarts_fast.dropin.recognise import NotRecognised, Recipe, describe, find_cells, recognise
from pdarts_fast.dropin.reporting import Report, say_once
from pdarts_fast.dropin.stem import FusedStem, is_stem
from pdarts_fast.dropin.watch import Watch, signature
from pdarts_fast.kernels import backends
from pdarts_fast.kernels.plan import FACTORIZED
from pdarts_fast.supernet import Cell as OurCell
from pdarts_fast.supernet import Network as OurNetwork

Model = TypeVar("Model", bound=nn.Module)

_LARGEST_CACHE = 512
_verdicts: dict[tuple[Any, ...], Recipe | str] = {}


@dataclass(frozen=True)
class _Settings:
    backend: str
    amp: bool


@dataclass
class _Holder:
    """What is known about a module of a swapped class.

    Attributes:
        settings: As given to ``accelerate``.
        recipe: What a cell computes; None for a network, and for a cell that has become another.
        owner: The cell that the next two belong to: a replica shares its attributes.
        modules: The cell's modules.
        watch: The state in which the cell was recognised.
        backend_of: Backend by type of device.
    """

    settings: _Settings
    recipe: Recipe | None = None
    owner: nn.Module | None = None
    modules: Modules | None = None
    watch: Watch | None = None
    backend_of: dict[str, str] = field(default_factory=dict)

    def for_copy(self) -> _Holder:
        """That of a deep copy of the module."""
        return _Holder(self.settings, self.recipe)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Holder:
        return self.for_copy()

    def backend(self, device: torch.device) -> str:
        """What runs cells on a device."""
        if device.type not in self.backend_of:
            channels = 1 if self.recipe is None else self.recipe.plan.channels
            chosen = backends.resolve(self.settings.backend, device, channels)
            self.backend_of[device.type] = chosen
        return self.backend_of[device.type]


def _warn_once(cell: nn.Module, reason: str) -> None:
    say_once(logging.WARNING, f"{swap.own_class(cell).__name__} runs as it is: {reason}")


def _judge(cell: nn.Module) -> Recipe:
    """What a cell computes, tried out unless an equal cell was.

    Raises:
        NotRecognised: It is left as it is.
    """
    own = swap.own_class(cell)
    if "forward" in vars(cell):
        raise NotRecognised("its forward is replaced on the instance")
    with probe.random_state_kept(torch.device("cpu")):
        candidates = recognise(cell)
    dropouts = list(Modules.of(cell, candidates[0].plan).dropouts.values())
    key = signature(cell, own, (swap.HOLDER,), dropouts)
    verdict = _verdicts.get(key) if key is not None else None
    if verdict is None:
        verdict = _try_out(cell, own, candidates)
        if key is not None:
            if len(_verdicts) >= _LARGEST_CACHE:
                _verdicts.clear()
            _verdicts[key] = verdict
    if isinstance(verdict, str):
        raise NotRecognised(verdict)
    return verdict


def _try_out(cell: nn.Module, own: type, candidates: list[Recipe]) -> Recipe | str:
    reason = ""
    for candidate in candidates:
        try:
            return probe.try_out(cell, own, candidate)
        except NotRecognised as error:
            reason = reason or str(error)
        except Exception as error:  # a class of somebody else's may do anything on copies
            line = " ".join(str(error).split())[:160]
            reason = reason or f"it cannot be tried out: {type(error).__name__}: {line}"
    return reason


def _bind(cell: nn.Module, holder: _Holder) -> None:
    """Looks a cell's modules up, after recognising it again."""
    try:
        recipe = holder.recipe = _judge(cell)
    except NotRecognised as error:
        holder.recipe, holder.owner = None, cell
        _warn_once(cell, str(error))
        return
    modules = Modules.of(cell, recipe.plan)
    custom = {*modules.extras.values(), *modules.dropouts.values()}
    if recipe.plan.outside:
        custom |= {cell.get_submodule(path) for path in recipe.input_paths}
    holder.owner, holder.modules = cell, modules
    holder.watch = Watch(
        cell,
        swap.own_class(cell),
        (swap.HOLDER,),
        custom,
        list(modules.dropouts.values()),
    )


def _obstacle(cell: nn.Module, holder: _Holder, args: tuple[Any, ...]) -> str | None:
    """Why a call goes to the cell's own forward; empty if that needs no word."""
    recipe, watch = holder.recipe, holder.watch
    if recipe is None or watch is None:
        return ""
    s0, s1 = args[:2]
    if not (isinstance(s0, Tensor) and isinstance(s1, Tensor) and s0.dim() == s1.dim() == 4):
        return "its inputs are no images"
    if s1.dtype == torch.float64:
        return "kernels have float32 and bfloat16, it got float64"
    weights = holder.modules.weights() if holder.modules else []
    if any(w.dtype != torch.float32 or w.device != s1.device for w in weights):
        return "its parameters are not float32 on the device of its input"
    if holder.backend(s1.device) == backends.REFERENCE:
        return ""
    if not _fits(recipe, s0, s1):
        return "its inputs have a size that was not tried out"
    return watch.hook() or watch.mode()


def _fits(recipe: Recipe, s0: Tensor, s1: Tensor) -> bool:
    """Whether sizes are those of a cell of the method."""
    plan = recipe.plan
    odd = any(side % 2 for side in s1.shape[2:])
    divisor = 4 if plan.reduction else 1
    # BatchNorm refuses a single value a channel, in words of its own.
    if (
        s0.numel() == 0
        or s1[:, 0].numel() < 2 * divisor
        or (odd and plan.reduction and recipe.even)
    ):
        return False
    if plan.outside:
        return True
    if (s0.shape[1], s1.shape[1]) != plan.in_channels or s0.shape[0] != s1.shape[0]:
        return False
    factor = 2 if plan.input_kind(0) == FACTORIZED else 1
    return tuple(s0.shape[2:]) == tuple(side * factor for side in s1.shape[2:])


def _third_argument(recipe: Recipe, value: Any) -> tuple[Tensor | None, float] | None:
    """Weights of a search cell as a matrix, or drop-path probability; None if it is neither."""
    sizes = recipe.plan.sizes
    if not recipe.searches:
        if isinstance(value, Tensor):
            return None
        probability = float(value)
        if not 0 <= probability < 1 or (probability > 0 and not recipe.drop_path):
            return None
        return None if value is None else (None, probability)
    if recipe.weights_as_list:
        if not isinstance(value, (list, tuple)) or len(value) != len(sizes):
            return None
        if [tuple(row.shape) for row in value] != [(size,) for size in sizes]:
            return None
        return nn.utils.rnn.pad_sequence(list(value), batch_first=True), 0.0
    if not isinstance(value, Tensor) or tuple(value.shape) != (len(sizes), recipe.plan.num_ops):
        return None
    return value, 0.0


class _FusedCell(swap.Swapped):
    """``forward`` of a recognised cell."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = _run(self, args) if len(args) == 3 and not kwargs else None
        return super().forward(*args, **kwargs) if out is None else out  # type: ignore[misc]


@torch.compiler.disable
def _run(cell: nn.Module, args: tuple[Any, ...]) -> Tensor | None:
    """The output of a cell, or None if its own forward is to run."""
    holder: _Holder = cell.__dict__[swap.HOLDER]
    if holder.owner is not cell or (holder.watch is not None and holder.watch.changed()):
        if holder.owner is not cell and holder.owner is not None:
            holder = _Holder(holder.settings, holder.recipe, backend_of=holder.backend_of)
            cell.__dict__[swap.HOLDER] = holder
        _bind(cell, holder)
    obstacle = _obstacle(cell, holder, args)
    if obstacle is not None:
        if obstacle:
            _warn_once(cell, obstacle)
        return None
    recipe, modules = holder.recipe, holder.modules
    assert recipe is not None
    assert modules is not None
    third = _third_argument(recipe, args[2])
    if third is None:
        _warn_once(cell, "its third argument is not what it was tried out with")
        return None
    alphas, drop_path = third
    if alphas is None:
        alphas = args[1].new_ones(len(recipe.plan.sizes), 1, dtype=torch.float32)
    s0, s1 = probe.preprocess(cell, recipe, args[0], args[1])
    return fused.run(
        recipe.plan,
        modules,
        holder.backend(s1.device),
        s0,
        s1,
        alphas,
        training=cell.training,
        drop_path=drop_path if cell.training else 0.0,
    )


class _Network(swap.Swapped):
    """A network whose copies by ``new`` are accelerated too."""

    def new(self, *args: Any, **kwargs: Any) -> Any:
        """What the network's own ``new`` builds, accelerated in the same way."""
        settings = self.__dict__[swap.HOLDER].settings
        made = super().new(*args, **kwargs)  # type: ignore[misc]
        if isinstance(made, nn.Module):
            _accelerate(made, settings, quiet=True)
        return made


class _AmpNetwork(swap.Swapped):
    """A network that runs under autocast to bfloat16 and returns float32."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        device = next(self.parameters()).device.type  # type: ignore[attr-defined]
        with torch.autocast(device, dtype=torch.bfloat16):
            return _as_float(super().forward(*args, **kwargs))  # type: ignore[misc]


class _NewAmpNetwork(_AmpNetwork, _Network):
    """Both."""


def _as_float(value: Any) -> Any:
    if isinstance(value, Tensor) and value.dtype == torch.bfloat16:
        return value.float()
    if isinstance(value, (list, tuple)) and type(value) in (list, tuple):
        return type(value)(map(_as_float, value))
    return value


def _accelerate(model: nn.Module, settings: _Settings, *, quiet: bool) -> Report:
    report = Report()
    ours = [module for module in model.modules() if isinstance(module, OurNetwork)]
    for network in ours:
        network._requested_backend = settings.backend
        network._backend_of_device.clear()
    for path, cell in list(find_cells(model)):
        if isinstance(cell, OurCell):
            continue
        swap.take_off(cell)
        try:
            recipe = _judge(cell)
        except NotRecognised as error:
            report.left.append((path, cell, str(error)))
            continue
        own = swap.own_class(cell)
        swap.put_on(cell, swap.swapped_class(own, _FusedCell), _Holder(settings, recipe))
        report.done.append((path, cell, describe(recipe)))
    if report.done or ours:
        _swap_networks(model, settings, [cell for _, cell, _ in report.done])
    if not quiet:
        report.log(model, settings.backend, bool(ours))
    return report


def _swap_networks(model: nn.Module, settings: _Settings, cells: list[nn.Module]) -> None:
    """Classes of stems, and of networks: for ``new``, and for autocast of the outermost one."""
    inside = {part for cell in cells for part in cell.modules()}
    for module in list(model.modules()):
        if module not in inside and is_stem(module):
            own = swap.own_class(module)
            swap.put_on(module, swap.swapped_class(own, FusedStem), _Holder(settings))
            continue
        if module in inside or (module is not model and not inside & {*module.modules()}):
            continue
        swap.take_off(module)
        own = swap.own_class(module)
        makes_new = callable(getattr(own, "new", None)) and not isinstance(module, OurNetwork)
        amp = settings.amp and module is model
        mixin = {
            (True, True): _NewAmpNetwork,
            (True, False): _Network,
            (False, True): _AmpNetwork,
        }.get((makes_new, amp))
        if mixin is not None:
            swap.put_on(module, swap.swapped_class(own, mixin), _Holder(settings))


def accelerate(model: Model, *, backend: str = "auto", amp: bool = False) -> Model:
    """Makes the cells of a P-DARTS- or DARTS-style network run on fast kernels, in place.

    Cells are found by structure and tried out against their own forward; what does not compute
    the same is left as it is, with a line in the log. Parameters, names, ``state_dict``, hooks
    and methods stay; deep copies are accelerated too, and a pickled model is one of its own
    classes. Calling it again re-reads the model.

    Args:
        model: A supernet or derived network of any module classes, or a module around one
            (``DataParallel``).
        backend: ``auto`` or a name of ``pdarts_fast.kernels.backends``; ``reference`` leaves the
            model as it is.
        amp: Run the model under autocast to bfloat16; its outputs are float32.

    Returns:
        ``model``.

    Raises:
        UsageError: The backend is unknown or cannot run here.
    """
    backends.check(backend)
    if backend == backends.REFERENCE and not amp:
        return restore(model)
    _accelerate(model, _Settings(backend, amp), quiet=False)
    return model


def accelerate_quietly(model: nn.Module, backend: str, amp: bool) -> None:
    """``accelerate`` for any module that a script builds; logs a line only once a run."""
    candidates = any(True for _ in find_cells(model))
    if candidates or any(isinstance(module, OurNetwork) for module in model.modules()):
        if backend == backends.REFERENCE and not amp:
            return
        _accelerate(model, _Settings(backend, amp), quiet=False)


def restore(model: Model) -> Model:
    """Undoes ``accelerate``, in place; returns ``model``."""
    for module in model.modules():
        swap.take_off(module)
    return model
