"""Tests of liif_fast/benchmark and of `liif-fast bench`."""
