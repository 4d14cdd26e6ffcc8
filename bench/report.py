"""Brings saved results into the README and into plots: `python -m bench.report [--check]`.

README.md holds blocks between `<!-- bench:NAME -->` and `<!-- /bench:NAME -->`; each is written anew from the newest
saved result that measured its workloads, so that no number in it is ever typed. `--check` writes nothing and fails
where the README says something else than the results do, or claims a measured number outside the blocks.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from typing import Any

from bench import results, tables

README = Path(__file__).resolve().parent.parent / "README.md"
_BLOCK = re.compile(r"(<!-- bench:([\w-]+) -->\n).*?(<!-- /bench:\2 -->)", re.DOTALL)
# Outside the blocks no line may claim what only a measurement knows: a time, a rate, a ratio of speeds, a PSNR, a peak.
_MEASURED = re.compile(
    r"\d\s?(?:ms|us|seconds?|[GT]FLOP/s|[GT]B/s|dB|Mpixel/s|images/s)\b"
    r"|\d\s?(?:x|times) (?:as fast|faster|slower|less memory)"
    r"|\d\s?% (?:of (?:the )?(?:peak|loop|cuBLAS|copy)|faster|slower)"
)
_CODE = re.compile(r"^```.*?^```", re.DOTALL | re.MULTILINE)
_MARKER = re.compile(r"<!-- /?bench:[\w-]+ -->")


class ReportError(Exception):
    """A README or results folder that nothing can be reported from; the message is one sentence."""


def block_names(text: str) -> list[str]:
    """Names of the blocks in a README's text, in their order. Raises ReportError for a marker without its partner."""
    names = [match[2] for match in _BLOCK.finditer(text)]
    if len(_MARKER.findall(text)) != 2 * len(names):
        raise ReportError("a <!-- bench:NAME --> marker in the README lacks its <!-- /bench:NAME -->, or stands inside")
    return names


def loose_numbers(text: str) -> list[str]:
    """Lines of a README that claim a measured number outside of every block: no result file stands behind them."""
    rest = _CODE.sub("", _BLOCK.sub("", text))
    return [line for line in rest.splitlines() if _MEASURED.search(line)]


def rewrite(text: str, found: list[dict[str, Any]]) -> str:
    """The README's text with every block made anew.

    Raises ReportError for a block no table is known for, and for one that no saved result has the numbers of.
    """
    for name in block_names(text):
        if name not in tables.BLOCKS:
            raise ReportError(f"the README has a block bench:{name}, but there are only {', '.join(tables.BLOCKS)}")

    def block(match: re.Match[str]) -> str:
        table = tables.BLOCKS[match[2]](found)
        if table is None:
            raise ReportError(f"no saved result has the numbers for bench:{match[2]}: run `make bench` first")
        return f"{match[1]}{table}{match[3]}"

    return _BLOCK.sub(block, text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; fail where the README is out of date")
    parser.add_argument("--results", type=Path, default=results.FOLDER)
    parser.add_argument("--readme", type=Path, default=README)
    args = parser.parse_args()
    try:
        text = args.readme.read_text()
        found = results.load_all(args.results)
        wanted = rewrite(text, found)
    except (OSError, ValueError, ReportError) as error:
        sys.exit(str(error))
    if args.check:
        if loose := loose_numbers(text):
            sys.exit(f"{args.readme.name} claims a number that no saved result stands behind: {loose[0]}")
        if wanted != text:
            sys.exit(f"{args.readme.name} differs from the saved results: run `python -m bench.report`")
        return
    args.readme.write_text(wanted)
    try:
        from bench import plots
    except ModuleNotFoundError as error:
        print(
            f"No plots: {error.name} is not installed. The tables in {args.readme.name} are written.", file=sys.stderr
        )
        return
    for path in plots.draw(found, args.results / "plots"):
        print(path)


if __name__ == "__main__":
    main()
