"""The stock module ``model``: the derived networks; they read their ``drop_path_prob``."""

from pdarts_fast.network import AuxiliaryHead, Cell, NetworkCIFAR, NetworkImageNet

__all__ = ["AuxiliaryHead", "Cell", "NetworkCIFAR", "NetworkImageNet"]
