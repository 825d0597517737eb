"""The stem of networks for small images."""

from __future__ import annotations

from torch import Tensor, nn

from pdarts_fast.kernels import backends
from pdarts_fast.kernels import stem as kernels
from pdarts_fast.operations import batch_norm


class Stem(nn.Sequential):
    """A 3x3 convolution from RGB and BatchNorm.

    Args:
        channels: Of the output.

    Attributes:
        backend: Name of what runs the stem: of the cells, where that has kernels for it.
    """

    def __init__(self, channels: int) -> None:
        super().__init__(
            nn.Conv2d(3, channels, 3, padding=1, bias=False), batch_norm(channels, affine=True)
        )
        self.backend = backends.REFERENCE

    def forward(self, x: Tensor) -> Tensor:
        """``[N, 3, H, W]`` to ``[N, channels, H, W]``."""
        conv, norm = self
        assert isinstance(conv, nn.Conv2d)
        assert isinstance(norm, nn.BatchNorm2d)
        if kernels.serves(self.backend, conv, norm, x):
            return kernels.run(self.backend, conv, norm, x)
        return norm(conv(x))
