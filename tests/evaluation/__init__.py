"""Metrics, protocols and comparisons."""
