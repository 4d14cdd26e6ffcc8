"""A method, the job it is given, and the dtypes it may multiply in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from bench.workloads import Workload
from liif_fast.benchmark.problem import DecodeProblem
from liif_fast.benchmark.runs import DTYPES, Run
from liif_fast.benchmark.timing import Clock
from liif_fast.utils.hardware import emulates

Prepared = tuple[Run, str]
SHORT = {"float64": "fp64", "float32": "fp32", "tf32": "tf32", "bfloat16": "bf16", "float16": "fp16"}


class Job(NamedTuple):
    """A workload with its tensors on a device."""

    workload: Workload
    problem: DecodeProblem
    clock: Clock

    @property
    def device(self) -> torch.device:
        return self.clock.device


@dataclass(frozen=True)
class Method:
    """One way to do a workload's work.

    label: the method in a table. dtype: the dtype of its matrix products: float32, tf32, bfloat16 or float16.
    prepare: does all work that is done once (casts, compiling, tuning); returns the function to time and a remark for
        the result file ('' for none).
    folded: whether the first layer is a convolution of the map.
    refusal: why the method cannot run here, known without a try; '' where it can.
    late: whether preparing takes long; such methods are prepared after the others.
    few: whether the method is part of the short comparisons.
    """

    name: str
    label: str
    dtype: str
    prepare: Callable[[Job], Prepared]
    folded: bool = False
    refusal: str = ""
    late: bool = False
    few: bool = False


def matmul_dtypes(device: str) -> list[str]:
    """The dtypes that matrix products are timed in on a device type; float32 comes first."""
    return ["float32", *(["tf32"] if device == "cuda" else []), "bfloat16", "float16"]


def refusal(dtype: str, device: str) -> str:
    """Why PyTorch's own matrix products are not timed in `dtype`; '' where they are."""
    if emulates(torch.device(device), DTYPES[dtype]):
        return f"this processor has no {dtype} products, and PyTorch's emulation takes many times float32's time"
    return ""


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """torch.compile for the sizes of the first call."""
    return torch.compile(function, dynamic=False)
