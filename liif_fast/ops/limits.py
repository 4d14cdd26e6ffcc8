"""How far results may be from the exact ones: for the first-use check, `doctor --check` and the tests."""

from __future__ import annotations

import torch

# (dtype, quantity) -> limit. "result" is the largest error as a fraction of the range, "gradient" the relative error in
# the 2-norm. Sums run in another order than the reference's, which costs a few units in the last place at these sizes.
LIMITS = {
    (torch.float64, "result"): 1e-12,
    (torch.float32, "result"): 1e-5,
    (torch.float64, "gradient"): 1e-11,
    (torch.float32, "gradient"): 1e-5,
    # Rounding a result to 16 bits: half a unit in its last place.
    (torch.float16, "rounding"): 5e-4,
    (torch.bfloat16, "rounding"): 4e-3,
    # Of an imnet of three layers, to the model that rounds where the kernels round. A sum in another order can round to
    # the other neighbor and so move an operand by a unit in its last place.
    (torch.float16, "model"): 2e-3,
    (torch.bfloat16, "model"): 1e-2,
    # In dB, the promise for the paper's decoder.
    (torch.float16, "psnr"): 68.0,
    (torch.bfloat16, "psnr"): 52.0,
}

TF32 = "tf32"  # float32 products whose operands round to TF32
# Products' dtype -> (of results, of gradients), for the decodes of first_use.py, as fractions of expected values. The
# emulated kernels err at most half as much, on a device of 3 processors and on one of 24. In float32 there is room for
# a ReLU whose sign flips.
FIRST_USE: dict[torch.dtype | str, tuple[float, float]] = {
    torch.float64: (1e-10, 1e-6),
    torch.float32: (1e-4, 5e-2),
    TF32: (1e-2, 0.2),
    torch.float16: (1e-2, 0.2),
    torch.bfloat16: (3e-2, 0.3),
}
