"""The `triton` backend: one function for every op of registration.py, from the modules that hold their kernels.

Nothing imports this package before an op needs it, so Triton is optional.
"""

from .decode import decode, decode_backward, saved_bytes
from .ensemble import ensemble, ensemble_backward
from .gather import gather, gather_backward
from .metasr import metasr_query, metasr_query_backward

__all__ = [
    "decode",
    "decode_backward",
    "ensemble",
    "ensemble_backward",
    "gather",
    "gather_backward",
    "metasr_query",
    "metasr_query_backward",
    "saved_bytes",
]
