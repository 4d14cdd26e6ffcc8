"""Times an exported model in onnxruntime and OpenVINO next to the backends `cpu` and `torch`, in one run on the CPU.

`python -m bench.exported`: EDSR-baseline-LIIF in float32, 64x64 to 256x256, encoder and decoder. The programs take
turns, so the ratios come from one run. The result is saved next to those of bench.run. It needs onnx, onnxscript,
onnxruntime and openvino.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import openvino
import torch

from bench import blocks, results
from bench.loader import SPEC
from bench.measure import log, validity_warnings
from liif_fast.benchmark import peak_rates
from liif_fast.benchmark.timing import Candidate, CpuClock, interleave, pair_ratios, summary
from liif_fast.models import export, make_model
from liif_fast.utils.normalization import normalizations

SIZE, SCALE = 64, 4


def runs(threads: int) -> dict[str, Callable[[], Any]]:
    """The programs by their names, on the same weights and image."""
    torch.manual_seed(0)
    model: Any = make_model(SPEC).eval().requires_grad_(False)
    image, target = torch.rand(1, 3, SIZE, SIZE), (SIZE * SCALE, SIZE * SCALE)
    inp, gt = normalizations(model.data_norm)

    def by_ops(backend: str) -> Callable[[], np.ndarray]:
        def run() -> np.ndarray:
            model.backend = backend
            return gt.restore(model.encode(inp.normalize(image)).render(target)).numpy()

        return run

    with tempfile.TemporaryDirectory() as folder:
        file = export.export(model, Path(folder) / "model.onnx", scale=SCALE)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        session = onnxruntime.InferenceSession(file, options)
        settings = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32"}
        compiled = openvino.compile_model(file, "CPU", settings)
    feed = image.numpy()
    return {
        "backend cpu": by_ops("cpu"),
        "backend torch": by_ops("torch"),
        "onnxruntime": lambda: session.run(None, {"image": feed})[0],
        "OpenVINO": lambda: compiled([feed])[0],
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.exported", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--results", type=Path, default=results.FOLDER)
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    clock, by_name = CpuClock(), runs(args.threads)
    expected = by_name["backend cpu"]()
    candidates = {name: Candidate(name, run) for name, run in by_name.items()}
    for name, candidate in candidates.items():
        error = float(np.abs(candidate.run() - expected).max() / np.ptp(expected))
        clock.warm_up(candidate)
        log(f"{name}: ready, {error:.1e} of the range from the backend cpu")
    rates = peak_rates.matmul_rates(clock)
    result = results.begin("exported", "cpu", "bench.exported")
    done = interleave(clock, list(candidates.values()), args.rounds, rates)
    entries: dict[str, Any] = {}
    for name, candidate in candidates.items():
        ratios = pair_ratios(candidate.samples, candidates["backend cpu"].samples)
        entries[name] = {"seconds": summary(candidate.samples), "of_cpu": summary(ratios)}
    result = {**result, "rounds": done, "warnings": validity_warnings(rates, entries), "entries": entries}
    versions = {"onnxruntime": onnxruntime.__version__, "openvino": openvino.__version__.split("-")[0]}
    result["versions"] = {**result["versions"], **versions}
    print(blocks.exported_table(result))
    print(results.save(result, args.results))


if __name__ == "__main__":
    main()
