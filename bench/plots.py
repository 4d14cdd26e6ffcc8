"""Plots of the saved results, as PNG and SVG. The only file that needs matplotlib."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure

from bench import results

_COLOURS = {"float32": "#3b6ea5", "bfloat16": "#c8762b"}
_SWEEP = {"x2": 2.0, "x3.7": 3.7, "x8": 8.0, "x30": 30.0}


def draw(found: list[dict[str, Any]], folder: Path) -> list[Path]:
    """Every plot that the results have the numbers for; returns the files written."""
    written = []
    folder.mkdir(parents=True, exist_ok=True)
    for name, make in (("ladder", ladder), ("sweep", sweep)):
        figure = make(found)
        if figure is None:
            continue
        for suffix, metadata in (("png", {"Software": None}), ("svg", {"Date": None})):
            path = folder / f"{name}.{suffix}"
            with rc_context({"svg.hashsalt": "liif_fast"}):  # the same numbers give the same file
                figure.savefig(path, dpi=150, bbox_inches="tight", metadata=metadata)
            written.append(path)
    return written


def ladder(found: list[dict[str, Any]]) -> Figure | None:
    """Decoding 64x64 to 256x256: every method's time, slowest first, with its fraction of the loop's rate."""
    result = results.newest_with(found, "decode-64-to-256")
    if result is None:
        return None
    record = result["workloads"]["decode-64-to-256"]
    entries = [entry for entry in record["methods"].values() if entry["status"] == "ok"]
    entries.sort(key=lambda entry: entry["seconds"]["median"])
    figure = Figure(figsize=(8, 0.45 * len(entries) + 1.2))
    axes = figure.subplots()
    for place, entry in enumerate(entries):
        seconds = entry["seconds"]
        spread = [[seconds["median"] - seconds["p20"]], [seconds["p80"] - seconds["median"]]]
        axes.barh(place, seconds["median"], xerr=spread, color=_COLOURS[entry["dtype"]], ecolor="#333333")
        fraction = f", {entry['fraction_of_loop']['median']:.0%} of peak" if "fraction_of_loop" in entry else ""
        axes.annotate(
            f"{seconds['median']:.2f} s{fraction}",
            (seconds["p80"], place),
            xytext=(6, 0),
            textcoords="offset points",
            va="center",
        )
    axes.set_yticks(range(len(entries)), [f"{entry['label']}, {entry['dtype']}" for entry in entries])
    axes.set_xlim(0, max(entry["seconds"]["p80"] for entry in entries) * 1.35)
    axes.set_xlabel("seconds; peak = a register-only multiply-add loop in the same dtype and run")
    _finish(axes, record["about"], result)
    return figure


def sweep(found: list[dict[str, Any]]) -> Figure | None:
    """Pixels a second against scale, a line a method."""
    result = next((each for each in reversed(found) if all(f"scale-{x}" in each["workloads"] for x in _SWEEP)), None)
    if result is None:
        return None
    records = {scale: result["workloads"][f"scale-{name}"]["methods"] for name, scale in _SWEEP.items()}
    figure = Figure(figsize=(7, 4))
    axes = figure.subplots()
    for name, entry in records[2.0].items():
        points = [
            (scale, methods[name]["mpixel_per_second"])
            for scale, methods in records.items()
            if methods[name]["status"] == "ok"
        ]
        axes.plot(
            *zip(*points),
            marker="o",
            linestyle="--" if name == "original" else "-",
            color=_COLOURS[entry["dtype"]],
            label=f"{entry['label']}, {entry['dtype']}",
        )
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xticks(list(records), [f"x{scale:g}" for scale in records])
    axes.minorticks_off()
    axes.set_xlabel("scale, from a 96x96 map")
    axes.set_ylabel("megapixels a second")
    axes.legend()
    _finish(axes, "Decoder alone", result)
    return figure


def _finish(axes: Any, title: str, result: dict[str, Any]) -> None:
    machine = result["machine"]
    where = " ".join(part for part in (machine["cpu"], machine["architecture"]) if part)
    axes.set_title(f"{title}\n{where}, {machine['threads']} threads, {result['date'][:10]}", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
