"""The programs of tests/gpu that read the clock, on the emulator, where it counts readings."""

from __future__ import annotations

import json
import subprocess

import pytest

from tests.cuda.emulator import build

pytestmark = [pytest.mark.skipif(bool(build.why_not()), reason=build.why_not()), pytest.mark.prove]


def test_phases_are_timed_and_results_stay_the_same():
    """Every phase takes some and all add up to the tile."""
    found = json.loads(subprocess.run([build.clocked("cycles"), "8"], capture_output=True, check=True).stdout)
    assert found["same"] and found["tiles"] >= 2
    total = found["cycles"].pop("tile")
    assert list(found["cycles"]) == ["first layer", "hidden layers", "blend and last layer", "output", "geometry"]
    assert min(found["cycles"].values()) > 0
    assert abs(sum(found["cycles"].values()) - total) <= 3


def test_the_probes_of_the_hopper_decode_multiply_right():
    """In a cluster of two blocks; every probe's sums are exact."""
    found = json.loads(subprocess.run([build.clocked("hopper_probes"), "2"], capture_output=True, check=True).stdout)
    assert found["right"] and len(found["cycles"]) == 9 and found["cycles"]["ideal"] == 1024
