"""Timing, benchmark methods and reports."""
