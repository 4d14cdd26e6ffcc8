"""Work shared by several processes that torchrun started, or done by a single one.

`torchrun --nproc-per-node N -m liif_fast train ...` starts N processes; `setup()` connects them. Every function here
also works in a single process, without torchrun.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from liif_fast.utils.hardware import usable_device

_Item = TypeVar("_Item")


@contextlib.contextmanager
def setup(device: str | torch.device | None = None) -> Iterator[torch.device]:
    """Connect the processes that torchrun started until the block ends; yields this process's device.

    device: 'cpu', 'cuda', 'cuda:1', ...; None means a GPU if there is one. Under torchrun, None and 'cuda' mean the GPU
        whose number is the local rank. NCCL connects GPUs, gloo processors.
    Raises RuntimeError for a GPU that PyTorch does not find, ValueError for another device that cannot be used.
    """
    chosen = _device(device)
    if not is_launched() or dist.is_initialized():
        yield chosen
        return
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo")
    try:
        yield chosen
    finally:
        dist.destroy_process_group()


def is_launched() -> bool:
    """Whether torchrun, or a launcher that sets the same variables, started this process."""
    return all(name in os.environ for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"))


def share(items: Sequence[_Item]) -> list[_Item]:
    """Splits independent work by rank; no communication."""
    if not is_launched():
        return list(items)
    return list(items[int(os.environ["RANK"]) :: int(os.environ["WORLD_SIZE"])])


def own_device(device: str | None = None) -> str:
    """The name of this process's device: under torchrun, 'cuda' is the GPU whose number is the local rank."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    return f"cuda:{os.environ['LOCAL_RANK']}" if device == "cuda" and "LOCAL_RANK" in os.environ else device


def rank() -> int:
    """The number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """The number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Whether this process writes files and messages."""
    return rank() == 0


def barrier() -> None:
    """Wait for all processes."""
    if dist.is_initialized():
        dist.barrier()


def sum_over_ranks(values: Sequence[float]) -> list[float]:
    """Sums over all processes, in float64, equal in every process."""
    if not dist.is_initialized():
        return list(values)
    total = torch.tensor(values, dtype=torch.float64, device=_transfer_device())
    dist.all_reduce(total)
    return total.tolist()


def gather(value: Any) -> list[Any]:
    """The values of all processes in order of rank, in every process. value: tensors and plain containers."""
    if not dist.is_initialized():
        return [value]
    found: list[Any] = [None] * world_size()
    dist.all_gather_object(found, value)
    return found


def _transfer_device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")


def _device(device: str | torch.device | None) -> torch.device:
    name = own_device(None if device is None else str(device))
    if not re.fullmatch(r"cuda(:\d+)?", name):
        return usable_device(name)
    number = int(name[5:] or 0)
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if number >= count:
        raise RuntimeError(f"the device cuda:{number} was requested, but PyTorch finds {count} GPUs: choose another")
    return torch.device("cuda", number)
