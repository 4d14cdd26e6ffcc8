"""The `cuda` backend: passes tensors to the CUDA kernels of csrc/cuda in the layout and dtype that these take."""

from . import hopper as hopper
from .convolution import convolution, convolves, kernel_grads
from .decode import decode, decode_backward, saved_bytes
from .gather import ensemble, ensemble_backward, gather, gather_backward, metasr_query, metasr_query_backward

__all__ = [
    "convolution",
    "convolves",
    "decode",
    "decode_backward",
    "ensemble",
    "ensemble_backward",
    "gather",
    "gather_backward",
    "kernel_grads",
    "metasr_query",
    "metasr_query_backward",
    "saved_bytes",
]
