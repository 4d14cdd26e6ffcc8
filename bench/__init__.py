"""Timings of the ops against the original formulation: `make bench`, or `python -m bench.run` and `bench.report`."""

from liif_fast.benchmark import original as original
from liif_fast.benchmark import timing as timing
