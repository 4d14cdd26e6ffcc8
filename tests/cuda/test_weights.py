"""The weights' gradients in 16 bits (csrc/cuda/row_product.cuh, decode/weights.cuh), on the emulator.

tests/ops compares them with float64 as a part of every decode.
"""

from __future__ import annotations

from importlib import import_module

import pytest
import torch

from tests.backends import KINDS, Kind, emulated, hopper_emulated
from tests.cuda.emulator import build
from tests.cuda.emulator.ops import _array
from tests.cuda.test_ring import check_seen, sound_outcome
from tests.helpers import Case, norm_error
from tests.ops.decoding import decode, gradients, make_problem

pytestmark = pytest.mark.skipif(bool(build.why_not()), reason=build.why_not())


@pytest.mark.parametrize(("channels", "rounds"), [((64, 64), False), ((128, 128), True), ((128, 256), False)], ids=str)
@pytest.mark.parametrize(("rows", "parts", "blocks"), [(32, 1, 1), (416, 3, 2), (96, 5, 5)])
def test_sums_over_rows_are_those_of_float64(channels, rounds, rows, parts, blocks):
    """One stage; parts of unequal length, two of them in one block; parts without rows. Schedules change no bit.

    rounds: whether the first operand is float32, which its threads round; otherwise it is copied.
    """
    generator = torch.Generator().manual_seed(rows)
    a, b = (torch.randn(rows, each, generator=generator) for each in channels)
    operands = [_array(a if rounds else a.bfloat16()), _array(b.bfloat16())]
    with emulated():
        kernels, found = build.load(), []
        for seed in (0, 1, 2):
            kernels.set_schedule(0, False, seed)
            found.append(torch.from_numpy(kernels.row_product(*operands, parts, blocks)))
    assert norm_error(found[0], a.bfloat16().double().t() @ b.bfloat16().double()) <= 1e-6
    assert all(torch.equal(one, found[0]) for one in found)


# Few rows and many; cells of every query, of the grid and none; narrower layers, one hidden layer and five; more
# outputs than are rebuilt. In the kernels for every GPU, and in those for Hopper. bfloat16 and float16.
CASES = [
    ("points", Case(2, 3, 5, 7, 40, (64, 48, 32), 3), KINDS[3], "cuda"),
    ("grid", Case(2, 3, 5, 7, 40, (256, 208, 256), 4), KINDS[3], "hopper"),
    ("points", Case(1, 3, 5, 7, 90, (80, 112, 96, 128), 1, local_ensemble=False), KINDS[3], "cuda"),
    ("points", Case(1, 3, 5, 7, 3, (240, 16, 256), 5), KINDS[3], "cuda"),
    ("points", Case(1, 3, 5, 7, 70, (48, 256), 4, cell_decode=False), KINDS[6], "cuda"),
    ("points", Case(1, 3, 5, 7, 60, (144,) * 6, 2), KINDS[3], "hopper"),
    ("points", Case(1, 3, 4, 5, 70, (256, 256), 3, local_ensemble=False), KINDS[6], "hopper"),
]


@pytest.mark.parametrize(
    ("mode", "case", "kind", "kernel"),
    [CASES[0], *(pytest.param(*case, marks=pytest.mark.prove) for case in CASES[1:])],
    ids=lambda value: value.name if isinstance(value, Kind) else None,
)
def test_what_is_rebuilt_is_what_would_be_stored(mode, case, kind, kernel, monkeypatch):
    """The first layer's activations to the bit. Gradients of the last hidden layer up to the order of two factors."""
    problem = make_problem(case, kind, mode)
    problem.coord.requires_grad_(False), problem.cell.requires_grad_(False)
    module, found = import_module("liif_fast.ops.backends.cuda.decode"), []
    with emulated() if kernel == "cuda" else hopper_emulated():
        for rebuilds in (False, True):
            build.load().set_rebuilds(rebuilds)
            with monkeypatch.context() as patch:
                if not rebuilds:
                    patch.setattr(module, "_saved_layers", lambda inputs, _: len(inputs.weights) - 1)
                found.append(gradients(decode(problem, "cuda"), problem.weights, kind.dtype))
    *_, last_hidden, _ = range(len(found[0]))
    for position, (stored, rebuilt) in enumerate(zip(*found, strict=True)):
        if position == last_hidden and kernel == "cuda":
            assert norm_error(rebuilt, stored) <= 1e-3
        else:
            assert torch.equal(rebuilt, stored), position


# The text that is replaced, and what replaces it; then a part of the emulator's message, "" for wrong values.
PRODUCT = "../row_product.cuh"
MISTAKES = {
    "multiplies before rows are there": ("    wait_barrier(&space_.full[stage(used_)], phase(used_));\n", "", ""),
    "overwrites unread rows": (
        "        wait_barrier(&space_.empty[stage(filled_)], phase(filled_) ^ 1);\n", "", ""
    ),
    "does not wait for stores": (
        "        a.finish(half);\n        b.finish(half + T::kHalfBytes);\n        arrive_as_warp(full);\n",
        "        arrive_as_warp(full);\n        a.finish(half);\n        b.finish(half + T::kHalfBytes);\n",
        "",
    ),
    "does not wait for copies": ("        arrive_after_copies(full);\n", "        arrive(full);\n", ""),
    "gives a stage back while it is read": ("if (k + 16 == T::kRows)", "if (k == 0)", ""),
    "copies a whole ring ahead": ("kAhead = 2", "kAhead = 4", "diverged"),
    "reads units without the swizzle": ("((first_a + 2 * m + low) ^ at)", "(first_a + 2 * m + low)", ""),
    "takes one operand's halves for the other's": ("(k + low * 8 + at)", "(k + high * 8 + at)", ""),
}  # fmt: skip


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> str:
    return sound_outcome(tmp_path_factory.mktemp("sound"), program="product")


@pytest.mark.prove
@pytest.mark.parametrize(
    ("old", "new", "message"), MISTAKES.values(), ids=[name.replace(" ", "-") for name in MISTAKES]
)
def test_a_planted_mistake_is_seen(sound, tmp_path, old, new, message):
    check_seen(tmp_path, [(PRODUCT, old, new)], sound, message, program="product")
