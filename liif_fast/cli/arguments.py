"""Argument types that several subcommands share."""

from __future__ import annotations

import argparse
import json
from typing import Any


def whole_number(text: str) -> int:
    """Type of an option whose value is a whole number from 1, such as --threads."""
    if not (text.isascii() and text.isdigit() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"'{text}' is not a whole number from 1")
    return int(text)


def add_settings(parser: argparse.ArgumentParser) -> None:
    """Add --set, whose values `liif_fast.load` takes as settings (pairs of a name and a value)."""
    parser.add_argument(
        "--set",
        dest="settings",
        type=_setting,
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME=VALUE",
        help="settings that the weights do not tell: res_scale=0.1 for an EDSR of MMagic that was trained with it, "
        "local_ensemble=false for a LIIF that was trained without the ensemble, or to switch it off",
    )


def _setting(text: str) -> tuple[str, Any]:
    name, _, value = text.partition("=")
    try:
        return name, json.loads(value.lower())
    except ValueError:
        known = "res_scale=0.1 or local_ensemble=false"
        raise argparse.ArgumentTypeError(f"'{text}' is not NAME=VALUE such as {known}") from None
