"""Timings of the ops against the original formulation: workloads, methods, saved results and the documents' tables.

`make bench`, or `python -m bench.run` and `python -m bench.report`. The clocks are those of liif_fast/benchmark.
"""
