"""Argument types that several subcommands share."""

from __future__ import annotations

import argparse


def whole_number(text: str) -> int:
    """Type of an option whose value is a whole number from 1, such as --threads."""
    if not (text.isascii() and text.isdigit() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"'{text}' is not a whole number from 1")
    return int(text)
