"""compute-sanitizer over the small cases: no invalid access, race, uninitialized read or wrong barrier in our kernels.

The sanitizer watches PyTorch's kernels too. Their reports are counted and fail nothing.
"""

from __future__ import annotations

import pytest
import torch

from tests.gpu import sanitizer
from tests.helpers import reason_against

LIMIT_S = 200


@pytest.mark.timeout(LIMIT_S + 30)
@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "initcheck", "synccheck"])
def test_the_sanitizer_has_no_report_on_our_kernels(device, tool, record_property):
    if reason := reason_against("cuda", "query", torch.float32, device.type):
        pytest.skip(reason)
    if sanitizer.find() is None:
        pytest.skip("compute-sanitizer is not installed here: it comes with the CUDA toolkit")
    reasons, summary = sanitizer.run(tool, ["tests.gpu.small_cases"], LIMIT_S)
    record_property(tool, summary)
    assert not reasons
