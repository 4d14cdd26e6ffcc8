"""Compiles Triton's kernels for GPUs that are not there."""
