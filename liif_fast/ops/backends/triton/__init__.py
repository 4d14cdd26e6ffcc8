"""The `triton` backend: one function for every op of `library.py`, from the modules that hold their kernels.

Nothing imports this package before an op needs it, so Triton is optional.
"""

from .decode import query, query_backward, render, render_backward, saved_bytes
from .ensemble import ensemble, ensemble_backward
from .gather import gather, gather_backward
from .metasr import metasr_query, metasr_query_backward

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
