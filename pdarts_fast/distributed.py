"""Several processes that make one run: what each of them needs of the others.

Every rank holds the whole network and shows its part of each batch (`data.shard`). Gradients are
averaged by one all-reduce a step, so that all ranks make the same update. What the program decides
(to stop, that numbers are bad, which checkpoint to go on from) is decided together, over a gloo
group on the CPU, which also notices within moments that a rank has ended. Rank 0 alone writes.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import io
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pdarts_fast.data import Loader
from pdarts_fast.data.shard import Shard, WithoutRepeats
from pdarts_fast.errors import RunError, UsageError
from pdarts_fast.launch import Launch, mark_reported, read_launch
from pdarts_fast.run.signals import Interrupted

T = TypeVar("T")
E = TypeVar("E", bound=Exception)

# How long a rank waits for one that lives but does not answer. Ranks that end are noticed at once.
PATIENCE = datetime.timedelta(minutes=10)
# Added to a seed once a rank, modulo 2**64: the golden ratio, as in other counter-based generators.
SEED_STEP = 0x9E3779B97F4A7C15
_FAILURE = "failure"


class Ranks:
    """What a process needs of the other ranks of its run; this class is that of one alone.

    Attributes:
        launch: How the process was started.
    """

    def __init__(self, launch: Launch | None = None) -> None:
        self.launch = launch or Launch()

    @property
    def rank(self) -> int:
        """Number of this process."""
        return self.launch.rank

    @property
    def size(self) -> int:
        """Number of processes."""
        return self.launch.size

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, which writes and prints."""
        return self.rank == 0

    @property
    def shard(self) -> Shard:
        """This process's part of each batch."""
        return Shard(self.rank, self.size)

    def backend(self, device: torch.device) -> str | None:
        """What averages the gradients on a device, None in a process alone."""
        if self.size == 1:
            return None
        return "nccl" if device.type == "cuda" else "gloo"

    def use(self, device: torch.device) -> None:
        """Makes ready for tensors of a device; all ranks name one of the same type.

        Raises:
            RunError: The ranks have devices of different types.
        """

    def together(self, work: Callable[[], T]) -> T:
        """Result of this rank's `work`, once it has succeeded on every rank.

        Raises:
            UsageError, RunError: It failed on some rank; every rank raises it, rank 0 tells it.
        """
        return work()

    def first(self, work: Callable[[], T]) -> T:
        """Result of the `work` of rank 0, which no other rank does; errors as in `together`."""
        return work()

    def agree(self, value: int) -> int:
        """The largest of all ranks' values."""
        return value

    def agreed(self, error: E) -> E:
        """`error`, which every rank is about to raise: rank 0 tells it."""
        mark_reported(error, not self.is_first)
        return error

    def gather(self, value: T) -> list[T]:
        """The values of all ranks, by rank."""
        return [value]

    def require_equal(self, what: str, value: str) -> None:
        """Checks that all ranks have the same value.

        Raises:
            RunError: They have not.
        """
        values = self.gather(value)
        others = [str(rank) for rank, other in enumerate(values) if other != values[0]]
        if others:
            raise self.agreed(
                RunError(
                    f"{what} of rank {', '.join(others)} differ from those of rank 0: the ranks "
                    "must have the same software, data and kind of device; go on with --resume"
                )
            )

    def collect(self, *sums: Tensor) -> None:
        """Moves the sum over all ranks to rank 0, in place; the others are left with zero."""

    def total(self, value: Tensor) -> Tensor:
        """The sum over all ranks, on every rank, on the CPU."""
        return value

    def average(self, tensors: Sequence[Tensor]) -> None:
        """Mean over all ranks, in place, by one all-reduce that waits for no device.

        Args:
            tensors: Of one floating dtype and device, with the same shapes on every rank.
        """

    def average_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Mean of the gradients over all ranks, in place; capture-safe as `average` is."""
        self.average([p.grad for p in parameters if p.grad is not None])

    def average_statistics(self, network: nn.Module) -> None:
        """Mean of the running statistics over all ranks, in place.

        They follow the batches by a linear recursion, so when this is done does not matter.
        """
        parameters = {name for name, _ in network.named_parameters()}
        self.average(
            [
                value
                for name, value in network.state_dict().items()
                if name not in parameters and value.is_floating_point()
            ]
        )

    def shift_seed(self, state: Tensor) -> None:
        """Gives each rank skip-dropout masks of its own: adds ``rank * SEED_STEP`` to the seed.

        Args:
            state: Seed and step of rank 0, int64 [2]; changed in place.
        """
        shift = self.rank * SEED_STEP % 2**64
        state[0] += shift - 2**64 if shift >= 2**63 else shift

    def without_repeats(self, loader: Loader, batch_size: int) -> Loader:
        """A loader whose batches hold each image on one rank only; some may be empty.

        Args:
            loader: Shows this rank's part of each batch.
            batch_size: Images a batch, over all ranks.
        """
        return loader

    def broadcast_state(self, state: dict[str, Any] | None) -> dict[str, Any] | None:
        """The state that rank 0 has, on every rank.

        Args:
            state: What `torch.save` takes, or None; that of rank 0 counts.
        """
        return state


SINGLE = Ranks()


class Group(Ranks):
    """The ranks of a run of several processes, over torch.distributed.

    Args:
        launch: How this process was started.

    Raises:
        RunError: From every method: another rank has ended or does not answer.
    """

    def __init__(self, launch: Launch) -> None:
        super().__init__(launch)
        try:
            store, rank, size = next(dist.rendezvous("env://", timeout=PATIENCE))
            # A restart may find the store of the attempt before it.
            store = dist.PrefixStore(f"pdarts_fast/{launch.restarts}", store)
            dist.init_process_group(
                "gloo", store=store, rank=rank, world_size=size, timeout=PATIENCE
            )
        except RuntimeError as failure:
            raise RunError(
                f"the ranks cannot reach each other ({failure}): look at MASTER_ADDR, MASTER_PORT "
                "and the firewall between the machines"
            ) from failure
        self._store = store
        self._data: Any = dist.group.WORLD
        self._buffers: dict[tuple[int, torch.dtype, torch.device], Tensor] = {}

    def use(self, device: torch.device) -> None:
        types = self.gather(device.type)
        if len(set(types)) > 1:
            raise self.agreed(
                RunError(
                    f"--device is {', '.join(types)} on ranks 0..{self.size - 1}: give one that "
                    "all of them have"
                )
            )
        if device.type == "cuda":
            torch.cuda.set_device(device)
            with self._peers():
                self._data = dist.new_group(backend=self.backend(device), timeout=PATIENCE)
                # Connects now: inside a capture it could not.
                dist.all_reduce(torch.zeros(1, device=device), group=self._data)

    def together(self, work: Callable[[], T]) -> T:
        error: Exception | None = None
        result: Any = None
        try:
            result = work()
        except Exception as failure:
            error = failure
        told = self.gather(None if error is None else _told(error))
        failed = [(rank, what) for rank, what in enumerate(told) if what is not None]
        if not failed:
            return result
        if error is None:
            rank, (usage, text) = failed[0]
            error = (UsageError if usage else RunError)(f"rank {rank}: {text}")
        raise self.agreed(error)

    def first(self, work: Callable[[], T]) -> T:
        result = self.together(lambda: work() if self.is_first else None)
        box = [result]
        with self._peers():
            dist.broadcast_object_list(box, 0)
        return box[0]  # type: ignore[return-value]

    def agree(self, value: int) -> int:
        box = torch.tensor([value])
        with self._peers():
            dist.all_reduce(box, dist.ReduceOp.MAX)
        return int(box)

    def gather(self, value: T) -> list[T]:
        values: list[Any] = [None] * self.size
        with self._peers():
            dist.all_gather_object(values, value)
        return values

    def collect(self, *sums: Tensor) -> None:
        for own in sums:
            total = self.total(own)
            own.copy_(total if self.is_first else torch.zeros_like(total))

    def total(self, value: Tensor) -> Tensor:
        value = value.detach().cpu().clone()
        with self._peers():
            dist.all_reduce(value)
        return value

    def average(self, tensors: Sequence[Tensor]) -> None:
        if not tensors:
            return
        sizes = [tensor.numel() for tensor in tensors]
        key = (sum(sizes), tensors[0].dtype, tensors[0].device)
        if key not in self._buffers:
            self._buffers[key] = torch.empty(key[0], dtype=key[1], device=key[2])
        flat = self._buffers[key]
        with torch.no_grad():
            torch.cat([tensor.detach().flatten() for tensor in tensors], out=flat)
            with self._peers():
                dist.all_reduce(flat, group=self._data)
            flat.mul_(1 / self.size)
            means = [m.view(t.shape) for m, t in zip(flat.split(sizes), tensors, strict=True)]
            torch._foreach_copy_(list(tensors), means)

    def without_repeats(self, loader: Loader, batch_size: int) -> Loader:
        return WithoutRepeats(loader, batch_size, self.shard)

    def broadcast_state(self, state: dict[str, Any] | None) -> dict[str, Any] | None:
        buffer = io.BytesIO()
        if self.is_first and state is not None:
            torch.save(state, buffer)
        content = self.first(buffer.getvalue)
        if self.is_first or not content:
            return state
        buffer = io.BytesIO(content)
        return torch.load(buffer, map_location="cpu", weights_only=True)

    def leave(self, error: BaseException | None) -> None:
        """Ends the membership; an error is told to the others first.

        What goes wrong on the way out of a failing run is not worth more than the failure: it is
        logged for debugging.
        """
        if error is None:
            dist.destroy_process_group()
            return
        try:
            if isinstance(error, Interrupted):
                # torchrun ends the others once one has ended: rank 0 has said its last by now.
                self.agree(0)
            elif not isinstance(error, _PeerError):
                text = _told(error)[1] if isinstance(error, Exception) else type(error).__name__
                self._store.set(_FAILURE, f"rank {self.rank}: {text}")
            if self._data is dist.group.WORLD:
                dist.destroy_process_group()
            else:
                # A kernel that waits for a rank that has ended would never return.
                dist.distributed_c10d._abort_process_group()
        except RuntimeError as failure:
            logging.getLogger(__name__).debug("leaving the ranks failed: %s", failure)

    @contextlib.contextmanager
    def _peers(self) -> Iterator[None]:
        """Turns the failure of a collective into a `RunError` that says why."""
        try:
            yield
        except RuntimeError as failure:
            error = _PeerError(self._reason())
            mark_reported(error, not self.is_first)
            raise error from failure

    def _reason(self) -> str:
        # Rank 0 tells it. Where no torchrun holds the store, rank 0 does.
        if self.is_first and self._store.check([_FAILURE]):
            return f"stopped, because another rank failed: {self._store.get(_FAILURE).decode()}"
        return (
            "stopped, because another rank has ended or does not answer (torchrun says which); "
            "the run goes on from its last checkpoint with --resume"
        )


class _PeerError(RunError):
    """Another rank has failed."""


_joined: list[Ranks] = []


@contextlib.contextmanager
def joined() -> Iterator[Ranks]:
    """The ranks of this process, which it joins at the first use and leaves at the end of it.

    Raises:
        UsageError: The environment is not one that a launcher makes.
        RunError: The other ranks cannot be reached.
    """
    if _joined:
        yield _joined[0]
        return
    launch = read_launch()
    group = Group(launch) if launch.size > 1 else None
    _joined.append(group or Ranks(launch))
    logger = logging.getLogger("pdarts_fast")
    level = logger.level
    if launch.rank:
        logger.setLevel(logging.ERROR)
    error: BaseException | None = None
    try:
        yield _joined[0]
    except BaseException as failure:
        error = failure
        raise
    finally:
        _joined.clear()
        logger.setLevel(level)
        if group is not None:
            group.leave(error)


def digest_of(network: nn.Module) -> str:
    """SHA-256 of a network's parameters, the alphas of a supernet among them."""
    found = hashlib.sha256()
    for name, parameter in network.named_parameters():
        found.update(name.encode())
        value = parameter.detach().cpu().contiguous().flatten()
        found.update(value.view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def _told(error: Exception) -> tuple[bool, str]:
    """Whether an error is one of usage, and what to tell the user of it."""
    known = isinstance(error, (RunError, OSError, ValueError))
    text = str(error) if known else f"{type(error).__name__}: {error}"
    return isinstance(error, UsageError), " ".join(text.split())
