"""Timings of the ops against the original formulation: `python -m bench.run`, then `python -m bench.report`."""
