"""The primitives of a search cell as Triton kernels for CUDA."""
