"""The Triton kernels without a GPU: under the interpreter, and compiled ahead of time."""
