"""The named workloads, in order of importance, and the number of operations and bytes they need."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from liif_fast.benchmark import problem
from liif_fast.benchmark.problem import DecodeProblem, random_problem


@dataclass(frozen=True)
class Workload:
    """One piece of work to time.

    kind: decode | train | gather | ensemble | size; it determines the methods. train: decode with gradients.
    map_size: rows, columns of the feature map.
    out_size: rows, columns of the whole output; None for random queries.
    queries: number of random queries per map, without out_size.
    passes: forward | backward | both.
    device: the only device type that runs the workload, and why_not the reason elsewhere; '' is any.
    compared: all methods; only a few; or engines: few in float32, with the inference engines.
    rounds: on a CPU. limit_s: on a GPU no round starts after this many seconds of timing.
    """

    name: str
    kind: str
    about: str
    map_size: tuple[int, int]
    out_size: tuple[int, int] | None = None
    batch: int = 1
    queries: int = 0
    passes: str = "forward"
    device: str = ""
    why_not: str = ""
    compared: str = "all"
    rounds: int = 5
    limit_s: float = 10.0

    @property
    def total_queries(self) -> int:
        """Output pixels or random queries, all maps together."""
        return self.batch * (math.prod(self.out_size) if self.out_size else self.queries)

    def refusal(self, device: str) -> str:
        """Why a device type does not run the workload; '' where it does."""
        return "" if self.device in ("", device) else self.why_not


def _decode(name: str, map_size: tuple[int, int], out_size: tuple[int, int], **options: object) -> Workload:
    about = f"decoder, {map_size[0]}x{map_size[1]} to {out_size[0]}x{out_size[1]}"
    return Workload(name, "decode", about, map_size, out_size, **options)  # type: ignore[arg-type]


def _train(name: str, batch: int, passes: str, about: str, **options: object) -> Workload:
    about = f"decoder {about}, {batch} map{'s' if batch > 1 else ''} of 48x48, 2304 queries each"
    return Workload(  # type: ignore[arg-type]
        name, "train", about, (48, 48), batch=batch, queries=2304, passes=passes, **options
    )


def _piece(kind: str, about: str, queries: int, passes: str, rounds: int) -> Workload:
    name = kind if passes == "forward" else f"{kind}-{passes}"
    return Workload(name, kind, about, (64, 64), queries=queries, passes=passes, rounds=rounds)


def _size(out: int, **options: object) -> Workload:
    about = f"decoder, {out // 4}x{out // 4} to {out}x{out}"
    return Workload(  # type: ignore[arg-type]
        f"size-{out}", "size", about, (out // 4,) * 2, (out, out), compared="few", limit_s=4, **options
    )


_GPU = {"device": "cuda", "why_not": "one run of the original takes minutes on a CPU"}
_CPU = {"device": "cpu", "why_not": "smaller than a GPU needs"}

_ALL = [
    _decode("decode-64-to-256", (64, 64), (256, 256), rounds=5, **_CPU),
    _decode("decode-256-to-1024", (256, 256), (1024, 1024), limit_s=60, **_GPU),
    _train("training-step", 16, "both", "forward and backward", rounds=4, limit_s=25),
    _size(2048),
    _piece("gather", "imnet inputs of 16384 queries, 64x64 map", 16384, "forward", 10),
    _piece("ensemble", "blend of 262144 queries, 3 values", 262144, "forward", 10),
    _decode("decode-540-to-2160", (540, 960), (2160, 3840), compared="few", **_GPU),
    _train("training-forward", 16, "forward", "forward", compared="few", rounds=4),
    _train("training-backward", 16, "backward", "backward", compared="few", rounds=4),
    _piece("gather", "gradients of imnet inputs, 16384 queries, 64x64 map", 16384, "backward", 6),
    _piece("ensemble", "gradients of the blend, 262144 queries, 3 values", 262144, "backward", 6),
    _decode("engines", (64, 64), (256, 256), compared="engines", rounds=5, **_CPU),
    *(_size(out) for out in (256, 512, 1024)),
    *(_size(out, **_GPU) for out in (4096, 8192, 16384, 32768)),
]
WORKLOADS = {workload.name: workload for workload in _ALL}


def make_problem(
    workload: Workload, device: torch.device | str = "cpu", window: tuple[int, int, int, int] | None = None
) -> DecodeProblem:
    """The random tensors of a workload, the same every time; `window` is the part of the output to decode."""
    return random_problem(
        workload.map_size,
        out_size=workload.out_size,
        window=window,
        queries=workload.queries,
        batch=workload.batch,
        device=device,
    )


def flop(workload: Workload, *, folded: bool) -> float:
    """Floating-point operations of the original or of the folded formulation, as liif_fast.benchmark.problem counts."""
    latents = workload.batch * math.prod(workload.map_size)
    queries = workload.total_queries
    forward = problem.folded_flop(queries, latents) if folded else problem.original_flop(queries)
    # Backward multiplies twice for every product of the forward. Recomputed products are not counted.
    return forward * {"forward": 1, "backward": 2, "both": 3}[workload.passes]


def least_bytes(workload: Workload, item: int) -> float:
    """Bytes that gather or ensemble must read and write once, with numbers of `item` bytes."""
    queries, latents = workload.total_queries, workload.batch * math.prod(workload.map_size)
    if workload.kind == "gather":
        row = problem.layer_widths()[0] * item + 4  # imnet input and weight
        return float(latents * problem.CHANNELS * item + queries * (16 + 4 * row))
    backward = 2 if workload.passes == "backward" else 1  # gradients, and the forward's inputs again
    return float(queries * (4 * (problem.OUTS * item + 4) * backward + problem.OUTS * item))
