"""Steps that are recorded once and replayed: CUDA graphs, and their stand-in on a CPU."""
