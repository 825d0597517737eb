"""The stock module ``genotypes``: ``Genotype``, ``PRIMITIVES`` and the named cells."""

from pdarts_fast import genotype
from pdarts_fast.genotype import Genotype

PRIMITIVES = list(genotype.PRIMITIVES)
NASNet = genotype.NAMED["NASNet"]
AmoebaNet = genotype.NAMED["AmoebaNet"]
DARTS_V1 = genotype.DARTS_V1
DARTS_V2 = genotype.DARTS_V2
DARTS = DARTS_V2
PDARTS = genotype.PDARTS

__all__ = [
    "DARTS",
    "DARTS_V1",
    "DARTS_V2",
    "PDARTS",
    "PRIMITIVES",
    "AmoebaNet",
    "Genotype",
    "NASNet",
]
