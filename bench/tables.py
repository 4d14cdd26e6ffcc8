"""The README's tables, each a function of the saved results; None where no result has its numbers."""

from __future__ import annotations

import csv
from collections.abc import Callable
from functools import partial
from typing import Any

from bench import loader, results, study, targets, training_step
from bench.workloads import WORKLOADS
from liif_fast.utils import tables

Results = list[dict[str, Any]]
Column = tuple[str, Callable[[dict[str, Any]], str]]
SCALES = ("scale-x2", "scale-x3.7", "scale-x8", "scale-x30")
SIZES = tuple(sorted((name for name in WORKLOADS if WORKLOADS[name].kind == "size"), key=lambda name: int(name[5:])))
NOT_YET = "Not yet run on a GPU.\n"


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


def _tera(entry: dict[str, Any]) -> str:
    return f"{entry['gflop_per_second'] / 1e3:.3g}"


def _fraction(of: str) -> Callable[[dict[str, Any]], str]:
    return lambda entry: f"{entry[key]['median']:.0%}" if (key := f"fraction_of_{of}") in entry else ""


def _psnr(entry: dict[str, Any]) -> str:
    return f"{entry['psnr_db']:.0f} dB" if "psnr_db" in entry else "exact"


def _gradient_error(entry: dict[str, Any]) -> str:
    return f"{entry['gradient_error']:.0e}"


def _megabytes(key: str) -> Callable[[dict[str, Any]], str]:
    return lambda entry: f"{entry[key] / 1e6:.0f} MB" if entry.get(key) is not None else ""


_TIMES: list[Column] = [("time (20th to 80th percentile)", _time), ("against the original", _speedup)]
_WORK: list[Column] = [
    ("GFLOP/s executed", _rate),
    ("of the loop's rate", _fraction("loop")),
    ("of the library's product", _fraction("gemm")),
]
_GPU_WORK: list[Column] = [("TFLOP/s executed", _tera), ("of cuBLAS", _fraction("gemm"))]
_MEMORY: Column = ("peak beside the inputs", _megabytes("peak_bytes"))
_ACCURACY: Column = ("PSNR against float64", _psnr)
_GRADIENTS: Column = ("gradients' relative error", _gradient_error)


def _rates(record: dict[str, Any], key: str, what: str) -> str:
    """'; multiply-add loop 234 GFLOP/s float32, ...' of a record; '' where it holds none."""
    rates = record.get(f"{key}_flop_per_second", {})
    found = [f"{rate['median'] / 1e9:.0f} GFLOP/s {dtype}" for dtype, rate in rates.items()]
    return f"; {what} {', '.join(found)}" if found else ""


def _source(result: dict[str, Any], workloads: list[str]) -> str:
    """The line below a table: what it was measured on, and where the file is."""
    machine, records = result["machine"], [result["workloads"][name] for name in workloads]
    if machine["device"] == "cuda":
        where = f"{machine['gpu']}, driver {machine['driver']}"
    else:
        name = " ".join(part for part in (machine["cpu"], machine["architecture"]) if part)
        where = f"{name}, {machine['threads']} threads, {machine['instructions']}"
    rates = _rates(records[0], "loop", "multiply-add loop") + _rates(records[0], "gemm", "library's product")
    doubts = sorted({doubt for record in records for doubt in record.get("warnings", [])})
    warning = f" **{' '.join(doubts)}**" if doubts else ""
    return (
        f"{where}{rates}; torch {result['versions']['torch']}; commit {result['commit']}, {result['date'][:10]}: "
        f"[{result['path']}](bench/results/{result['path']}).{warning}\n"
    )


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _label(entry: dict[str, Any]) -> str:
    remark = f" ({entry['note']})" if entry.get("note") else ""
    return f"{entry['label']}, {entry['dtype']}{remark}"


def _wanted(record: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The methods worth a row: all but those that belong to another device."""
    return {name: entry for name, entry in record["methods"].items() if entry["status"] != "refused"}


def methods_table(found: Results, *, workload: str, columns: list[Column], device: str = "cpu") -> str | None:
    """A row a method; one that failed says why in the first column."""
    result = results.newest_with(found, workload, device)
    if result is None:
        return None
    record = result["workloads"][workload]
    rows = []
    for entry in _wanted(record).values():
        if entry["status"] == "ok":
            rows.append([_label(entry), *(cell(entry) for _, cell in columns)])
        else:
            rows.append([_label(entry), entry["reason"], *[""] * (len(columns) - 1)])
    table = _table([record["about"], *(title for title, _ in columns)], rows)
    return f"{table}\n{_source(result, [workload])}"


def series_table(found: Results, *, names: tuple[str, ...], device: str = "cpu", title: str, cell: Any) -> str | None:
    """A row a workload, a column a method, of the newest result that has them all (but those its device skips)."""
    result = results.newest_with_all(found, [name for name in names if not WORKLOADS[name].refusal(device)], device)
    if result is None:
        return None
    held = [name for name in names if _wanted(result["workloads"].get(name, {"methods": {}}))]
    records = [result["workloads"][name] for name in held]
    methods = {name: entry for record in records for name, entry in _wanted(record).items()}
    rows = []
    for record in records:
        entries = [record["methods"].get(name) for name in methods]
        cells = ["" if e is None else cell(e) if e["status"] == "ok" else e["reason"] for e in entries]
        rows.append([record["about"], *cells])
    header = [title, *(f"{entry['label']}, {entry['dtype']}" for entry in methods.values())]
    return f"{_table(header, rows)}\n{_source(result, held)}"


def _pixels(entry: dict[str, Any]) -> str:
    ratio = f" ({_speedup(entry)})" if "speedup" in entry and entry["speedup"]["median"] != 1 else ""
    return f"{entry['mpixel_per_second'] * 1e3:.0f}{ratio}"


def _time_and_memory(entry: dict[str, Any]) -> str:
    extrapolated = "~" if entry.get("note", "").startswith("from ") else ""
    return f"{extrapolated}{entry['seconds']['median']:.3g} s, {_megabytes('peak_bytes')(entry)}"


def _milliseconds(entry: dict[str, Any]) -> str:
    return f"{entry['seconds']['median'] * 1e3:.3g} ms" + (f" ({_speedup(entry)})" if "speedup" in entry else "")


def _share(entry: dict[str, Any]) -> str:
    return f"{1 / entry['speedup']['median']:.1%}" if "speedup" in entry else ""


def targets_table(found: Results) -> str | None:
    """A row a promise about the CPU: what was wanted, what was measured."""
    rows = []
    sources = {}
    for target in targets.TARGETS:
        if target.device != "cpu":
            continue
        result = results.newest_with(found, target.workload)
        verdict = targets.judge(target, result["workloads"]) if result else None
        if result is None or verdict is None:
            return None
        rows.append([verdict.what, verdict.wanted, verdict.measured, "yes" if verdict.met else "no"])
        sources[result["path"]] = _source(result, [target.workload])
    lines = "\n".join(sources.values())
    return f"{_table(['what', 'wanted', 'measured', 'met'], rows)}\n{lines}"


def gpu_tables(found: Results) -> str:
    """Decode, training step and promises on a GPU, or that there is no result of one."""
    parts = [
        methods_table(
            found,
            workload="decode-256-to-1024",
            columns=[*_TIMES, *_GPU_WORK, _MEMORY, _ACCURACY],
            device="cuda",
        ),
        methods_table(
            found, workload="training-step", columns=[*_TIMES, *_GPU_WORK, _MEMORY, _GRADIENTS], device="cuda"
        ),
    ]
    return "\n".join(part for part in parts if part) or NOT_YET


def psnr_table(_: Results) -> str | None:
    """The shipped weights against bicubic, from what their training run saved."""
    path = results.FOLDER / "weights" / "tiny" / "tiny-psnr.csv"
    if not path.exists():
        return None
    with open(path, newline="", encoding="utf-8") as file:
        scores = list(csv.DictReader(file))
    rows = []
    for score in scores:
        if score["image"] == "mean":
            model, bicubic = float(score["model"]), float(score["bicubic"])
            rows.append(["mean", f"x{score['scale']}", f"{bicubic:.2f}", f"{model:.2f}", f"{model - bicubic:+.2f}"])
    pictures = len({score["image"] for score in scores}) - 1
    source = f"Mean over {pictures} photographs: [{path.name}](bench/results/weights/tiny/{path.name})."
    return f"{tables.markdown(('image', 'scale', 'bicubic', 'model', 'gain'), rows, 'lllll')}\n{source}\n"


BATCHES = {1: "batch-1", 4: "batch-4", 16: "training-step", 64: "batch-64"}  # by number of maps
_PLOTS = {  # what a plot shows, and the workloads it is drawn from; bench/plots.py draws them
    "sizes": ("Latency and peak memory against the output's size", SIZES),
    "sweep": ("Pixels a second against the scale, x2 to x30", SCALES),
    "batches": ("Forward and backward against the number of maps", tuple(BATCHES.values())),
    "parts": ("Where the time goes", ("parts", "gpu-parts")),
}


def plots_block(found: Results) -> str:
    """The plots that some result has the numbers for, one below the other."""
    lines = []
    for device, prefix in (("cpu", ""), ("cuda", "gpu-")):
        for name, (about, names) in _PLOTS.items():
            wanted = [each for each in names if not WORKLOADS[each].refusal(device)]
            if results.newest_with_all(found, wanted, device):
                lines.append(f"![{about}](bench/results/plots/{prefix}{name}.png)\n")
    return "\n".join(lines)


BLOCKS: dict[str, Callable[[Results], str | None]] = {
    "targets": targets_table,
    "decode": partial(methods_table, workload="decode-64-to-256", columns=[*_TIMES, *_WORK, _ACCURACY]),
    "training": partial(methods_table, workload="training-step", columns=[*_TIMES, *_WORK, _GRADIENTS]),
    "memory": partial(
        methods_table,
        workload="size-2048",
        columns=[_MEMORY, ("latent map + output + 64 MB", _megabytes("allowed_bytes"))],
    ),
    "sizes": partial(series_table, names=SIZES, title="seconds, and peak beside the inputs", cell=_time_and_memory),
    "sweep": partial(series_table, names=SCALES, title="thousand pixels a second", cell=_pixels),
    "batches": partial(series_table, names=tuple(BATCHES.values()), title="forward and backward", cell=_milliseconds),
    "psnr": psnr_table,
    "gather": partial(methods_table, workload="gather", columns=[*_TIMES, _ACCURACY]),
    "ensemble": partial(methods_table, workload="ensemble", columns=[*_TIMES, _ACCURACY]),
    "encoder": partial(methods_table, workload="encoder", columns=[_TIMES[0], _ACCURACY]),
    "upscale": partial(methods_table, workload="upscale-photo", columns=[*_TIMES, _MEMORY, _ACCURACY]),
    "parts": partial(methods_table, workload="parts", columns=[_TIMES[0], ("share of the original", _share)]),
    "gpu": gpu_tables,
    "plots": plots_block,
    # These read what their own programs saved.
    "train-step": training_step.block,
    "study": study.block,
    "loader": loader.block,
}
