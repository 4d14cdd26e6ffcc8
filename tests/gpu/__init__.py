"""Tests that need a GPU, and the run of every check on one: `python3 -m tests.gpu --out DIR` (see README.md here)."""
