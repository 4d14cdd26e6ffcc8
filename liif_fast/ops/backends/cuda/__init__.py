"""The `cuda` backend: hands tensors to the CUDA kernels of csrc/cuda in the layout and dtype they take."""

from .decode import query, query_backward, render, render_backward, saved_bytes
from .gather import ensemble, ensemble_backward, gather, gather_backward, metasr_query, metasr_query_backward

__all__ = [
    "ensemble",
    "ensemble_backward",
    "gather",
    "gather_backward",
    "metasr_query",
    "metasr_query_backward",
    "query",
    "query_backward",
    "render",
    "render_backward",
    "saved_bytes",
]
