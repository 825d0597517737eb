"""The stock module ``operations``: ``OPS`` and the classes of the primitives."""

import torch
import torch.nn as nn

from pdarts_fast.operations import (
    OPS,
    DilConv,
    FactorizedReduce,
    Identity,
    ReLUConvBN,
    SepConv,
    Zero,
)

# Scripts write `from operations import *` and use `torch` and `nn` from it.
__all__ = [
    "OPS",
    "DilConv",
    "FactorizedReduce",
    "Identity",
    "ReLUConvBN",
    "SepConv",
    "Zero",
    "nn",
    "torch",
]
