"""Errors, warnings, the log and SIGTERM as users see them: one sentence on stderr, and an exit code."""

from __future__ import annotations

import argparse
import copy
import io
import logging
import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

# Errors about files, numbers and memory, unlike errors in this program.
EXPECTED_ERRORS = (ValueError, OSError, MemoryError, RuntimeError)


class Parser(argparse.ArgumentParser):
    """An argument parser that prints one sentence for an error, without the usage; unknown options come first."""

    _relaxed: Sequence[Any] = ()  # what is required, but not in the first pass

    def parse_known_args(  # type: ignore[override]  # the base class has overloads for the type of the namespace
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """As argparse's, but unknown arguments are an error, and are named before missing ones."""
        groups: list[Any] = [*self._actions, *self._mutually_exclusive_groups]
        self._relaxed = [each for each in groups if each.required]
        for each in self._relaxed:
            each.required = False
        try:
            unknown = super().parse_known_args(args, copy.copy(namespace))[1]
        finally:
            self._restore()
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return super().parse_known_args(args, namespace)

    def _restore(self) -> None:
        for each in self._relaxed:
            each.required = True

    def format_help(self) -> str:
        """As argparse's; --help calls it in the first pass."""
        self._restore()
        return super().format_help()

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message.rstrip('.')}; see {self.prog} --help.\n")


def print_error(error: object) -> None:
    """Print the first line of an error to stderr as a sentence."""
    text = str(error).strip() or type(error).__name__
    print(f"liif-fast: {text.splitlines()[0].rstrip('.')}.", file=sys.stderr, flush=True)


def escape_for_terminal() -> None:
    """Let stdout and stderr print characters that they cannot encode as escapes, such as a file's name in ASCII."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


class _Log(logging.Handler):
    """Prints records to the stdout of the moment, which a command may have redirected."""

    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record), flush=True)


@contextmanager
def format_warnings() -> Iterator[None]:
    """Print warnings in the form of errors."""

    def show(message: Warning | str, *_: Any, **__: Any) -> None:
        print_error(f"warning: {message}")

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield


@contextmanager
def show_log() -> Iterator[None]:
    """Print what the package logs, such as its choice of a model, to stdout; under torchrun in one process only."""
    if os.environ.get("RANK", "0") != "0":
        yield
        return
    log, handler = logging.getLogger("liif_fast"), _Log()
    level = log.level
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.setLevel(level)


@contextmanager
def exit_on_sigterm() -> Iterator[None]:
    """Let SIGTERM raise SystemExit, so that temporary files are removed as after Ctrl-C."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, frame: object) -> NoReturn:
        raise SystemExit(128 + number)

    previous = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
