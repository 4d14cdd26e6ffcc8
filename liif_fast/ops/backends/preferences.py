"""Which GPU backend is tried first: one table, each row with the source of its claim.

A row holds for NVIDIA's GPUs of the named compute capabilities. Without a row the order of `backends.BACKENDS` holds.
`liif-fast bench` on a GPU measures both backends, and prints the line to report where a row should change.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

_16_BITS = (torch.float16, torch.bfloat16)


class Preference(NamedTuple):
    """The first backend for a kind of work."""

    least: tuple[int, int]  # compute capability, and the largest
    most: tuple[int, int]
    op: str  # as in OpRequest
    dtypes: tuple[torch.dtype, ...]  # of matrix products
    training: bool
    first: str
    source: str
    queries: tuple[int, int] | None = None  # fewest and most of one decode; None: any number
    hopper: bool = False  # only where `cuda` runs its Hopper kernel


TABLE = (
    Preference(
        (9, 0),
        (9, 0),
        "decode",
        _16_BITS,
        False,
        "cuda",
        "modeled for an H100: cuda's Hopper kernel at 63 to 80 % of cuBLAS's rate, not yet run on a GPU",
        hopper=True,
    ),
    Preference(
        (9, 0),
        (9, 0),
        "decode",
        _16_BITS,
        True,
        "cuda",
        "modeled for an H100: the paper's training step of the decoder in 0.62 ms by cuda's Hopper kernel, "
        "not yet run on a GPU",
        hopper=True,
    ),
    Preference(
        (9, 0),
        (9, 0),
        "decode",
        _16_BITS,
        False,
        "triton",
        "modeled for an H100: triton at 42 % (36 to 47) of cuBLAS's rate, cuda at 38 to 41 %",
    ),
    Preference(
        (8, 0),
        (8, 9),
        "decode",
        _16_BITS,
        False,
        "cuda",
        "modeled for an A100: cuda at 61 % (53 to 69) of the peak, triton at 47 % (40 to 54)",
    ),
)
NO_ROW = "not modeled: the order of the table of backends"


def find(
    capability: tuple[int, int] | None,
    op: str,
    dtype: torch.dtype,
    training: bool,
    queries: int | None = None,
    hopper: bool = False,
) -> Preference | None:
    """The row for this work; None where there is none. Sizes are compared only where a row asks for them.

    capability: of the device, None where it is not NVIDIA's. queries: of the whole batch. hopper: whether `cuda` would
    run its Hopper kernel.
    """
    if capability is None:
        return None
    for row in TABLE:
        fits = row.least <= capability <= row.most and (row.op, row.training) == (op, training) and dtype in row.dtypes
        fits = fits and (hopper or not row.hopper)
        if fits and (row.queries is None or (queries is not None and row.queries[0] <= queries <= row.queries[1])):
            return row
    return None
