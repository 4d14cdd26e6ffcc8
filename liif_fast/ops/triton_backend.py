"""The `triton` backend: one function for every op of `library.py`, from the modules that hold their kernels.

Not named `triton`, so that it never stands in the way of `import triton`; nothing imports it before an op needs it.
"""

from .triton_ensemble import ensemble, ensemble_backward
from .triton_gather import gather, gather_backward
from .triton_metasr import metasr_query, metasr_query_backward
from .triton_query import query, query_backward, render, render_backward, saved_bytes

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
