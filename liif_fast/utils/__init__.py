"""Helpers without a subject of their own: files, memory, processes."""
