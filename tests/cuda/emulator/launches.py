"""How tests vary what must not matter: the launch's blocks and their order, and the order of sums."""

from __future__ import annotations

import pytest

# Most blocks of a launch (0: as many as it asks for), and whether they run from last to first: the module's
# set_schedule.
SCHEDULES = {"as-launched": (0, False), "one-block": (1, False), "two-blocks-backwards": (2, True)}

# With the fixture `deterministic` of tests/conftest.py.
both_orders = pytest.mark.parametrize("deterministic", [False, True], ids=["atomics", "ordered"], indirect=True)
