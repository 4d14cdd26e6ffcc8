"""query and render, forward and backward, on every backend: every shape, flag and kind of operands."""

from __future__ import annotations

import pytest

from tests.helpers import FLAGS, SHAPES, Case
from tests.ops.decoding import MODES
from tests.ops.tolerances import check_decode

modes = pytest.mark.parametrize("mode", MODES)


@pytest.mark.table
@modes
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.kinds("float64", "float32", "tf32", "bfloat16", "float16")
def test_every_shape(backend, kind, shape, mode):
    check_decode(backend, kind, SHAPES[shape], mode)


@pytest.mark.table
@modes
@pytest.mark.parametrize("flags", FLAGS, ids=lambda f: "".join("-euc"[i + 1] for i in range(3) if not f[i]) or "full")
def test_every_flag(backend, kind, flags, mode):
    check_decode(backend, kind, Case(2, 3, 5, 7, 30, (32, 16), 3, *flags), mode)
