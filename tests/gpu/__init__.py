"""The checks that a GPU runs, tried without one."""
