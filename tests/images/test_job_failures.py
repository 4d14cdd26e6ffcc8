"""`upscale_file` where something goes wrong: bombs, refusals, interruptions, full disks, forked workers."""

import errno
import io
import os
import struct
import threading
import zlib

import numpy as np
import pytest
import pyvips
import tifffile
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from liif_fast.images import files, writing
from liif_fast.images.headers import PNG_SIGNATURE, png_chunk
from liif_fast.images.jobs import upscale_file
from liif_fast.images.picture import ImageError, Picture
from tests.images.test_image import H, W, exif_of, picture, samples
from tests.images.test_jobs import _nearest, nearest  # noqa: F401


def bomb(chunk, start=b"", pixels=b"\0\7"):
    """A 1x1 PNG; a chunk of it unpacks to 3 GB."""
    packer = zlib.compressobj()
    first, again = (packer.compress(bytes(1 << 24)) + packer.flush(zlib.Z_FULL_FLUSH) for _ in range(2))
    packed = start + first + 180 * again + packer.flush()
    header = png_chunk(b"IHDR", b"\0\0\0\1\0\0\0\1\x08\0\0\0\0")
    rest = b"" if chunk == b"IDAT" else png_chunk(b"IDAT", zlib.compress(pixels))
    return PNG_SIGNATURE + header + png_chunk(chunk, packed) + rest + png_chunk(b"IEND", b"")


@pytest.mark.timeout(60)
def test_bombs(tmp_path):
    (tmp_path / "a.png").write_bytes(bomb(b"IDAT"))
    with pytest.raises(ImageError, match=r"a\.png holds more data than its 1x1 pixels can need"):
        files.read(tmp_path / "a.png")
    for chunk in (b"zTXt", b"iCCP"):
        (tmp_path / "b.png").write_bytes(bomb(chunk, b"name\0\0"))
        assert files.read(tmp_path / "b.png").color.tolist() == [[[7]]]
    packed = zlib.compress(bytes(1 << 26))
    tifffile.imwrite(tmp_path / "c.tif", np.zeros((1, 1), np.uint8), compression="zlib")
    data = bytearray((tmp_path / "c.tif").read_bytes())
    with tifffile.TiffFile(tmp_path / "c.tif") as tiff:
        for tag, value in ((273, len(data)), (279, len(packed))):
            entry = tiff.pages.first.tags[tag]
            data[entry.valueoffset : entry.valueoffset + 4] = value.to_bytes(4, "little")
    (tmp_path / "c.tif").write_bytes(data + packed)
    assert files.read(tmp_path / "c.tif").color.tolist() == [[[0]]]


def test_a_header_that_promises_too_much(tmp_path):
    for suffix, old, new in (
        (".png", struct.pack(">II", W, H), struct.pack(">II", 60000, 60000)),
        (".jpg", struct.pack(">HH", H, W), struct.pack(">HH", 60000, 60000)),
        (".tif", struct.pack("<HHII", 256, 4, 1, W), struct.pack("<HHII", 256, 4, 1, 1 << 25)),
    ):
        path = tmp_path / f"a{suffix}"
        files.write(picture(3, np.uint8), path)
        data = path.read_bytes()
        assert old in data or suffix == ".tif"
        data = data.replace(struct.pack("<HHIHH", 256, 3, 1, W, 0), new) if old not in data else data.replace(old, new)
        header = data.index(b"IHDR") if suffix == ".png" else 0
        checksum = zlib.crc32(data[header : header + 17]).to_bytes(4, "big")
        path.write_bytes(data[: header + 17] + checksum + data[header + 21 :] if header else data)
        with pytest.raises(
            ImageError, match=rf"a\{suffix} is broken: its header announces .* but its data end too early"
        ):
            files.read(path)


def test_max_pixels(tmp_path):
    files.write(picture(3, np.uint8), tmp_path / "a.png")
    with pytest.raises(ImageError, match=rf"a\.png has {W}x{H} pixels, more than the limit of {H * W - 1}"):
        upscale_file(tmp_path / "a.png", tmp_path / "b.png", scale=1, max_pixels=H * W - 1)
    assert upscale_file(tmp_path / "a.png", tmp_path / "b.png", scale=1, max_pixels=H * W).output_size == (H, W)


def test_pipes(tmp_path):
    out = io.BytesIO()
    files.write(picture(4, np.uint16), tmp_path / "a.png")
    assert upscale_file(io.BytesIO((tmp_path / "a.png").read_bytes()), out, scale=1, kind="PNG").output_size == (H, W)
    (tmp_path / "b.png").write_bytes(out.getvalue())
    np.testing.assert_array_equal(files.read(tmp_path / "b.png").samples(), samples(4, np.uint16))
    with pytest.raises(ImageError, match="the input is not an image"):
        upscale_file(io.BytesIO(b"text"), out, scale=1, kind="PNG")
    with pytest.raises(ValueError, match="kind is None, but must be one of"):
        upscale_file(tmp_path / "a.png", out, scale=1)


def test_targets_that_are_refused(tmp_path):
    path = tmp_path / "a.png"
    files.write(picture(3, np.uint8), path)
    with pytest.raises(ValueError, match="is the input itself"):
        upscale_file(path, path, scale=2, overwrite=True)
    (tmp_path / "b.png").write_bytes(b"precious")
    with pytest.raises(ValueError, match=r"b\.png exists already"):
        upscale_file(path, tmp_path / "b.png", scale=2)
    assert upscale_file(path, tmp_path / "b.png", scale=2, overwrite=True).output_size == (2 * H, 2 * W)
    with pytest.raises(ImageError, match="pixels need rows of 165 MB; the most are 100 MB"):
        upscale_file(path, tmp_path / "c.png", size=(1, 55_000_000))
    with pytest.raises(ImageError, match="pixels need at least 105 TB of the disk"):
        upscale_file(path, tmp_path / "c.png", size=(2**31 - 1, 2**24))


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("reason", [KeyboardInterrupt, Interrupted])
@pytest.mark.parametrize("suffix", [".png", ".tif", ".jpg", ".webp"])
def test_an_interrupted_job_leaves_nothing(tmp_path, monkeypatch, suffix, reason):
    files.write(picture(3, np.uint8), tmp_path / "a.png")

    def interrupt(done, total):
        if done > total / 2:
            raise reason

    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        with pytest.raises(reason):
            upscale_file(tmp_path / "a.png", tmp_path / f"b{suffix}", scale=30, progress=interrupt)
    assert os.listdir(tmp_path) == ["a.png"]
    assert len(os.listdir("/proc/self/fd")) == before
    assert not [thread for thread in threading.enumerate() if "saver" in thread.name]


@pytest.mark.parametrize("suffix", [".png", ".tif", ".jpg", ".webp"])
def test_a_full_disk_is_one_sentence(tmp_path, monkeypatch, suffix):
    files.write(Picture(np.random.default_rng(0).integers(0, 256, (60, 60, 3), dtype=np.uint8)), tmp_path / "a.png")

    def full(saver, data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(writing._Saver, "_edited", full)
    with pytest.raises(ImageError, match=rf"b\{suffix} cannot be written: No space left on device\."):
        upscale_file(tmp_path / "a.png", tmp_path / f"b{suffix}", scale=10)
    assert os.listdir(tmp_path) == ["a.png"]


def test_a_source_that_breaks_later_is_one_sentence(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (900, 300, 3), dtype=np.uint8)
    for suffix in (".png", ".jpg", ".tif"):
        Image.fromarray(noise).save(tmp_path / f"a{suffix}")
        data = (tmp_path / f"a{suffix}").read_bytes()
        (tmp_path / f"a{suffix}").write_bytes(data[: len(data) * 2 // 3])
        with pytest.raises(ImageError, match=rf"a\{suffix} is broken"):
            upscale_file(tmp_path / f"a{suffix}", tmp_path / "b.png", scale=1)
        assert not (tmp_path / "b.png").exists()


def test_libvips_uses_as_many_threads_as_pytorch(tmp_path):
    before = torch.get_num_threads()
    try:
        for number in (1, 2):
            torch.set_num_threads(number)
            files.write(picture(3, np.uint8), tmp_path / "a.png")
            assert pyvips.concurrency_get() == number
    finally:
        torch.set_num_threads(before)


def test_a_file_that_changes_is_read_anew(tmp_path):
    for value in (1, 2):
        files.write(Picture(np.full((4, 4, 3), value, np.uint8)), tmp_path / "a.png")
        assert files.read(tmp_path / "a.png").color.max() == value


class Files(Dataset):
    def __init__(self, folder):
        self.paths = sorted(folder.iterdir())

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index):
        return torch.from_numpy(files.read(self.paths[index]).color.astype(np.int32))


class Writing(Files):
    def __getitem__(self, index):
        files.write(picture(3, np.uint8), self.paths[index].with_name("b.png"))
        return torch.zeros(1)


@pytest.mark.timeout(60)
def test_forked_loader_workers(tmp_path):
    """libvips' threads do not exist in them: they read without, and refuse to write."""
    image = Image.fromarray(samples(3, np.uint8))
    for suffix, options in ((".jpg", {"progressive": True}), (".webp", {}), (".tif", {}), (".avif", {}), (".gif", {})):
        image.save(tmp_path / f"a{suffix}", **options)
    files.write(picture(3, np.uint16, exif=exif_of({0x0112: 6})), tmp_path / "a.png")
    here = [Files(tmp_path)[index] for index in range(6)]
    loader = DataLoader(Files(tmp_path), batch_size=None, num_workers=2, multiprocessing_context="fork")
    for _ in range(2):
        assert all(torch.equal(a, b) for a, b in zip(loader, here, strict=True))
    with pytest.raises(ImageError, match="files cannot be written in a process forked after"):
        list(DataLoader(Writing(tmp_path), batch_size=None, num_workers=1, multiprocessing_context="fork"))
