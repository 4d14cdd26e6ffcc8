"""The command `liif-fast`: its subcommands, and its exit codes.

0: done. 1: an error, described on stderr. 2: the command line is wrong. 130 or 143: interrupted.
"""

from __future__ import annotations

from collections.abc import Sequence

import liif_fast
from liif_fast.cli import bench, doctor, evaluate, export, messages, models, train, upscale
from liif_fast.cli.messages import EXPECTED_ERRORS, Parser, print_error

COMMANDS = (upscale.add, train.add, evaluate.add, models.add, export.add, bench.add, doctor.add)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line `arguments` (None: those of the process) and return its exit code."""
    messages.escape_for_terminal()
    parser = Parser(prog="liif-fast", description="LIIF: upscale images by any factor.")
    parser.add_argument("--version", action="version", version=f"liif-fast {liif_fast.__version__}")
    commands = parser.add_subparsers(title="commands", dest="command", parser_class=Parser)
    for add in COMMANDS:
        add(commands)
    options = parser.parse_args(arguments)
    if options.command is None:
        parser.print_help()
        return 2
    with messages.format_warnings(), messages.show_log(), messages.exit_on_sigterm():
        try:
            return options.run(options)
        except KeyboardInterrupt:
            print_error("interrupted")
            return 130
        except EXPECTED_ERRORS as error:
            print_error(error)
            return 1
