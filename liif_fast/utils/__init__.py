"""Helpers that any package may use: files, memory, hardware, processes."""
