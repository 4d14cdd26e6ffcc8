"""The program that reads the clock at the borders of the decode's phases, on the emulator."""

from __future__ import annotations

import json
import subprocess

import pytest

from tests.cuda.emulator import build

pytestmark = [pytest.mark.skipif(bool(build.why_not()), reason=build.why_not()), pytest.mark.prove]


def test_phases_are_timed_and_results_stay_the_same():
    """The emulator's clock counts readings, so every phase takes some and all add up to the tile."""
    found = json.loads(subprocess.run([build.cycles(), "8"], capture_output=True, check=True).stdout)
    assert found["same"] and found["tiles"] >= 2
    total = found["cycles"].pop("tile")
    assert list(found["cycles"]) == ["first layer", "hidden layers", "blend and last layer", "output", "geometry"]
    assert min(found["cycles"].values()) > 0
    assert abs(sum(found["cycles"].values()) - total) <= 3
