"""Launches noted instead of made: kernels with their grids and arguments, operators by name."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from triton.runtime.jit import JITFunction

from ..calls import Call
from .common import STORAGE
from .registry import DEFAULT_STAGES, Specialisation

_POINTERS = {
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
# Operators that launch nothing: they make a view or only reserve memory.
FREE = (
    "empty", "new_empty", "empty_like", "view", "_unsafe_view", "select", "slice", "split",
    "split_with_sizes", "unbind", "expand", "permute", "transpose", "t", "detach", "as_strided",
    "alias", "unsqueeze", "squeeze", "chunk", "_reshape_alias", "empty_strided", "lift_fresh",
    "new_empty_strided", "transpose_",
)  # fmt: skip
# Methods of a backend that launch nothing.
_NOT_KERNELS = ("channels", "coefficient_dtype", "empty")
# Primitive, call, size and arguments of a launch outside of any.
_NOWHERE: tuple[Any, ...] = ("", None, (0, 0, 0, 0), ())
# Tensors that a launch of a foreach operator takes, by how many lists it goes through.
_FOREACH = {1: 110, 2: 64, 3: 48}


@dataclass(frozen=True)
class Launch:
    """A kernel that a pass would launch.

    Attributes:
        function: What ``triton.jit`` made.
        grid: Programs.
        values: Every argument by name: tensors, numbers, constants.
        options: ``num_warps``, ``maxnreg``.
        primitive, call: Which primitive launched it, for what.
        arguments: The others of the primitive, after its arrays.
        size: N, H, W, C of the arrays of the call's outputs.
    """

    function: Any = field(repr=False)
    grid: tuple[int, ...]
    values: dict[str, Any] = field(repr=False)
    options: dict[str, Any]
    primitive: str
    call: Call | None = field(repr=False)
    size: tuple[int, int, int, int]
    arguments: tuple[Any, ...] = field(default=(), repr=False)

    @property
    def name(self) -> str:
        """Of the kernel, without underscores around it."""
        return str(self.function.__name__).strip("_").removesuffix("_kernel")

    @property
    def programs(self) -> int:
        """Of the whole grid."""
        total = 1
        for extent in self.grid:
            total *= extent
        return total

    @property
    def storage(self) -> str:
        """That of the widest-spread array: the first half-precision argument, or ``fp32``."""
        dtypes = {v.dtype for v in self.values.values() if isinstance(v, Tensor)}
        half = [STORAGE[d] for d in (torch.bfloat16, torch.float16) if d in dtypes]
        return half[0] if half else "fp32"

    def _note(self, constants: dict[str, Any]) -> str:
        marks = {
            "SECOND": "second halves", "INCOMING": "incoming", "FACTORIZED": "factorized",
            "SUMS": "sums", "STORED": "inputs", "ENTERING": "entering",
        }  # fmt: skip
        found = [text for name, text in marks.items() if constants.get(name)]
        if constants.get("STEP", constants.get("C")) != constants.get("C"):
            found.append("norms")
        if constants.get("STRIDE") == 2:
            found.insert(0, "stride 2")
        width = constants.get("CX", constants.get("WIDTH"))
        if width and width != constants.get("C"):
            found.append(f"from {width}")
        return " ".join(found)

    def specialisation(self, **extra: Any) -> Specialisation:
        """The compiled variant that the launch would run."""
        signature, constants, divisible = {}, {}, []
        for parameter in self.function.params:
            value = self.values[parameter.name]
            if parameter.is_constexpr:
                constants[parameter.name] = value
            elif isinstance(value, Tensor):
                signature[parameter.name] = _POINTERS[value.dtype]
            else:
                signature[parameter.name] = "i32" if abs(value) < 2**31 else "i64"
                if value % 16 == 0 and not parameter.do_not_specialize:
                    divisible.append(parameter.name)
        return Specialisation(
            shape=self.size,
            storage=self.storage,
            signature=signature,
            constants=constants,
            divisible=tuple(divisible),
            num_warps=self.options.get("num_warps", 4),
            num_stages=self.options.get("num_stages", DEFAULT_STAGES),
            max_registers=self.options.get("maxnreg"),
            programs=self.programs,
            note=self._note(constants),
            **extra,
        )


def _is_mixed(args: Any) -> bool:
    devices = {x.device.type for x in tree_leaves(args) if isinstance(x, Tensor)}
    return len(devices) > 1


class Recorder(TorchDispatchMode):
    """Collects launches and the names of torch operators that would launch something.

    Attributes:
        launches: In order.
        operators: Names, in order; what the coefficient algebra of a pass costs in launches.
    """

    def __init__(self) -> None:
        super().__init__()
        self.launches: list[Launch] = []
        self.operators: list[str] = []
        self.place: tuple[Any, ...] = _NOWHERE

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        name = function.overloadpacket.__name__
        # Index tables of a call lie on the processor; a pass on a GPU needs them there, once.
        moved = tree_map_only(Tensor, lambda x: x.to("meta"), args) if _is_mixed(args) else args
        found = function(*moved, **(kwargs or {}))
        first = found[0] if isinstance(found, (tuple, list)) and found else found
        if name.startswith("_foreach"):
            lists = [x for x in args if isinstance(x, (tuple, list))]
            self.operators += [name] * -(-len(lists[0]) // _FOREACH[len(lists)])
        elif name not in FREE and isinstance(first, Tensor) and first.device.type == "meta":
            # What comes from the processor is a table, copied once and kept.
            is_table = name == "_to_copy" and args[0].device.type == "cpu"
            self.operators += [name] * (not is_table)
        return found

    def launcher(self, function: Any, grid: tuple[int, ...]) -> Any:
        """Stands in for ``function[grid]``."""

        def launch(*args: Any, **kwargs: Any) -> None:
            names = function.arg_names
            options = {k: v for k, v in kwargs.items() if k not in names}
            values = dict(zip(names, args, strict=False))
            values.update((k, v) for k, v in kwargs.items() if k in names)
            self.launches.append(Launch(function, grid, values, options, *self.place))

        return launch


@contextmanager
def recording() -> Iterator[Recorder]:
    """Within it, kernels of this process are recorded instead of launched."""
    recorder = Recorder()
    before = JITFunction.__getitem__
    JITFunction.__getitem__ = lambda function, grid: recorder.launcher(function, grid)
    try:
        with recorder:
            yield recorder
    finally:
        JITFunction.__getitem__ = before


class Watched:
    """Primitives or steps of a pass, telling a recorder which one runs."""

    def __init__(self, backend: Any, recorder: Recorder) -> None:
        self._backend, self._recorder = backend, recorder

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._backend, name)

        def run(first: Any, *rest: Any, **options: Any) -> Any:
            call = first if isinstance(first, Call) else None
            shape = rest[0].y.shape[1:] if call is not None else first.shape
            self._recorder.place = (name, call, tuple(shape), rest[1:])
            found = method(first, *rest, **options)
            self._recorder.place = _NOWHERE
            return found

        return method if name in _NOT_KERNELS else run
