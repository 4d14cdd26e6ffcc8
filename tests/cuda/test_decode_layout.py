"""Numbers and formulas that Python repeats from the headers of the fused decode's CUDA kernels."""

from __future__ import annotations

import importlib
import itertools

import pytest
import torch

from liif_fast.ops import backends
from liif_fast.ops.backends.cuda import hopper
from liif_fast.ops.inputs import DecodeInputs
from tests.backends import set_device
from tests.cuda.emulator import build

pytestmark = pytest.mark.skipif(bool(build.why_not()), reason=build.why_not())
cuda_decode = importlib.import_module("liif_fast.ops.backends.cuda.decode")  # the package's `decode` is the function


def test_limits_are_those_of_the_headers():
    assert build.load().limits == {
        "layers": backends._FUSED_LAYERS,
        "width": backends._FUSED_WIDTH,
        "width_step": backends._FUSED_WIDTH_STEP,
        "outs": cuda_decode._FUSED_OUTS,
        "row_padding": cuda_decode._ROW_PADDING,
        "trained_outs": hopper.MOST_TRAINED_OUTS,
        "wgmma_queries": hopper.MOST_QUERIES,
    }


@pytest.mark.parametrize("policy", [0, 1, 3], ids=["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("device", ["sm_90", "sm_86"])
def test_saved_activations_fit_into_the_bytes_that_python_allocates(policy, device):
    """Python allocates enough for every device, and at most 8 bytes per row and layer too many for the ReLU bits."""
    kernels = build.load()
    set_device(device)
    dtype = {0: torch.float16, 1: torch.bfloat16, 3: torch.float32}[policy]
    for hidden in ((16,), (64, 48), (128,), (256, 256, 16)):
        widths = [*hidden, 3]
        weights = [torch.empty(out, into) for into, out in itertools.pairwise(widths)]
        flags = itertools.product((False, True), (1, 33, 500), (False, True), (torch.float32, dtype))
        for ensemble, queries, coord_grad, map_dtype in flags:
            latent_map = torch.empty(1, 2, 2, hidden[0], dtype=map_dtype)
            points = torch.empty(1, queries, 2), None, torch.empty(hidden[0], 2)
            inputs = DecodeInputs(latent_map, *points, weights, [], [], [], ensemble, None, dtype)
            rows = cuda_decode._padded_rows(inputs.rows)
            facts = len(hidden) - 1, ensemble, coord_grad, inputs.latent_map.dtype != dtype
            exact = kernels.saved_bytes(policy, max(hidden), *facts, rows)
            spare = cuda_decode._SAVED_ALIGNMENT + 8 * len(hidden) * rows
            assert exact <= cuda_decode.saved_bytes(inputs, coord_grad) <= exact + spare
