"""The CUDA kernels without a GPU: their sources run on the CPU, and the compiler's account of them."""
