"""The command `liif-fast`."""
