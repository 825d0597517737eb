"""Fused kernels of the search cell; installed as ``pdarts_fast.kernels``."""
