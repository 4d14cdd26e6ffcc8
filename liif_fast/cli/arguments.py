"""Argument types that several subcommands share."""

from __future__ import annotations

import argparse
import json
import math
import os
from pathlib import Path
from typing import Any

MODEL = "a .safetensors or .pth file, or a name that `liif-fast models` lists"


def whole_number(text: str, most: int | None = None) -> int:
    """Type of an option whose value is a whole number from 1, such as --memory; most: the largest one."""
    if not (text.isascii() and text.isdigit() and 1 <= int(text) <= (most or int(text))):
        raise argparse.ArgumentTypeError(f"'{text}' is not a whole number from 1{f' to {most}' if most else ''}")
    return int(text)


def threads(text: str) -> int:
    """Type of --threads. The system refuses to start far more threads than it has cores."""
    return whole_number(text, max(1024, os.cpu_count() or 1))


def path(text: str) -> Path:
    """Type of an option that names a file or folder. An empty text would name the current folder."""
    if not text:
        raise argparse.ArgumentTypeError("the name is empty, so give a file or folder ('.' is the current folder)")
    return Path(text)


def add_imports(parser: argparse.ArgumentParser) -> None:
    """Add --imports, whose values `liif_fast.training.config.import_code` takes."""
    parser.add_argument(
        "--imports",
        action="append",
        default=[],
        metavar="FILE",
        help="Python file (or module) that registers models and encoders of your own, as `imports` in a configuration "
        "(repeatable)",
    )


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


def add_target(parser: argparse.ArgumentParser, *, required: bool) -> None:
    """Add --scale and --size, one of which may be given."""
    target = parser.add_mutually_exclusive_group(required=required)
    scale = "a factor such as 3.7, or one for the width and one for the height such as 2x3"
    target.add_argument("--scale", type=_scale, help=scale)
    size = "WIDTHxHEIGHT of the result, such as 1920x1080 pixels; of 1920x (or 1920) and x1080 the other side follows"
    target.add_argument("--size", type=_size, help=size)


def _scale(text: str) -> float | tuple[float, float]:
    parts = text.lower().split("x")
    try:
        factors = [float(part) for part in parts]
    except ValueError:
        factors = []
    if len(factors) not in (1, 2) or not all(math.isfinite(factor) and factor > 0 for factor in factors):
        raise argparse.ArgumentTypeError(f"'{text}' is not a positive number such as 3.7, nor two such as 2x3")
    return factors[0] if len(factors) == 1 else (factors[1], factors[0])


def _size(text: str) -> tuple[int | None, int | None]:
    """(rows, columns), None for a side that follows from the other."""
    width, _, height = text.lower().partition("x")
    sides = [side for side in (width, height) if side]
    if not sides or not all(side.isascii() and side.isdigit() and int(side) > 0 for side in sides):
        raise argparse.ArgumentTypeError(f"'{text}' is not WIDTHxHEIGHT such as 1920x1080, 1920x or x1080")
    return int(height) if height else None, int(width) if width else None
