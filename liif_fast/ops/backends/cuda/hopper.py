"""When the `cuda` backend runs the Hopper kernel (csrc/cuda/decode/hopper.cuh), and why where it does not.

Where it does not, the kernels for every GPU run. They also compute gradients of coordinates and cells, from what the
Hopper kernel saves. LIIF_FAST_HOPPER=0 leaves the Hopper kernel out.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch

from .. import extension, gpu

ENABLED = os.environ.get("LIIF_FAST_HOPPER", "1") != "0"
POLICIES = {torch.float16: 4, torch.bfloat16: 5}  # the wgmma policies of launch.h's MmaPolicy
# Of csrc/cuda/decode/launch.h; a test compares.
MOST_WIDTH, MOST_OUTS, MOST_TRAINED_OUTS, MOST_QUERIES = 256, 16, 4, 1 << 30
_LEAST_WIDTH = 65  # narrower layers would be padded to twice their size


@gpu.traced_as_constant
def against_device(kind: str, index: int | None) -> str:
    """Why a device of this type cannot run the Hopper kernel; '' where it can."""
    if not ENABLED:
        return "LIIF_FAST_HOPPER=0 leaves the Hopper kernel out"
    found = gpu.capability(index) if kind == "cuda" else None
    if found != (9, 0):
        have = "another device" if found is None else f"{found[0]}.{found[1]}"
        return f"the Hopper kernel needs a GPU of compute capability 9.0, this is {have}"
    if "90a" not in extension.build_facts().get("cuda_archs", ()):
        return "the extension holds no code for sm_90a: build with LIIF_FAST_CUDA_ARCHS=90a for the Hopper kernel"
    return ""


def against_imnet(
    widths: Sequence[int],
    matmul_dtype: torch.dtype,
    trains: bool,
    queries: int | None = None,
    has_query_term: bool = False,
) -> str:
    """Why the Hopper kernel does not decode with an imnet; '' where it does.

    widths: of the imnet's layers, (K, *hidden, O). trains: whether autograd records the decode. queries: of the whole
    batch, None where they are not known yet.
    """
    if len(widths) < 3:
        return f"the Hopper kernel decodes with at least 3 layers, this imnet has {len(widths)}: it has no product"
    if trains and widths[-1] > MOST_TRAINED_OUTS:
        return f"the Hopper kernel trains with at most {MOST_TRAINED_OUTS} outputs, not {widths[-1]}"
    if has_query_term:
        return "the Hopper kernel decodes without a query term"
    if matmul_dtype not in POLICIES:
        return f"the Hopper kernel multiplies float16 or bfloat16, not {matmul_dtype}"
    if not _LEAST_WIDTH <= max(widths[:-1]) <= MOST_WIDTH:
        return (
            f"the Hopper kernel decodes with a widest layer of {_LEAST_WIDTH} to {MOST_WIDTH} channels, "
            f"not {max(widths[:-1])}"
        )
    if widths[-1] > MOST_OUTS:
        return f"the Hopper kernel decodes to at most {MOST_OUTS} outputs, not {widths[-1]}"
    if queries is not None and queries > MOST_QUERIES:
        return f"the Hopper kernel decodes at most {MOST_QUERIES} queries at a time, not {queries}"
    return ""
