"""Times an exported model in onnxruntime and OpenVINO next to the backends `cpu` and `torch`, in one run on the CPU.

`python -m bench.exported`: EDSR-baseline-LIIF in float32, 64x64 to 256x256, encoder and decoder. The programs take
turns, so the ratios come from one run. The result is saved next to those of bench.run. It needs onnx, onnxscript,
onnxruntime and openvino.
"""

from __future__ import annotations

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
from bench.measure import log
from bench.turns import parser, start, take_turns
from liif_fast.models import export, make_model
from liif_fast.utils.normalization import normalizations

SIZE, SCALE = 64, 4
BASELINE = "backend cpu"


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
        BASELINE: by_ops("cpu"),
        "backend torch": by_ops("torch"),
        "onnxruntime": lambda: session.run(None, {"image": feed})[0],
        "OpenVINO": lambda: compiled([feed])[0],
    }


def main(arguments: list[str] | None = None) -> None:
    args = parser("exported", __doc__).parse_args(arguments)
    clock, rounds = start(args)
    by_name = runs(args.threads)
    expected = by_name[BASELINE]()
    for name, run in by_name.items():
        log(f"{name}: {np.abs(run() - expected).max() / np.ptp(expected):.1e} of the range from the {BASELINE}")
    result = results.begin("exported", "cpu", "bench.exported")
    versions = {"onnxruntime": onnxruntime.__version__, "openvino": openvino.__version__.split("-")[0]}
    result["versions"] = {**result["versions"], **versions}
    result |= take_turns(clock, by_name, rounds, lambda _: BASELINE)
    print(blocks.exported_table(result))
    print(results.save(result, args.results))


if __name__ == "__main__":
    main()
