"""Several processes as one: what torchrun started, or a single process where nothing did.

`torchrun --nproc-per-node N -m liif_fast train ...` starts N of them; inside `setup()` they know of each other, and
every function here has the obvious answer for a single process.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist

_Item = TypeVar("_Item")


@contextlib.contextmanager
def setup(device: str | torch.device | None = None) -> Iterator[torch.device]:
    """Join the processes that torchrun started, and leave them in the end; yields this process' device.

    device: 'cpu', 'cuda', 'cuda:1', ...; None takes a GPU where there is one. Under torchrun every process of a machine
    takes the GPU of its own number, and 'cuda' means that too. NCCL connects GPUs, gloo processors.
    Raises RuntimeError where a GPU is asked for that PyTorch does not see.
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
    """Whether torchrun, or something that sets the same variables, started this process."""
    return all(name in os.environ for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"))


def share(items: Sequence[_Item]) -> list[_Item]:
    """Every world-th item, from this process' number on: independent work, split without a word between processes."""
    if not is_launched():
        return list(items)
    return list(items[int(os.environ["RANK"]) :: int(os.environ["WORLD_SIZE"])])


def own_device(device: str | None = None) -> str:
    """The name of the device for this process: torchrun's processes take the GPU of their own number."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    return f"cuda:{os.environ['LOCAL_RANK']}" if device == "cuda" and "LOCAL_RANK" in os.environ else device


def rank() -> int:
    """This process' number, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Whether this is the process that writes files and speaks."""
    return rank() == 0


def barrier() -> None:
    """Wait until every process is here."""
    if dist.is_initialized():
        dist.barrier()


def sum_over_ranks(values: Sequence[float]) -> list[float]:
    """Sums of the processes' values, in float64, the same in every process."""
    if not dist.is_initialized():
        return list(values)
    total = torch.tensor(values, dtype=torch.float64, device=_wire_device())
    dist.all_reduce(total)
    return total.tolist()


def gather(value: Any) -> list[Any]:
    """Every process' value, in order of rank, in every process. value: tensors and plain containers."""
    if not dist.is_initialized():
        return [value]
    found: list[Any] = [None] * world_size()
    dist.all_gather_object(found, value)
    return found


def _wire_device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")


def _device(device: str | torch.device | None) -> torch.device:
    chosen = torch.device(own_device(None if device is None else str(device)))
    if chosen.type != "cuda":
        return chosen
    number = chosen.index or 0
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if number >= count:
        raise RuntimeError(f"the device cuda:{number} was asked for, but PyTorch sees {count} GPUs here")
    return torch.device("cuda", number)
