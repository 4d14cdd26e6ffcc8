"""Timing of the ops against the original formulation: clocks, peak rates, the runs to time, and `liif-fast bench`."""
