"""Configurations and training runs."""
