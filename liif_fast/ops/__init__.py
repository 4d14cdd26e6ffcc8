"""The ops: `gather`, `ensemble`, `query`, `render` and their helpers, each public function for every backend."""

from .backends import extension

extension.load()

from . import backends, flops, reference  # noqa: E402
from .decode import decode  # noqa: E402
from .ensemble import ensemble  # noqa: E402
from .fold import fold, metasr_fold  # noqa: E402
from .gather import gather  # noqa: E402
from .metasr import metasr_query  # noqa: E402
from .query import query, render  # noqa: E402

flops.watch()

__all__ = [
    "backends",
    "decode",
    "ensemble",
    "fold",
    "gather",
    "metasr_fold",
    "metasr_query",
    "query",
    "reference",
    "render",
]
