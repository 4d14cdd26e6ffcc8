"""PNG and TIFF files with 16 bits or floats per sample."""

import io

import numpy as np
import pytest
import tifffile
from PIL import Image

from liif_fast.images import files
from liif_fast.images.picture import ImageError
from tests.images.test_image import SRGB, H, W, picture, png_of, samples


@pytest.mark.parametrize("size", [(1, 1), (3, 2), (8, 8), (13, 21)])
def test_png16_interlaced(tmp_path, size):
    height, width = size
    values = np.random.default_rng(1).integers(0, 65536, (height, width), dtype=np.uint16)
    raw = b""
    passes = ["0088", "0488", "4084", "0244", "2042", "0122", "1021"]  # first row and column, steps
    for y, x, dy, dx in (map(int, each) for each in passes):
        part = values[y::dy, x::dx]
        if part.size:
            raw += b"".join(b"\0" + row.astype(">u2").tobytes() for row in part)
    data = png_of(raw, width, height, 0, interlaced=1)
    (tmp_path / "a.png").write_bytes(data)
    np.testing.assert_array_equal(files.read(tmp_path / "a.png").color[..., 0], values)
    with Image.open(io.BytesIO(data)) as pil:  # Pillow reads gray: it agrees that this is a valid interlaced file
        np.testing.assert_array_equal(np.asarray(pil), values)


def test_png16_transparent_color(tmp_path):
    values = samples(1, np.uint16)
    raw = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    key = int(values[2, 3, 0])
    (tmp_path / "a.png").write_bytes(png_of(raw, W, H, 0, extra=[(b"tRNS", key.to_bytes(2, "big"))]))
    np.testing.assert_array_equal(files.read(tmp_path / "a.png").alpha, np.where(values[..., 0] == key, 0, 65535))


def test_pillow_reads_16_bit_png(tmp_path):
    for channels in (3, 4):
        files.write(picture(channels, np.uint16, icc_profile=SRGB), tmp_path / "a.png")
        with Image.open(tmp_path / "a.png") as pil:
            assert pil.info["icc_profile"] == SRGB
            np.testing.assert_array_equal(np.asarray(pil), samples(channels, np.uint16) >> 8)


def test_tiff_variants(tmp_path):
    rgb = samples(3, np.uint16)
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, np.moveaxis(rgb, -1, 0), photometric="rgb", planarconfig="separate")
    np.testing.assert_array_equal(files.read(path).color, rgb)
    tifffile.imwrite(path, rgb, photometric="rgb", byteorder=">", bigtiff=True, compression="zlib", predictor=True)
    np.testing.assert_array_equal(files.read(path).color, rgb)
    tifffile.imwrite(path, rgb[..., 0], photometric="miniswhite")
    np.testing.assert_array_equal(files.read(path).color[..., 0], 65535 - rgb[..., 0])
    tifffile.imwrite(path, samples(3, np.float16), photometric="rgb")
    np.testing.assert_array_equal(files.read(path).color, samples(3, np.float16).astype(np.float32))
    tifffile.imwrite(path, samples(1, np.float32)[..., 0], photometric="miniswhite")
    np.testing.assert_array_equal(files.read(path).color, 1 - samples(1, np.float32))
    tifffile.imwrite(path, samples(4, np.uint16), photometric="rgb", extrasamples=["unspecified"])
    np.testing.assert_array_equal(files.read(path).samples(), samples(4, np.uint16)[..., :3])
    tifffile.imwrite(path, samples(2, np.uint16), photometric="minisblack", extrasamples=["unassalpha"])
    np.testing.assert_array_equal(files.read(path).samples(), samples(2, np.uint16))
    tifffile.imwrite(path, np.full((4, 4, 4), 0, np.uint16), photometric="separated")
    np.testing.assert_allclose(files.read(path).color, np.full((4, 4, 3), 65535), atol=8)
    four = samples(4, np.float32)
    premultiplied = np.concatenate([four[..., :3] * four[..., 3:], four[..., 3:]], -1)
    tifffile.imwrite(path, premultiplied, photometric="rgb", extrasamples=["assocalpha"])
    visible = four[..., 3] >= 0.01  # libvips makes the color of fainter pixels black
    np.testing.assert_allclose(files.read(path).color[visible], four[..., :3][visible], atol=1e-6)


def test_tiff_kinds_that_are_refused(tmp_path):
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, np.zeros((4, 4), np.int32))
    with pytest.raises(
        ImageError, match=r"a\.tif: its samples are of the kind int, but must have 8 bits, 16 bits or be"
    ):
        files.read(path)
    tifffile.imwrite(path, np.full((4, 4), 3, np.float32))
    with pytest.raises(ImageError, match=r"holds 3\.\.3: rescale it first"):
        files.read(path)


def test_only_the_first_page_is_read(tmp_path):
    first = Image.fromarray(samples(3, np.uint8))
    second = Image.new("RGB", (W, H))
    for suffix in (".tif", ".webp", ".gif"):
        first.save(tmp_path / f"a{suffix}", save_all=True, append_images=[second])
        with pytest.warns(UserWarning, match="has 2 frames or pages; only the first is used"):
            assert files.read(tmp_path / f"a{suffix}").color.mean() > 50


@pytest.mark.parametrize("compression", ["tiff_lzw", "tiff_adobe_deflate", "packbits", "lzma", "zstd"])
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "I;16"])
def test_every_lossless_compression_of_tiff(tmp_path, compression, mode):
    """LZMA and ZSTD, which the wheel of libvips leaves out, by Pillow, which has no 16-bit color."""
    shape = (9, 14, len(mode)) if mode.startswith("RGB") else (9, 14)
    values = np.random.default_rng(0).integers(0, 256, shape).astype(np.uint16 if mode == "I;16" else np.uint8)
    Image.fromarray(values).save(tmp_path / "a.tif", compression=compression)
    assert np.array_equal(files.read(tmp_path / "a.tif").samples().reshape(shape), values)


def test_a_file_of_reduced_pages_only(tmp_path):
    values = samples(3, np.uint8)
    tifffile.imwrite(tmp_path / "a.tif", values, photometric="rgb", subfiletype=1)
    np.testing.assert_array_equal(files.read(tmp_path / "a.tif").color, values)
