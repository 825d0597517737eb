"""Cells with any operations on any edges, run by the primitives of a backend.

``kernels.cell`` runs the cells of the supernet, where every edge has the same operations. What is
here runs derived cells (``derived``) and, for ``dropin``, cells of other programs.
"""
