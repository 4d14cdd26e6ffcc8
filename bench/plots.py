"""Plots of the saved results, as PNG. The only module that needs matplotlib."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator

from bench import results
from bench.blocks import DECODE, SIZES
from bench.results import Results
from bench.workloads import WORKLOADS
from liif_fast.benchmark.timing import in_words

_COLORS = {"float32": "#3b6ea5", "tf32": "#4f9d8f", "bfloat16": "#c8762b", "float16": "#8a4f9d"}
_LINES = {"original": "--", "folded": ":"}  # backends: solid
_MARKERS = {"cuda": "s", "triton": "^"}


def draw(found: Results, folder: Path) -> list[Path]:
    """Every plot that the results have the numbers for, with the prefix `gpu-` for a GPU; returns the files written."""
    written = []
    folder.mkdir(parents=True, exist_ok=True)
    makers: dict[str, Callable[[Results, str], Figure | None]] = {
        "ladder": ladder,
        "sizes": sizes,
    }
    for device, prefix in (("cpu", ""), ("cuda", "gpu-")):
        for name, make in makers.items():
            figure = make(found, device)
            if figure is not None:
                path = folder / f"{prefix}{name}.png"
                figure.savefig(path, dpi=150, bbox_inches="tight", metadata={"Software": None})
                written.append(path)
    return written


def ladder(found: Results, device: str) -> Figure | None:
    """One decode: the time of every method, slowest last, with its fraction of the machine's peak rate."""
    workload = DECODE[device]
    result = results.newest_with(found, [workload], device)
    if result is None:
        return None
    record = result["workloads"][workload]
    entries = [entry for entry in record["methods"].values() if "seconds" in entry]
    entries.sort(key=lambda entry: entry["seconds"]["median"])
    of, peak = ("fma_peak", "an FMA loop in registers") if device == "cpu" else ("gemm", "cuBLAS")
    figure = Figure(figsize=(8, 0.42 * len(entries) + 1.2))
    axes = figure.subplots()
    for place, entry in enumerate(entries):
        seconds = entry["seconds"]
        spread = [[seconds["median"] - seconds["p20"]], [seconds["p80"] - seconds["median"]]]
        axes.barh(place, seconds["median"], xerr=spread, color=_COLORS[entry["dtype"]], ecolor="#333333")
        fractions = entry.get("fraction_of", {})
        fraction = f", {fractions[of]['median']:.0%} of peak" if of in fractions else ""
        axes.annotate(
            f"{in_words(seconds['median'])}{fraction}",
            (seconds["p80"], place),
            xytext=(6, 0),
            textcoords="offset points",
            va="center",
        )
    axes.set_yticks(range(len(entries)), [_label(entry) for entry in entries])
    axes.set_xlim(0, max(entry["seconds"]["p80"] for entry in entries) * 1.35)
    axes.set_xlabel(f"seconds; peak = {peak} in the same dtype and run")
    _finish(axes, record["about"], result)
    return figure


def sizes(found: Results, device: str) -> Figure | None:
    """Latency and peak memory of a decode by x4 against the output's side; a cross where memory runs out."""
    names = [name for name in SIZES if not WORKLOADS[name].refusal(device)]
    result = results.newest_with(found, names, device)
    if result is None:
        return None
    records = {name: result["workloads"][name] for name in names}
    sides = {name: int(name.removeprefix("size-")) for name in records}
    figure = Figure(figsize=(10, 4))
    for axes, key, unit, title in zip(
        figure.subplots(1, 2),
        ("seconds", "peak_bytes"),
        (1.0, 1e-6),
        ("seconds", "peak memory without the inputs, MB"),
    ):
        for name, entry in _methods(records.values()).items():
            points = []
            for workload, record in records.items():
                value = record["methods"].get(name, {}).get(key)
                if value is not None:
                    points.append((sides[workload], (value["median"] if key == "seconds" else value) * unit))
            if points:
                axes.plot(*zip(*points), label=_label(entry), **_style(name, entry))
                ends = [side for at, side in sides.items() if _ran_out(records[at], name)]
                if ends:
                    axes.plot(min(ends), points[-1][1], "x", markersize=10, color=_COLORS[entry["dtype"]])
                    axes.annotate("out of memory", (min(ends), points[-1][1]), fontsize=8, ha="right", va="bottom")
        _log_axes(axes, {side: str(side) for side in sides.values()}, "output side, pixels (x4)", title)
        _finish(axes, "Decoder alone; the original's time from its first chunks", result)
    figure.axes[0].legend(fontsize=8)
    figure.tight_layout()
    return figure


def _methods(records: Iterable[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Methods that ran in at least one record."""
    return {
        name: entry for record in records for name, entry in record["methods"].items() if entry["status"] != "refused"
    }


def _ran_out(record: dict[str, Any], name: str) -> bool:
    return record["methods"].get(name, {}).get("status") == "out of memory"


def _style(name: str, entry: dict[str, Any]) -> dict[str, Any]:
    family = name.partition("-")[0]
    return {
        "linestyle": _LINES.get(family, "-"),
        "color": _COLORS[entry["dtype"]],
        "marker": _MARKERS.get(family, "o"),
    }


def _log_axes(axes: Any, ticks: dict[float, str], x: str, y: str) -> None:
    """Both axes logarithmic: ticks at the measured points on x, at 1, 2 and 5 on y."""
    axes.set(xscale="log", yscale="log", xlabel=x, ylabel=y)
    axes.set_xticks(list(ticks), list(ticks.values()))
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.minorticks_off()


def _label(entry: dict[str, Any]) -> str:
    return f"{entry['label']}, {entry['dtype']}"


def _finish(axes: Any, title: str, result: dict[str, Any]) -> None:
    machine = result["machine"]
    if machine["device"] == "cuda":
        where = machine["gpu"]
    else:
        name = " ".join(part for part in (machine["cpu"], machine["architecture"]) if part)
        where = f"{name}, {machine['threads']} threads"
    axes.set_title(f"{title}\n{where}, {result['date'][:10]}", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
