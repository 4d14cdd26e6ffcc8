"""The CUDA kernels' own sources, compiled for the CPU."""
