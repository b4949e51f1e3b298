"""What `benchmarks/gpu.py` is made of: one module a piece, and how pieces are run, timed and told of."""
