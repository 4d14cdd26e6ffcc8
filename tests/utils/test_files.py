"""Files that are complete or absent: names of any length, symbolic links."""

import errno
import os

import pytest

from liif_fast.utils.files import replacing, write_atomically


@pytest.mark.parametrize("name", ["a" * 241, "b" * 255, "ü" * 127, "c"])
def test_names_as_long_as_the_file_system_allows(tmp_path, name):
    write_atomically(tmp_path / name, b"first")
    with replacing(tmp_path / name) as file:
        assert len(os.path.basename(file.name)) < 20
        file.write(b"second")
    assert (tmp_path / name).read_bytes() == b"second" and len(os.listdir(tmp_path)) == 1


def test_a_block_that_raises_leaves_the_old_file(tmp_path):
    (tmp_path / "a").write_bytes(b"old")
    with pytest.raises(KeyboardInterrupt), replacing(tmp_path / "a") as file:
        file.write(b"new")
        raise KeyboardInterrupt
    assert (tmp_path / "a").read_bytes() == b"old" and os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize("exists", [True, False])
def test_links_stay_and_their_target_is_replaced_or_made(tmp_path, exists):
    for folder in ("here", "there"):
        (tmp_path / folder).mkdir()
    target, link = tmp_path / "there" / "target", tmp_path / "here" / "link"
    if exists:
        target.write_bytes(b"old")
    link.symlink_to("../there/target")
    write_atomically(link, b"new")
    assert link.is_symlink() and not target.is_symlink() and target.read_bytes() == b"new"
    assert os.listdir(tmp_path / "here") == ["link"] and os.listdir(tmp_path / "there") == ["target"]


def test_a_link_to_itself_is_an_error(tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(OSError) as found:
        write_atomically(tmp_path / "loop", b"new")
    assert found.value.errno == errno.ELOOP and (tmp_path / "loop").is_symlink()
