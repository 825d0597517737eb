"""Data sets held in memory as uint8 tensors, and loaders that augment whole batches at once."""

from pdarts_fast.data.base import Dataset, ImageData, split_indices
from pdarts_fast.data.datasets import DATASETS, load_dataset
from pdarts_fast.data.loader import Loader, ResidentLoader
from pdarts_fast.data.plan import Augmentation, Shard

__all__ = [
    "DATASETS",
    "Augmentation",
    "Dataset",
    "ImageData",
    "Loader",
    "ResidentLoader",
    "Shard",
    "load_dataset",
    "split_indices",
]
