"""Devices that cannot be used are refused in one sentence, by every function that takes a device."""

import pytest

from liif_fast.utils import distributed
from liif_fast.utils.hardware import usable_device


def connected(name):
    with distributed.setup(name) as device:
        return device


@pytest.mark.parametrize("use", [usable_device, connected])
@pytest.mark.parametrize("name", ["hpu", "privateuseone", "meta", "vulkan", "opengl", "toaster", "cuda:x"])
def test_devices_that_hold_no_numbers_are_refused_in_one_sentence(use, name):
    with pytest.raises(ValueError, match=rf"^device '{name}' cannot be used here: [^\n]+\.$"):
        use(name)
    assert use("cpu").type == "cpu"
