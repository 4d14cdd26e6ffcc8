"""Inference engines as peers of the decode: a tile of the backend `torch` as an ONNX graph, run by each engine.

`pip install '.[bench]'` brings them. The latent map is PyTorch's convolution, as in that backend.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench.methods.method import Job, Method, Prepared
from liif_fast import ops
from liif_fast.benchmark.problem import DecodeProblem

Engine = Callable[..., Any]  # arrays of the graph's inputs -> the array of its output
TILE = 2048  # queries at most: the activations fit into the cache
_INPUTS = ("latent_map", "coord", "cell")
_NEEDED = {"onnxruntime": ("onnxruntime", "onnxscript"), "openvino": ("openvino", "onnxscript")}


class _Tile(nn.Module):
    """The decode of some queries, with the weights inside."""

    def __init__(self, problem: DecodeProblem) -> None:
        super().__init__()
        channels = problem.feat.shape[1]
        self.layers = problem.weights[0][:, 9 * channels :], problem.weights[1:], problem.biases

    def forward(self, latent_map: Tensor, coord: Tensor, cell: Tensor) -> Tensor:
        return ops.decode(latent_map, *self.layers, coord=coord, cell=cell, backend="torch")


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
    """The decode in tiles of one size, because engines are fastest with constant shapes."""
    feat, coord, cell, weights, _ = problem = job.problem
    tile = max(size for size in range(1, TILE + 1) if coord.shape[1] % size == 0)

    def tiles() -> list[dict[str, Tensor]]:
        latent_map, parts = ops.fold(feat, weights[0]), zip(coord.split(tile, 1), cell.split(tile, 1))
        return [dict(zip(_INPUTS, (latent_map, *part))) for part in parts]

    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        file, arrays = Path(folder) / "tile.onnx", tuple(tiles()[0].values())
        # The optimizer of onnxscript would take 1e-9, the least area, for 0.
        options: dict[str, Any] = {"input_names": _INPUTS, "dynamo": True, "optimize": False, "verbose": False}
        graph = torch.onnx.export(_Tile(problem).eval(), arrays, **options)
        assert graph is not None
        graph.save(file)
        engine: Engine = _ENGINES[name](file, torch.get_num_threads())

    def run() -> Tensor:
        out = coord.new_empty(*coord.shape[:2], problem.biases[-1].shape[0])
        with torch.no_grad():
            for part, arrays in zip(out.split(tile, 1), tiles()):
                part.copy_(torch.from_numpy(engine(**{key: each.numpy() for key, each in arrays.items()})))
        return out

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
