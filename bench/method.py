"""What a method is, what it is given, and the dtypes it may multiply in."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from bench import machine
from bench.workloads import Workload
from liif_fast.benchmark.problem import Problem
from liif_fast.benchmark.timing import Clock
from liif_fast.benchmark.yardsticks import DTYPES, precision

Run = Callable[[], Any]  # -> Tensor or list of Tensors
Prepared = tuple[Run, str]
SHORT = {"float64": "fp64", "float32": "fp32", "tf32": "tf32", "bfloat16": "bf16", "float16": "fp16"}


class Job(NamedTuple):
    """A workload made ready on a device."""

    workload: Workload
    problem: Problem
    clock: Clock

    @property
    def device(self) -> torch.device:
        return self.clock.device


@dataclass(frozen=True)
class Method:
    """One competitor.

    dtype: what its matrix products are done in: float32, tf32, bfloat16 or float16.
    folded: whether its first layer is a convolution of the map.
    prepare: does everything that is done once (casts, compiling, tuning); returns what is timed, a function of no
        arguments, and a note for the result file ('' for none).
    refusal: why it cannot run here, found without trying; '' where it can.
    late: preparing takes long, so it is prepared behind those with a smaller number.
    few: part of the short comparisons. quick: of `--quick`.
    """

    name: str
    label: str
    dtype: str
    folded: bool
    prepare: Callable[[Job], Prepared]
    refusal: str = ""
    late: int = 0
    few: bool = False
    quick: bool = False


def is_16_bit(dtype: str) -> bool:
    """Of the names that methods use."""
    return dtype in ("bfloat16", "float16")


def product_dtypes(device: str) -> list[str]:
    """What matrix products may be done in on a device type; float32 comes first."""
    return ["float32", *(["tf32"] if device == "cuda" else []), "bfloat16", "float16"]


def refusal(dtype: str, device: str) -> str:
    """Why PyTorch's own products are not timed in `dtype`; '' where they are."""
    if device == "cpu" and dtype == "float16" and not machine.multiplies_float16():
        return "this processor has no float16 products, and PyTorch would emulate them for many times float32's time"
    return ""


@contextmanager
def multiply_in(dtype: str, device: torch.device) -> Iterator[None]:
    """float32 tensors are multiplied in `dtype` inside the block: 16 bits by autocast, tf32 by PyTorch's switch."""
    with (
        precision(dtype == "tf32"),
        torch.autocast(device.type, dtype=DTYPES[dtype] if is_16_bit(dtype) else None, enabled=is_16_bit(dtype)),
    ):
        yield


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """torch.compile for the sizes at hand."""
    return torch.compile(function, dynamic=False)


def forget_compiled() -> None:
    """Drop what torch.compile made for other workloads: it would count as recompilations of these."""
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
