"""Calls a function in a process of its own, so that a crash or a hang costs one call and not the run."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from liif_fast.benchmark.timing import failure


class ChildError(Exception):
    """The child process ended without a result; the message is the reason."""


def call(
    function: Callable[..., Any],
    *args: Any,
    silence_s: float | None = None,
    on_message: Callable[[Any], None] = lambda message: None,
) -> Any:
    """`function(send, *args)` in a new process; `send(message)` calls `on_message(message)` here.

    Raises ChildError where the function raises, the process ends, or no message arrives for `silence_s` seconds.
    """
    context = multiprocessing.get_context("spawn")  # a forked process could not use CUDA
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_run, args=(sender, function, args))
    process.start()
    sender.close()  # the child's end is then the only one, so that the pipe ends with the child
    try:
        while receiver.poll(silence_s):
            kind, value = receiver.recv()
            if kind == "result":
                return value
            if kind == "error":
                raise ChildError(value)
            on_message(value)
        raise ChildError(f"took more than {silence_s:.0f} s")
    except EOFError:
        process.join()
        code = process.exitcode or 0
        reason = f"was ended by signal {-code}" if code < 0 else f"ended with exit code {code}"
        raise ChildError(f"the process {reason}") from None
    finally:
        process.kill()
        process.join()


def _run(sender: Connection, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    # Without its parent the child ends, so that it does not keep the GPU.
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
    try:
        result = function(lambda message: sender.send(("message", message)), *args)
    except (RuntimeError, MemoryError, ValueError) as error:
        sender.send(("error", failure(error)))
    else:
        sender.send(("result", result))
