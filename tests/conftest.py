"""What tests share: two threads (the results' noise is judged at that), and switches that are put back."""

from __future__ import annotations

import pytest
import torch

from liif_fast.ops.backends import extension

torch.set_num_threads(2)

ISAS = ("avx512", "avx2", "portable")


@pytest.fixture(params=ISAS)
def isa(request):
    """Each instruction set of the CPU kernels that this processor runs."""
    if not extension.is_available():
        pytest.skip(extension.reason())
    if not torch.ops.liif_fast_C.cpu_select_isa(request.param):
        pytest.skip(f"this processor has no {request.param}")
    yield request.param
    torch.ops.liif_fast_C.cpu_select_isa("auto")


@pytest.fixture
def deterministic(request):
    """torch.use_deterministic_algorithms, as the parameter says."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(request.param)
    yield request.param
    torch.use_deterministic_algorithms(before)
