"""The README's tables, each a function of the saved results; None where no result has its numbers."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from bench import results, targets
from liif_fast.evaluation import markdown_table, mean_scores, read_csv

Results = list[dict[str, Any]]
Column = tuple[str, Callable[[dict[str, Any]], str]]
_SWEEP = ("scale-x2", "scale-x3.7", "scale-x8", "scale-x30")


def _time(entry: dict[str, Any]) -> str:
    """Median and the 20th to 80th percentile, in a unit that suits the median."""
    seconds = entry["seconds"]
    unit, factor = ("s", 1.0) if seconds["median"] >= 1 else ("ms", 1e3)
    median, low, high = (f"{seconds[key] * factor:.3g}" for key in ("median", "p20", "p80"))
    return f"{median} {unit} ({low} to {high})"


def _speedup(entry: dict[str, Any]) -> str:
    return f"{entry['speedup']['median']:.2f}x" if "speedup" in entry else ""


def _rate(entry: dict[str, Any]) -> str:
    return f"{entry['gflop_per_second']:.0f}"


def _fraction(entry: dict[str, Any]) -> str:
    return f"{entry['fraction_of_loop']['median']:.0%}" if "fraction_of_loop" in entry else ""


def _psnr(entry: dict[str, Any]) -> str:
    return f"{entry['psnr_db']:.0f} dB" if "psnr_db" in entry else "exact"


def _gradient_error(entry: dict[str, Any]) -> str:
    return f"{entry['gradient_error']:.0e}"


def _megabytes(key: str) -> Callable[[dict[str, Any]], str]:
    return lambda entry: f"{entry[key] / 1e6:.0f} MB"


_TIMES: list[Column] = [("time (20th to 80th percentile)", _time), ("against the original", _speedup)]
_WORK: list[Column] = [("GFLOP/s executed", _rate), ("of the loop's rate", _fraction)]
_ACCURACY: Column = ("PSNR against float64", _psnr)


def _source(result: dict[str, Any], workloads: list[str]) -> str:
    """The line below a table: what it was measured on, and where the file is."""
    machine = result["machine"]
    loops = [result["workloads"][name].get("loop_flop_per_second", {}) for name in workloads]
    rates = [f"{rate['median'] / 1e9:.0f} GFLOP/s {dtype}" for dtype, rate in loops[0].items()]
    where = " ".join(part for part in (machine["cpu"], machine["architecture"]) if part)
    loop = f"; multiply-add loop {', '.join(rates)}" if rates else ""
    doubts = sorted({doubt for name in workloads for doubt in result["workloads"][name].get("warnings", [])})
    warning = f" **{' '.join(doubts)}**" if doubts else ""
    return (
        f"{where}, {machine['threads']} threads, {machine['instructions']}{loop}; torch {result['versions']['torch']}; "
        f"commit {result['commit']}, {result['date'][:10]}: "
        f"[{result['path']}](bench/results/{result['path']}).{warning}\n"
    )


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _label(entry: dict[str, Any]) -> str:
    remark = f" ({entry['note']})" if entry.get("note") else ""
    return f"{entry['label']}, {entry['dtype']}{remark}"


def methods_table(found: Results, *, workload: str, columns: list[Column]) -> str | None:
    """A row a method; one that failed says why in the first column."""
    result = results.newest_with(found, workload)
    if result is None:
        return None
    record = result["workloads"][workload]
    rows = []
    for entry in record["methods"].values():
        if entry["status"] == "ok":
            rows.append([_label(entry), *(cell(entry) for _, cell in columns)])
        else:
            rows.append([_label(entry), entry["reason"], *[""] * (len(columns) - 1)])
    table = _table([record["about"], *(title for title, _ in columns)], rows)
    return f"{table}\n{_source(result, [workload])}"


def sweep_table(found: Results) -> str | None:
    """A row a scale, a column a method: Mpixel/s and the ratio to the original."""
    result = next((each for each in reversed(found) if all(name in each["workloads"] for name in _SWEEP)), None)
    if result is None:
        return None
    records = [result["workloads"][name] for name in _SWEEP]
    methods = records[0]["methods"]
    rows = []
    for record in records:
        cells = []
        for name in methods:
            entry = record["methods"][name]
            if entry["status"] != "ok":
                cells.append(entry["reason"])
                continue
            ratio = "" if name == "original" or "speedup" not in entry else f" ({_speedup(entry)})"
            cells.append(f"{entry['mpixel_per_second'] * 1e3:.0f}{ratio}")
        rows.append([record["about"], *cells])
    header = ["thousand pixels a second", *(f"{entry['label']}, {entry['dtype']}" for entry in methods.values())]
    return f"{_table(header, rows)}\n{_source(result, list(_SWEEP))}"


def targets_table(found: Results) -> str | None:
    """A row a promise: what was wanted, what was measured."""
    rows = []
    sources = {}
    for target in targets.TARGETS:
        result = results.newest_with(found, target.workload)
        verdict = targets.judge(target, result["workloads"]) if result else None
        if result is None or verdict is None:
            return None
        rows.append([verdict.what, verdict.wanted, verdict.measured, "yes" if verdict.met else "no"])
        sources[result["path"]] = _source(result, [target.workload])
    lines = "\n".join(sources.values())
    return f"{_table(['what', 'wanted', 'measured', 'met'], rows)}\n{lines}"


def psnr_table(_: Results) -> str | None:
    """The shipped weights against bicubic, from what their training run saved."""
    path = results.FOLDER / "weights" / "tiny" / "tiny-psnr.csv"
    if not path.exists():
        return None
    scores = read_csv(path)
    pictures = len({score.image for score in scores})
    source = f"Mean over {pictures} photographs: [{path.name}](bench/results/weights/tiny/{path.name})."
    return f"{markdown_table(mean_scores(scores))}\n\n{source}\n"


BLOCKS: dict[str, Callable[[Results], str | None]] = {
    "targets": targets_table,
    "decode": partial(methods_table, workload="decode-64-to-256", columns=[*_TIMES, *_WORK, _ACCURACY]),
    "training": partial(
        methods_table,
        workload="training-step",
        columns=[*_TIMES, *_WORK, ("gradients' relative error", _gradient_error)],
    ),
    "memory": partial(
        methods_table,
        workload="memory-512-to-2048",
        columns=[
            ("peak beside the inputs", _megabytes("peak_bytes")),
            ("latent map + output + 64 MB", _megabytes("allowed_bytes")),
        ],
    ),
    "sweep": sweep_table,
    "psnr": psnr_table,
    "gather": partial(methods_table, workload="gather", columns=[*_TIMES, _ACCURACY]),
    "ensemble": partial(methods_table, workload="ensemble", columns=[*_TIMES, _ACCURACY]),
    "encoder": partial(methods_table, workload="encoder", columns=[_TIMES[0], _ACCURACY]),
    "upscale": partial(methods_table, workload="upscale-photo", columns=[*_TIMES, _ACCURACY]),
}
