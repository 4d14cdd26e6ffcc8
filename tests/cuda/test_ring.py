"""Mistakes planted into a copy of the fused decode's barriers: each must be seen, the copy without one never.

The emulator makes copies as late as the rules allow, poisons their targets until then, and with a seed runs threads in
random order. It does not show the order of memory operations, for which a GPU's racecheck is needed.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.cuda.emulator import build

pytestmark = [pytest.mark.skipif(bool(build.why_not()), reason=build.why_not()), pytest.mark.prove]
SEEDS = 12
RING, LAYERS, FORWARD, BACKWARD = "../weight_stream.cuh", "layers.cuh", "forward.cuh", "backward.cuh"
IN_MULTIPLY = """    stream.refill();  // under the products
    stream.release();
"""
# The file, the text that is replaced, and what replaces it; then a part of the emulator's message, "" for wrong values.
MISTAKES = {
    "reads a chunk before it is copied": (
        [(RING, "    wait_barrier(&barriers_.full[stage(turn_)], phase(turn_));\n", "")],
        "",
    ),
    "overwrites a chunk before it is read": (
        [(RING, "    wait_barrier(&barriers_.empty[stage(turn)], phase(turn) ^ 1);\n", "")],
        "",
    ),
    "waits for the other parity": ([(RING, "phase(turn_));", "phase(turn_) ^ 1);")], ""),
    "never changes the parity": (
        [(RING, "return turn < T::kStages ? 0 : 1;", "return turn < T::kStages ? 0 : 0;")],
        "wrong parity",
    ),
    "does not wait for the last warp": (
        [
            (
                RING,
                "init_barrier(&barriers.empty[threadIdx.x], kWarps)",
                "init_barrier(&barriers.empty[threadIdx.x], 7)",
            )
        ],
        "",
    ),
    "does not wait for the last copies": (
        [
            (
                RING,
                "init_barrier(&barriers.full[threadIdx.x], kThreads)",
                "init_barrier(&barriers.full[threadIdx.x], 224)",
            )
        ],
        "",
    ),
    "arrives before its copies": ([(RING, "arrive_after_copies(&barriers_.full", "arrive(&barriers_.full")], ""),
    "releases a chunk before it has read it": (
        [
            (LAYERS, IN_MULTIPLY, ""),
            (LAYERS, "    uint2 first[T::kColTiles]", f"{IN_MULTIPLY}    uint2 first[T::kColTiles]"),
        ],
        "",
    ),
    "copies a whole ring ahead": ([(RING, "kAhead = 2", "kAhead = T::kStages")], "diverged"),
    "ends with copies under way": ([(RING, "finish() { wait_copies(); }", "finish() {}")], "before its copies"),
    "uses barriers before they are initialized": (
        [(RING, "    __syncthreads();\n    if (steps > 0)", "    if (steps > 0)")],
        "not initialized",
    ),
    "multiplies before its team has written": (
        [(FORWARD, "    sync_team<T>(coords);  // act has been written\n", "")],
        "",
    ),
    "writes before its team has multiplied": (
        [(FORWARD, "    sync_team<T>(coords);  // act has been read\n    if (kSaves", "    if (kSaves")],
        "",
    ),
    "writes geometry before its team has read it": (
        [(FORWARD, "    sync_team<T>(coords);  // partial has been written, geometry has been read\n", "")],
        "",
    ),
    "multiplies gradients before its team has written": (
        [(BACKWARD, "      sync_team<T>(coords);  // act has been written\n", "")],
        "",
    ),
}


def outcomes(folder: Path, patches: list[tuple[str, str, str]], *until: str, **kernel: Any) -> list[str]:
    """What the decode gives under every seed, with these patches in a copy of the sources.

    kernel: as for build.ring. until: a hash and a text; the last outcome is the first that is not the hash and has the
    text in it.
    """
    csrc = folder / "csrc"
    shutil.copytree(build.ROOT / "csrc", csrc)
    for name, old, new in patches:
        path = csrc / "cuda" / "decode" / name
        text = path.read_text()
        assert text.count(old) == 1, f"{name} has {text.count(old)} times: {old}"
        path.write_text(text.replace(old, new))
    program = build.ring(csrc, folder / "ring", **kernel)
    result = subprocess.run([program, str(SEEDS), *until], capture_output=True, text=True, check=True, timeout=300)
    return result.stdout.splitlines()


def sound_outcome(folder: Path, **kernel: Any) -> str:
    """The hash of the result without a mistake, which no schedule changes."""
    found = outcomes(folder, [], **kernel)
    assert len(found) == SEEDS
    assert len(set(found)) == 1
    assert int(found[0], 16)
    return found[0]


def check_seen(folder: Path, patches: list[tuple[str, str, str]], sound: str, message: str, **kernel: Any) -> None:
    """Whether a mistake is seen under a seed, as another hash or with this part of a message."""
    *_, last = found = outcomes(folder, patches, sound, message, **kernel)
    assert last != sound, found
    assert message in last, found


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> str:
    return sound_outcome(tmp_path_factory.mktemp("sound"))


@pytest.mark.parametrize(("patches", "message"), MISTAKES.values(), ids=[name.replace(" ", "-") for name in MISTAKES])
def test_a_planted_mistake_is_seen(sound, tmp_path, patches, message):
    check_seen(tmp_path, patches, sound, message)
