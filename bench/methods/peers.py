"""Inference engines as peers of the decode: the folded baseline's tile as an ONNX graph, run by the engines' kernels.

`pip install '.[bench]'` brings them. The latent map is PyTorch's convolution, as in the folded baseline.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench.methods import folded
from bench.methods.method import Job, Method, Prepared

Engine = Callable[..., Any]  # arrays of the graph's inputs -> the array of its output
_INPUTS = ("latents", "coord", "cell", "entry")
_NEEDED = {"onnxruntime": ("onnxruntime", "onnxscript"), "openvino": ("openvino", "onnxscript")}


class _Tile(nn.Module):
    """`folded.decode_tile` with the weights inside."""

    def __init__(self, map_size: tuple[int, int], *layers: Any) -> None:
        super().__init__()
        self.map_size, self.layers = map_size, layers

    def forward(self, latents: Tensor, coord: Tensor, cell: Tensor, entry: Tensor) -> Tensor:
        return folded.decode_tile(latents, coord, cell, entry, self.map_size, *self.layers)


def _onnxruntime(file: Path, threads: int) -> Engine:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    return lambda **arrays: session.run(None, arrays)[0]


def _openvino(file: Path, threads: int) -> Engine:
    import openvino

    options = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
    request = openvino.compile_model(file, "CPU", options).create_infer_request()
    return lambda **arrays: request.infer(arrays, share_inputs=True, share_outputs=True)[0]


_ENGINES = {"onnxruntime": _onnxruntime, "openvino": _openvino}
NAMES = [f"{name}-fp32" for name in _ENGINES]


def decode(job: Job, name: str) -> Prepared:
    """The folded decode in tiles of one size, because engines are fastest with constant shapes."""
    queries, problem = job.problem.coord.shape[1], job.problem
    tile = max(size for size in range(1, folded.TILE + 1) if queries % size == 0)
    engine: Engine | None = None

    def run_tile(*arguments: Any) -> Tensor:
        nonlocal engine
        arrays, (map_size, *layers) = arguments[: len(_INPUTS)], arguments[len(_INPUTS) :]
        if engine is None:
            with tempfile.TemporaryDirectory() as folder:
                file = Path(folder) / "tile.onnx"
                graph = torch.onnx.export(
                    _Tile(map_size, *layers).eval(),
                    arrays,
                    input_names=_INPUTS,
                    dynamo=True,
                    optimize=True,
                    verbose=False,
                )
                assert graph is not None
                graph.save(file)
                engine = _ENGINES[name](file, torch.get_num_threads())
        return torch.from_numpy(engine(**{key: each.numpy() for key, each in zip(_INPUTS, arrays)}))

    def run() -> Tensor:
        with torch.no_grad():
            return folded.query(*problem, tile=tile, decode=run_tile)

    return run, f"tiles of {tile}"


def methods() -> list[Method]:
    """A method for each engine, in float32."""
    found = []
    for name, needed in _NEEDED.items():
        missing = [package for package in needed if find_spec(package) is None]
        why_not = f"{missing[0]} is not installed: `pip install '.[bench]'`" if missing else ""
        run = lambda job, name=name: decode(job, name)  # noqa: E731
        found.append(Method(f"{name}-fp32", f"folded, {name}", "float32", run, True, why_not, late=True))
    return found
