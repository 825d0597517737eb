"""Fused operations for any program, each a torch operator over the primitives of a backend."""

from .mixed_sum import weighted_sum, weighted_sum_reference
from .separable import dil_conv, sep_conv
from .separable_reference import NormState, separable_reference

__all__ = [
    "NormState",
    "dil_conv",
    "sep_conv",
    "separable_reference",
    "weighted_sum",
    "weighted_sum_reference",
]
