"""Errors about one item: a single sentence with the item's name, here and in loader processes."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def naming(name: str) -> Iterator[None]:
    """Whatever the block raises becomes one sentence with `name`; the exception itself is its __cause__.

    ValueErrors and OSErrors become ValueError, MemoryErrors stay such, others become RuntimeError. Messages of this
    package are sentences; other exceptions are told with their type. A sentence that has the name stays as it is.
    """
    try:
        yield
    except Exception as error:
        lines = str(error).strip().splitlines()
        sentence = lines[0] if lines else ""
        if not _is_of_this_package(error):
            sentence = f"{type(error).__name__}: {sentence}" if sentence else type(error).__name__
        elif name in sentence:
            raise
        bad_input = isinstance(error, ValueError | OSError)
        kind = MemoryError if isinstance(error, MemoryError) else ValueError if bad_input else RuntimeError
        raise kind(f"{name}: {sentence}") from error


def item_name(dataset: Any, index: int) -> str:
    """The file name of an item of a dataset, or its number in a dataset without `name`."""
    name = getattr(dataset, "name", None)
    return str(name(index)) if callable(name) else f"item {index}"


def _is_of_this_package(error: Exception) -> bool:
    frames = list(traceback.walk_tb(error.__traceback__))
    return frames[-1][0].f_globals.get("__name__", "").partition(".")[0] == "liif_fast"


@contextmanager
def explaining_killed_workers() -> Iterator[None]:
    """Say what to do when the system ends a loader process; PyTorch may raise its error anywhere in the main thread."""
    try:
        yield
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker"):
            raise
        reason = str(error).splitlines()[0].strip().rstrip(".")
        raise RuntimeError(
            f"a loader process ended ({reason}): memory may have run out; lower num_workers, or set it to 0, "
            "which loads the data in the main process"
        ) from error


class WorkerTraceback(Exception):
    """The traceback of an error in a loader process, as text; the cause of the error that the main process raises."""
