"""Writes saved results into the documents: `python -m bench.report [--check]`.

README.md and docs/*.md hold blocks between `<!-- bench:NAME -->` and `<!-- /bench:NAME -->`. Each block is generated
from the newest saved result with its workloads, so that no number is typed by hand. `--check` writes nothing; it fails
where a document differs from the results, or states a measured number outside the blocks.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from bench import blocks, results
from bench.results import Results

ROOT = Path(__file__).resolve().parent.parent
_BLOCK = re.compile(r"(<!-- bench:([\w-]+) -->\n).*?(<!-- /bench:\2 -->)", re.DOTALL)
# Outside the blocks no line may state a measured number: a time, a rate, a ratio of speeds, a PSNR, a peak.
_MEASURED = re.compile(
    r"\d\s?(?:ms|us|seconds?|[GT]FLOP/s|[GT]B/s|dB|Mpixel/s|images/s)\b"
    r"|\d\s?(?:x|times) (?:as fast|faster|slower|less memory)"
    r"|\d\s?% (?:of (?:the )?(?:peak|FMA peak|cuBLAS|copy)|faster|slower)"
)
_CODE = re.compile(r"^```.*?^```", re.DOTALL | re.MULTILINE)
_MARKER = re.compile(r"<!-- /?bench:[\w-]+ -->")


class ReportError(Exception):
    """A document or a results folder that the report cannot use; the message is one sentence."""


def documents() -> list[Path]:
    """README.md and the files of docs/."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def block_names(text: str) -> list[str]:
    """Names of the blocks in a document, in their order. Raises ReportError for a marker without its partner."""
    names = [match[2] for match in _BLOCK.finditer(text)]
    if len(_MARKER.findall(text)) != 2 * len(names):
        raise ReportError("a <!-- bench:NAME --> marker lacks its <!-- /bench:NAME -->, or is inside another block")
    return names


def loose_numbers(text: str) -> list[str]:
    """Lines of a document that state a measured number outside every block, and so without a saved result."""
    rest = _CODE.sub("", _BLOCK.sub("", text))
    return [line for line in rest.splitlines() if _MEASURED.search(line)]


def rewrite(text: str, found: Results, depth: int = 0) -> str:
    """A document's text with every block generated again; `depth` is the number of folders above the document.

    Raises ReportError for an unknown block, and for a block without a saved result.
    """
    for name in block_names(text):
        if name not in blocks.BLOCKS:
            raise ReportError(f"bench:{name} is not a block: choose one of {', '.join(blocks.BLOCKS)}")

    def block(match: re.Match[str]) -> str:
        made = blocks.BLOCKS[match[2]](found)
        if made is None:
            raise ReportError(f"no saved result has the numbers for bench:{match[2]}: run `make bench` first")
        return f"{match[1]}{made.replace('](bench/', '](' + '../' * depth + 'bench/')}{match[3]}"

    return _BLOCK.sub(block, text)


def rewritten(path: Path, found: Results) -> str:
    """The text that a document of this repository should have."""
    return rewrite(path.read_text(), found, len(path.relative_to(ROOT).parents) - 1)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="write nothing; fail where a document is out of date")
    args = parser.parse_args(arguments)
    try:
        found = results.load_all()
        wanted = {path: rewritten(path, found) for path in documents()}
    except (OSError, ValueError, ReportError) as error:
        sys.exit(str(error))
    for path, text in wanted.items():
        if not args.check:
            path.write_text(text)
        elif loose := loose_numbers(text):
            sys.exit(f"{path.name} states a number without a saved result: {loose[0]}")
        elif text != path.read_text():
            sys.exit(f"{path.name} differs from the saved results: run `python -m bench.report`")


if __name__ == "__main__":
    main()
