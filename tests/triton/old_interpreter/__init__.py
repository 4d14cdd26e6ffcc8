"""Tests that run Triton's kernels under its interpreter."""
