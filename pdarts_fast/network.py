"""Derived networks: the cells of a genotype, stacked for CIFAR or for ImageNet (mobile setting).

Parameter names are the stock ones. BatchNorm is affine here. A cell runs as one operator on the
kernels of a backend where that is faster than its modules, with the same results.

Source: arXiv 1904.12760, sections 4.2 and 4.3; arXiv 1806.09055, sections 3.2 and A.2.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pdarts_fast.cells import choice
from pdarts_fast.genotype import Genotype, check_genotype
from pdarts_fast.kernels import backends
from pdarts_fast.operations import OPS, FactorizedReduce, Identity, ReLUConvBN, batch_norm

STEM_MULTIPLIER = 3
"""The CIFAR stem gives this many times C channels."""

HIDDEN_AUXILIARY = (128, 768)
"""Channels of the two convolutions of an auxiliary head."""


def drop_path(x: Tensor, probability: float | Tensor) -> Tensor:
    """Zeroes whole samples with a probability and scales the others by ``1 / (1 - probability)``.

    Args:
        x: ``[N, C, H, W]``.
        probability: 0 <= probability < 1; drawn from torch's random state of the device of ``x``.
            As a scalar on that device it may change in place under a captured graph.

    Source: arXiv 1605.07648, section 3.
    """
    keep = 1.0 - probability
    if isinstance(keep, Tensor):
        kept = torch.rand((x.shape[0], 1, 1, 1), device=x.device) < keep
        return x * (kept / keep).to(x.dtype)
    mask = torch.empty((x.shape[0], 1, 1, 1), dtype=x.dtype, device=x.device).bernoulli_(keep)
    return x * (mask / keep)


class Cell(nn.Module):
    """A cell with two operations a node.

    Args:
        genotype: Which operations, from which sources.
        C_prev_prev: Channels of the first input.
        C_prev: Channels of the second input.
        C: Channels of every node.
        reduction: Whether this is the reduction cell, whose edges from the inputs have stride 2.
        reduction_prev: Whether the cell before is a reduction, so that the first input is larger.

    Attributes:
        multiplier: How many nodes the output concatenates.
        backend: Name of what runs the cell, set by the network; ``reference`` is its modules.
        by_name: Whether that was asked for by name, not chosen for the shape.
    """

    def __init__(
        self,
        genotype: Genotype,
        C_prev_prev: int,
        C_prev: int,
        C: int,
        reduction: bool,
        reduction_prev: bool,
    ) -> None:
        super().__init__()
        pairs = genotype.reduce if reduction else genotype.normal
        self.C = C
        self.reduction = reduction
        self.backend = backends.REFERENCE
        self.by_name = False
        self.operations = [name for name, _ in pairs]
        self.sources = [source for _, source in pairs]
        self.concat = list(genotype.reduce_concat if reduction else genotype.normal_concat)
        self.multiplier = len(self.concat)
        if reduction_prev:
            self.preprocess0: nn.Module = FactorizedReduce(C_prev_prev, C)
        else:
            self.preprocess0 = ReLUConvBN(C_prev_prev, C, 1, 1, 0)
        self.preprocess1 = ReLUConvBN(C_prev, C, 1, 1, 0)
        self._ops = nn.ModuleList(
            OPS[name](C, 2 if reduction and source < 2 else 1, True) for name, source in pairs
        )

    def forward(self, s0: Tensor, s1: Tensor, drop_path_prob: float | Tensor) -> Tensor:
        """Runs the cell.

        Args:
            s0: Output of the cell before the last, ``[N, C_prev_prev, ...]``.
            s1: Output of the last cell, ``[N, C_prev, H, W]``.
            drop_path_prob: Drop-path probability in training; identities are never dropped.

        Returns:
            ``[N, multiplier * C, H, W]``, or half of each side for a reduction.
        """
        if choice.runs_fused(self, s0, s1):
            from pdarts_fast.cells import derived

            return derived.run(self, self.backend, s0, s1, drop_path_prob)
        return self.forward_op_by_op(s0, s1, drop_path_prob)

    def forward_op_by_op(self, s0: Tensor, s1: Tensor, drop_path_prob: float | Tensor) -> Tensor:
        """``forward`` by the cell's modules."""
        states = [self.preprocess0(s0), self.preprocess1(s1)]
        # The value of a tensor stays on its device: with one, dropping is always on.
        drops = self.training and (isinstance(drop_path_prob, Tensor) or drop_path_prob > 0)
        for node in range(len(self._ops) // 2):
            terms = []
            for k in (2 * node, 2 * node + 1):
                term = self._ops[k](states[self.sources[k]])
                if drops and not isinstance(self._ops[k], Identity):
                    term = drop_path(term, drop_path_prob)
                terms.append(term)
            states.append(terms[0] + terms[1])
        return torch.cat([states[state] for state in self.concat], dim=1)


class AuxiliaryHead(nn.Module):
    """A second classifier on an inner cell: pool 5, 1×1 to 128, 2×2 to 768, linear.

    Args:
        C: Channels of the input.
        num_classes: Size of the output.
        pool_stride: Stride of the 5×5 average pool; 3 wants inputs of 8×8, 2 of 7×7.
    """

    def __init__(self, C: int, num_classes: int, pool_stride: int) -> None:
        super().__init__()
        first, second = HIDDEN_AUXILIARY
        self.features = nn.Sequential(
            nn.ReLU(),
            nn.AvgPool2d(5, stride=pool_stride, count_include_pad=False),
            nn.Conv2d(C, first, 1, bias=False),
            batch_norm(first, affine=True),
            nn.ReLU(),
            nn.Conv2d(first, second, 2, bias=False),
            batch_norm(second, affine=True),
            nn.ReLU(),
        )
        self.classifier = nn.Linear(second, num_classes)
        self._pool_stride = pool_stride

    def forward(self, x: Tensor) -> Tensor:
        """Class scores ``[N, num_classes]`` of features ``[N, C, H, W]``.

        Raises:
            ValueError: The features do not have the one size that the head is made for.
        """
        pooled = [(side - 5) // self._pool_stride + 1 for side in x.shape[2:]]
        if pooled != [2, 2]:
            side = 5 + self._pool_stride
            raise ValueError(
                f"the auxiliary head wants features of {side}×{side}, got {x.shape[2]}×"
                f"{x.shape[3]}; change the image size or build the network with auxiliary=False"
            )
        return self.classifier(self.features(x).flatten(1))


class _DerivedNetwork(nn.Module):
    """What the two networks share: cells, heads and their order; subclasses bring the stem."""

    def __init__(
        self, C: int, num_classes: int, layers: int, auxiliary: bool, genotype: Genotype
    ) -> None:
        super().__init__()
        if C < 2:
            raise ValueError(f"C must be at least 2, got {C}")
        if num_classes < 1:
            raise ValueError(f"num_classes must be at least 1, got {num_classes}")
        if layers < 3:
            raise ValueError(f"layers must be at least 3 (two are reductions), got {layers}")
        self.genotype = check_genotype(genotype)
        self.drop_path_prob: float | Tensor = 0.0
        self._C = C
        self._num_classes = num_classes
        self._layers = layers
        self._auxiliary = auxiliary
        self._requested_backend = backends.AUTO
        self._backend_of_device: dict[str, str] = {}

    def use_backend(self, name: str) -> None:
        """Lets a backend run the cells from now on.

        Args:
            name: A name of ``kernels.backends.NAMES`` for every cell whose operations it has;
                ``auto`` (as at first) for those cells and shapes only that it runs faster.

        Raises:
            UsageError: The backend does not exist or is not usable.
        """
        backends.check(name)
        self._requested_backend = name
        self._backend_of_device.clear()

    @property
    def widest_cell(self) -> int:
        """C of the widest cell."""
        return max(cell.C for cell in self.cells if isinstance(cell, Cell))

    def _use_backend_of(self, device_type: str) -> None:
        """Resolves the backend once a device type, so ``.cuda()`` after building may change it."""
        if device_type not in self._backend_of_device:
            chosen = choice.resolve(self._requested_backend, device_type, self.widest_cell)
            self._backend_of_device[device_type] = chosen
        chosen = self._backend_of_device[device_type]
        for cell in self.cells:
            assert isinstance(cell, Cell)
            cell.backend, cell.by_name = chosen, self._requested_backend != backends.AUTO

    def _build(self, stem_channels: int, reduction_before: bool, pool_stride: int) -> None:
        """Adds the cells and both heads.

        Args:
            stem_channels: Channels of both outputs of the stem.
            reduction_before: Whether the stem's first output is twice as large as the second.
            pool_stride: Stride of the auxiliary head's pool.
        """
        self.cells = nn.ModuleList()
        C_prev_prev, C_prev, C = stem_channels, stem_channels, self._C
        reduction_prev = reduction_before
        auxiliary_channels = 0
        for index in range(self._layers):
            reduction = index in (self._layers // 3, 2 * self._layers // 3)
            if reduction:
                C *= 2
            cell = Cell(self.genotype, C_prev_prev, C_prev, C, reduction, reduction_prev)
            self.cells.append(cell)
            reduction_prev = reduction
            C_prev_prev, C_prev = C_prev, cell.multiplier * C
            if index == self._auxiliary_index:
                auxiliary_channels = C_prev
        if self._auxiliary:
            self.auxiliary_head = AuxiliaryHead(auxiliary_channels, self._num_classes, pool_stride)
        self.global_pooling = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(C_prev, self._num_classes)

    @property
    def _auxiliary_index(self) -> int:
        """The cell that the auxiliary head looks at: the second reduction."""
        return 2 * self._layers // 3

    def _stem_outputs(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The two inputs of the first cell."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Class scores of images ``[N, 3, H, W]``.

        Returns:
            Logits ``[N, num_classes]`` and those of the auxiliary head; None for the latter in
            evaluation or without a head.
        """
        known = not isinstance(self.drop_path_prob, Tensor)
        if known and not 0 <= self.drop_path_prob < 1:
            raise ValueError(f"drop_path_prob must be in 0 <= p < 1, got {self.drop_path_prob}")
        self._use_backend_of(x.device.type)
        logits_aux = None
        s0, s1 = self._stem_outputs(x)
        for index, cell in enumerate(self.cells):
            s0, s1 = s1, cell(s0, s1, self.drop_path_prob)
            if index == self._auxiliary_index and self._auxiliary and self.training:
                logits_aux = self.auxiliary_head(s1)
        return self.classifier(self.global_pooling(s1).flatten(1)), logits_aux

    def extra_repr(self) -> str:
        return f"C={self._C}, layers={self._layers}, auxiliary={self._auxiliary}"


class NetworkCIFAR(_DerivedNetwork):
    """A derived network for images of 32×32 (any size without an auxiliary head).

    Args:
        C: Channels of the first cell's nodes, at least 2.
        num_classes: Size of the output.
        layers: Number of cells, at least 3; those at a third and two thirds are reductions.
        auxiliary: Whether to build the auxiliary head.
        genotype: The two cells.

    Attributes:
        drop_path_prob: Drop-path probability in training, 0 at first; a number, or a scalar tensor.

    Raises:
        ValueError: An argument is out of its range or the genotype is not valid.
    """

    def __init__(
        self, C: int, num_classes: int, layers: int, auxiliary: bool, genotype: Genotype
    ) -> None:
        super().__init__(C, num_classes, layers, auxiliary, genotype)
        stem_channels = STEM_MULTIPLIER * C
        self.stem = nn.Sequential(
            nn.Conv2d(3, stem_channels, 3, padding=1, bias=False),
            batch_norm(stem_channels, affine=True),
        )
        self._build(stem_channels, reduction_before=False, pool_stride=3)

    def _stem_outputs(self, x: Tensor) -> tuple[Tensor, Tensor]:
        s0 = self.stem(x)
        return s0, s0


def _stride_2_conv(C_in: int, C_out: int) -> nn.Conv2d:
    return nn.Conv2d(C_in, C_out, 3, stride=2, padding=1, bias=False)


class NetworkImageNet(_DerivedNetwork):
    """A derived network for images of 224×224 (any size without an auxiliary head).

    The stem has three stride-2 convolutions; its first output, after two of them, is the first
    cell's first input, as if a reduction had come before.

    Args:
        C: Channels of the stem and of the first cell's nodes, at least 2.
        num_classes: Size of the output.
        layers: Number of cells, at least 3; those at a third and two thirds are reductions.
        auxiliary: Whether to build the auxiliary head.
        genotype: The two cells.

    Attributes:
        drop_path_prob: Drop-path probability in training, 0 at first; a number, or a scalar tensor.

    Raises:
        ValueError: An argument is out of its range or the genotype is not valid.
    """

    def __init__(
        self, C: int, num_classes: int, layers: int, auxiliary: bool, genotype: Genotype
    ) -> None:
        super().__init__(C, num_classes, layers, auxiliary, genotype)
        self.stem0 = nn.Sequential(
            _stride_2_conv(3, C // 2),
            batch_norm(C // 2, affine=True),
            nn.ReLU(),
            _stride_2_conv(C // 2, C),
            batch_norm(C, affine=True),
        )
        self.stem1 = nn.Sequential(nn.ReLU(), _stride_2_conv(C, C), batch_norm(C, affine=True))
        self._build(C, reduction_before=True, pool_stride=2)

    def _stem_outputs(self, x: Tensor) -> tuple[Tensor, Tensor]:
        s0 = self.stem0(x)
        return s0, self.stem1(s0)
