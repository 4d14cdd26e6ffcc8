"""The generated blocks of the documents, each a function of the saved results; None where no result has its numbers.

Links are relative to the repository's root; `bench.report` adapts them to the document's folder.
"""

from __future__ import annotations

import csv
from collections.abc import Callable
from functools import partial
from statistics import fmean
from typing import Any

from bench import loader, machine, patched, relatives, results, training_step
from bench.results import Results
from bench.workloads import WORKLOADS
from liif_fast.benchmark.timing import in_words
from liif_fast.evaluation import comparison
from liif_fast.evaluation import tables as evaluation_tables
from liif_fast.utils import tables

Entry = dict[str, Any]
Column = tuple[str, Callable[[Entry], str]]
DECODE = {"cpu": "decode-64-to-256", "cuda": "decode-256-to-1024"}
SIZES = tuple(sorted((name for name in WORKLOADS if WORKLOADS[name].kind == "size"), key=lambda name: int(name[5:])))
NOT_YET = "not yet run on a GPU"


def _spread(entry: Entry) -> str:
    """Median and the 20th to 80th percentile, in a unit that suits the median."""
    seconds = entry["seconds"]
    median, unit = in_words(seconds["median"]).split()
    low, high = (in_words(seconds[key], unit).split()[0] for key in ("p20", "p80"))
    return f"{median} {unit} ({low} to {high})"


def _speedup(entry: Entry) -> str:
    return f"{entry['speedup']['median']:.2f}x" if "speedup" in entry else ""


def _fraction(of: str) -> Callable[[Entry], str]:
    return lambda entry: f"{entry['fraction_of'][of]['median']:.0%}" if of in entry.get("fraction_of", {}) else ""


def _psnr(entry: Entry) -> str:
    return f"{entry['psnr_db']:.0f} dB" if "psnr_db" in entry else "exact"


def _gradient_error(entry: Entry) -> str:
    return f"{entry['gradient_error']:.1%}" if entry["gradient_error"] >= 0.01 else f"{entry['gradient_error']:.2%}"


def _megabytes(key: str) -> Callable[[Entry], str]:
    return lambda entry: f"{entry[key] / 1e6:.0f} MB" if entry.get(key) is not None else ""


_TIMES: list[Column] = [("time (20th to 80th percentile)", _spread), ("speedup", _speedup)]
_FMA: Column = ("of the FMA peak", _fraction("fma_peak"))
_CUBLAS: Column = ("of cuBLAS", _fraction("gemm"))
_MEMORY: Column = ("peak memory", _megabytes("peak_bytes"))
_LIMIT: Column = ("latent map + output + 64 MB", _megabytes("limit_bytes"))
_PSNR: Column = ("PSNR against float64", _psnr)
_GRADIENTS: Column = ("relative error of the gradients", _gradient_error)


def where(result: dict[str, Any]) -> str:
    """The device of a result and its versions, in a few words."""
    found = result["machine"]
    if found["device"] == "cuda":
        device = f"{found['gpu']}, driver {found['driver']}"
    else:
        name = " ".join(part for part in (found["cpu"], found["architecture"]) if part)
        device = f"{name}, {found['threads']} threads, {found['instructions']}"
    return f"{device}; torch {result['versions']['torch']}; commit {result['commit']}, {result['date'][:10]}"


def _source(result: dict[str, Any], warnings: list[str]) -> str:
    """The line below a table: the device, the saved file, and the warnings about the numbers."""
    path = result["path"]
    warnings = [*warnings, *[machine.SHARED] * (result["machine"]["load_before"] > machine.BUSY_LOAD)]
    warning = f" **{' '.join(sorted(set(warnings)))}**" if warnings else ""
    return f"{where(result)}: [{path}](bench/results/{path}).{warning}\n"


def _label(entry: Entry) -> str:
    remark = f" ({entry['note']})" if entry.get("note") else ""
    return f"{entry['label']}, {entry['dtype']}{remark}"


def methods_table(found: Results, *, workload: str, columns: list[Column], device: str = "cpu") -> str | None:
    """One table per instruction set; a method that failed has its reason in the first column of numbers."""
    each = results.newest_of_each(found, [workload], device)
    return "\n".join(_one_table(result, workload, columns) for result in each) or None


def _one_table(result: dict[str, Any], workload: str, columns: list[Column]) -> str:
    record = result["workloads"][workload]
    rows = []
    for entry in record["methods"].values():
        if entry["status"] == "ok":
            rows.append([_label(entry), *(cell(entry) for _, cell in columns)])
        elif entry["status"] != "refused":
            rows.append([_label(entry), entry["reason"], *[""] * (len(columns) - 1)])
    table = tables.markdown([record["about"], *(title for title, _ in columns)], rows)
    return f"{table}\n{_source(result, record['warnings'])}"


def headline(found: Results) -> str | None:
    """The two headline ratios in one sentence."""
    result = results.newest_with(found, [DECODE["cpu"]])
    if result is None:
        return None
    methods, threads = result["workloads"][DECODE["cpu"]]["methods"], result["machine"]["threads"]
    ratios = [f"**{methods[name]['speedup']['median']:.1f}x**" for name in ("cpu-fp32", "cpu-bf16")]
    return (
        f"On a CPU with {threads} threads it decodes {ratios[0]} as fast as the original PyTorch code in float32 and "
        f"{ratios[1]} as fast in bfloat16.\n"
    )


def results_table(found: Results) -> str | None:
    """Five rows: the original, the original compiled, the CPU backend in two dtypes, and a GPU."""
    result = results.newest_with(found, [DECODE["cpu"]])
    if result is None:
        return None
    record = result["workloads"][DECODE["cpu"]]
    named = {
        "original": "original in PyTorch, float32",
        "original-compiled-fp32": "original with `torch.compile`, float32",
        "cpu-fp32": "liif_fast, `cpu` backend, float32",
        "cpu-bf16": "liif_fast, `cpu` backend, bfloat16",
    }
    rows = []
    for name, label in named.items():
        entry = record["methods"].get(name, {"status": "refused", "reason": "not measured"})
        ok = entry["status"] == "ok"
        rows.append([label, in_words(entry["seconds"]["median"]) if ok else entry["reason"], ok and _speedup(entry)])
    on_gpu = results.newest_with(found, [DECODE["cuda"]], "cuda")
    rows.append(_gpu_row(on_gpu) if on_gpu else ["liif_fast, `cuda` or `triton` backend", NOT_YET, None])
    table = tables.markdown([record["about"], "time", "speedup"], [[cell or None for cell in row] for row in rows])
    return f"{table}\n{_source(result, record['warnings'])}"


def _gpu_row(result: dict[str, Any]) -> list[str | None]:
    """The fastest backend on a GPU, against the original on the same GPU."""
    record = result["workloads"][DECODE["cuda"]]
    fused = {
        name: entry
        for name, entry in record["methods"].items()
        if name.startswith(("cuda", "triton")) and "seconds" in entry
    }
    if not fused:
        return ["liif_fast, `cuda` or `triton` backend", NOT_YET, None]
    name = min(fused, key=lambda name: fused[name]["seconds"]["median"])
    label = f"liif_fast, `{name.partition('-')[0]}` backend, {fused[name]['dtype']}, {record['about']} on a GPU"
    return [label, in_words(fused[name]["seconds"]["median"]), _speedup(fused[name])]


def gpu_tables(found: Results) -> str:
    """The decode and the training step on a GPU, or the sentence that no result of a GPU exists."""
    decode = [*_TIMES, _CUBLAS, _MEMORY, _PSNR]
    training = [*_TIMES, _CUBLAS, _MEMORY, _GRADIENTS]
    parts = [
        methods_table(found, workload=DECODE["cuda"], columns=decode, device="cuda"),
        methods_table(found, workload="training-step", columns=training, device="cuda"),
    ]
    return "\n".join(part for part in parts if part) or f"{NOT_YET.capitalize().replace('gpu', 'GPU')}.\n"


def sizes_table(found: Results, device: str = "cpu") -> str | None:
    """One row per size of the output, one column per method: time and peak memory, or the reason of a failure."""
    names = [name for name in SIZES if not WORKLOADS[name].refusal(device)]
    result = results.newest_with(found, names, device)
    if result is None:
        return None
    records = [result["workloads"][name] for name in names]
    entries = [item for record in records for item in record["methods"].items()]
    labels = {name: entry for name, entry in entries if entry["status"] != "refused"}
    rows = [[each["about"], *(_time_and_memory(each["methods"].get(name)) for name in labels)] for each in records]
    columns = ["time, peak memory", *(f"{entry['label']}, {entry['dtype']}" for entry in labels.values())]
    return f"{tables.markdown(columns, rows)}\n{_source(result, [])}"


def _time_and_memory(entry: Entry | None) -> str:
    if entry is None or entry["status"] != "ok":
        return entry["reason"] if entry else ""
    return f"{in_words(entry['seconds']['median'])}, {_megabytes('peak_bytes')(entry)}"


def train_step_block(found: Results) -> str | None:
    """The newest whole training step on a CPU."""
    result = _newest(found, training_step.NAME)
    if result is None:
        return None
    parts = training_step.steps_table(result), training_step.split_table(result), _source(result, result["warnings"])
    return "\n".join(parts)


def _newest(found: Results, name: str) -> dict[str, Any] | None:
    on_cpus = [each for each in found if each["name"] == name and each["machine"]["device"] == "cpu"]
    return on_cpus[-1] if on_cpus else None


def patch_sentence(found: Results) -> str | None:
    """What patch() gains, in one sentence."""
    result = _newest(found, patched.NAME)
    if result is None:
        return None
    ratios = [f"**{result['entries'][f'{loop}: patched']['speedup']['median']:.1f}x**" for loop in patched.LOOPS]
    warning = " ".join(["", *(f"**{each}**" for each in result["warnings"])])
    return (
        f"On a CPU with {result['machine']['threads']} threads, inference (64x64 to 256x256, chunks of 30,000) is then "
        f"{ratios[0]} as fast and a training step {ratios[1]} as fast, with EDSR-baseline in float32.{warning}\n"
    )


def _with_source(table: Callable[[dict[str, Any]], str], found: Results, name: str) -> str | None:
    """The table of the newest result of a name, and its source."""
    result = _newest(found, name)
    return f"{table(result)}\n{_source(result, result['warnings'])}" if result else None


def exported_table(result: dict[str, Any]) -> str:
    """An exported model in other programs, next to the ops."""
    rows = [
        [name, in_words(entry["seconds"]["median"]), f"{entry['speedup']['median']:.2f}x"]
        for name, entry in result["entries"].items()
    ]
    return tables.markdown(["64x64 to 256x256, float32", "time", "speed, of backend `cpu`"], rows)


def loader_block(found: Results) -> str | None:
    """The newest timing of loaders on a CPU that no other program disturbed."""
    good = [each for each in found if each["name"] == loader.NAME and not each["warnings"]]
    return f"{loader.table(good[-1])}\n{_source(good[-1], [])}" if good else None


def psnr_table(_: Results) -> str | None:
    """The shipped weights against bicubic, from the scores that their training saved."""
    path = results.FOLDER / "weights" / "tiny" / "tiny-psnr.csv"
    if not path.exists():
        return None
    with path.open(newline="", encoding="utf-8") as file:
        scores = [row for row in csv.DictReader(file) if row["image"] != "mean"]
    rows, keys = [], ("bicubic", "model")
    for scale in dict.fromkeys(row["scale"] for row in scores):
        bicubic, model = (fmean(float(row[key]) for row in scores if row["scale"] == scale) for key in keys)
        rows.append([f"x{scale}", f"{bicubic:.2f}", f"{model:.2f}", f"{model - bicubic:+.2f}"])
    images = len({row["image"] for row in scores})
    source = f"Mean PSNR in dB of {images} photographs: [{path.name}](bench/results/weights/tiny/{path.name})."
    return f"{tables.markdown(['scale', *keys, 'gain'], rows)}\n{source}\n"


def study_tables(_: Results) -> str | None:
    """The comparisons over scales that `liif-fast evaluate --images` saved."""
    parts = []
    for path in sorted((results.FOLDER / "weights").glob("*/study/scores.csv")):
        rows = comparison.read_records(path)
        metrics = ["psnr"] + (["ssim"] if all(row.ssim == row.ssim for row in rows) else [])
        name = path.relative_to(results.FOLDER).as_posix()
        text = evaluation_tables.markdown(rows, protocol="div2k", metrics=metrics)
        source = f"Scores of every image: [{name}](bench/results/{name})."
        parts.append(f"**{path.parent.parent.name}.** {text}\n{source}\n")
    return "\n".join(parts) or None


BLOCKS: dict[str, Callable[[Results], str | None]] = {
    "headline": headline,
    "results": results_table,
    "decode": partial(methods_table, workload=DECODE["cpu"], columns=[*_TIMES, _FMA, _PSNR]),
    "engines": partial(methods_table, workload="engines", columns=[*_TIMES, _FMA, _PSNR]),
    "training": partial(methods_table, workload="training-step", columns=[*_TIMES, _FMA, _GRADIENTS]),
    "train-step": train_step_block,
    "memory": partial(methods_table, workload="size-2048", columns=[_MEMORY, _LIMIT]),
    "loader": loader_block,
    "patch": patch_sentence,
    "patch-table": partial(_with_source, patched.table, name=patched.NAME),
    **{name: partial(_with_source, relatives.table, name=name) for name in relatives.GROUPS},
    "exported": partial(_with_source, exported_table, name="exported"),
    "gpu": gpu_tables,
    "sizes": sizes_table,
    "psnr": psnr_table,
    "study": study_tables,
}
