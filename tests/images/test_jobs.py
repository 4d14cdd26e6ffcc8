"""`upscale_file`: files in and out row by row. A stand-in for the model repeats pixels: every value is known."""

import os
import struct

import numpy as np
import pytest
import tifffile
from PIL import Image, PngImagePlugin

from liif_fast.images import files, reading, upscaling
from liif_fast.images.headers import png_chunk
from liif_fast.images.jobs import upscale_file
from liif_fast.images.picture import Description, ImageError, Picture
from tests.images.test_image import SRGB, H, W, exif_of, picture, samples

XMP = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="%d"/></x:xmpmeta>'
PHOTOSHOP = b"8BIM\x04\x04\0\0\0\0\0\x0e\x1c\x02\x05\0\x05Title\x1c\x02\x19\0\0"
EXIF = {0x010F: "Maker", 0x4746: 5, 0x9C9B: "Title".encode("utf-16le"), 0x8769: {0x9003: "2024:01:02 03:04:05"}}


def nearest(source, write, size, *, progress=None, **_):
    """Rows of the result, each the nearest one of the source, in bands whose source rows overlap."""
    rows, columns = (np.arange(n) * m // n for n, m in zip(size, (source.height, source.width), strict=True))
    for top in range(0, size[0], 7):
        used = rows[top : top + 7]
        first = max(0, used[0] - 3)
        band = source.read(first, min(source.height, used[-1] + 4))
        write(band[used - first][:, columns])
        if progress:
            progress(top, size[0])


@pytest.fixture(autouse=True)
def _nearest(monkeypatch):
    monkeypatch.setattr(upscaling, "upscale_rows", nearest, raising=False)


@pytest.mark.parametrize("target", [".png", ".tif"])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_values(tmp_path, channels, dtype, target):
    source, out = tmp_path / "a.tif", tmp_path / f"b{target}"
    files.write(picture(channels, dtype), source)
    seen = []
    assert upscale_file(source, out, scale=2, started=seen.append) == ((H, W), (2 * H, 2 * W))
    assert seen == [(2 * H, 2 * W)]
    expected = files.to_depth(
        samples(channels, dtype), np.uint16 if dtype == np.float32 and target == ".png" else dtype
    )
    np.testing.assert_array_equal(files.read(out).samples(), expected.repeat(2, 0).repeat(2, 1))
    assert sorted(os.listdir(tmp_path)) == ["a.tif", out.name]


@pytest.mark.parametrize(("size", "result"), [((46, None), (46, 74)), ((None, 37), (23, 37)), ((5, 9), (5, 9))])
def test_a_side_follows_the_other(tmp_path, size, result):
    files.write(picture(3, np.uint8), tmp_path / "a.png")
    assert upscale_file(tmp_path / "a.png", tmp_path / "b.png", size=size).output_size == result


def described(path):
    """A picture file with every description that its format holds, by Pillow and tifffile."""
    image, exif = Image.fromarray(samples(3, np.uint8)), exif_of({**EXIF, 0x0112: 3})
    if path.suffix == ".png":
        texts = PngImagePlugin.PngInfo()
        texts.add_text("parameters", "a bird, steps 20")
        texts.add_itxt("Title", "Vögel", lang="de")
        texts.add_itxt("XML:com.adobe.xmp", (XMP % 3).decode())
        texts.add(b"gAMA", (50000).to_bytes(4, "big"))
        texts.add(b"cICP", bytes([12, 13, 0, 1]))
        image.save(path, pnginfo=texts, exif=exif, dpi=(300, 150), icc_profile=SRGB)
    elif path.suffix == ".tif":
        tags = [(0x010F, 2, 0, "Maker", True), (0x4746, 3, 1, 5, True), (34377, 1, len(PHOTOSHOP), PHOTOSHOP, True)]
        tags += [(274, 3, 1, 3, True), (0x9C9B, 1, 10, "Title".encode("utf-16le"), True), (700, 1, 86, XMP % 3, True)]
        options = {"resolution": (300, 150), "resolutionunit": "inch", "iccprofile": SRGB, "extratags": tags}
        tifffile.imwrite(path, samples(3, np.uint16), photometric="rgb", metadata=None, software=False, **options)
    else:
        kept = {"exif": exif, "xmp": XMP % 3, "icc_profile": SRGB}
        image.save(path, quality=95, comment=b"a comment", dpi=(300, 150), **kept)
        if path.suffix == ".jpg":
            data, block = path.read_bytes(), b"Photoshop 3.0\0" + PHOTOSHOP
            path.write_bytes(data[:20] + b"\xff\xed" + (len(block) + 2).to_bytes(2, "big") + block + data[20:])


@pytest.mark.filterwarnings("ignore:.*has no place for")
@pytest.mark.parametrize("target", [".png", ".jpg", ".webp", ".tif"])
@pytest.mark.parametrize("source", [".png", ".jpg", ".webp", ".tif"])
def test_descriptions_survive(tmp_path, source, target):
    path, out = tmp_path / f"a{source}", tmp_path / f"b{target}"
    described(path)
    upscale_file(path, out, scale=2)
    with Image.open(out) as image:
        exif, info = image.getexif(), image.info
        assert exif[0x010F] == "Maker"
        assert exif[0x4746] == 5
        assert bytes(exif[0x9C9B]) == "Title".encode("utf-16le")
        assert exif.get(0x0112, 1) == 1
        if source != ".tif":
            assert exif.get_ifd(0x8769)[0x9003] == "2024:01:02 03:04:05"
        if target != ".webp" and source != ".webp":
            assert info["dpi"] == pytest.approx((300, 150), abs=0.02)
        assert info["icc_profile"] == SRGB
    about = files.read(out).description
    assert about.xmp == XMP % 1
    if source in (".jpg", ".tif") and target in (".jpg", ".tif"):
        assert about.photoshop == PHOTOSHOP
    if source == ".jpg" and target in (".jpg", ".png"):
        assert info["comment" if target == ".jpg" else "Comment"] in (b"a comment", "a comment")
    if source == target == ".png":
        assert (info["parameters"], info["Title"], info["Title"].lang) == ("a bird, steps 20", "Vögel", "de")
        data = out.read_bytes()
        assert png_chunk(b"gAMA", (50000).to_bytes(4, "big")) in data and png_chunk(b"cICP", b"\x0c\x0d\0\1") in data
        assert data.index(b"gAMA") < data.index(b"IDAT")
    expected = picture(3, np.uint8).color[::-1, ::-1].repeat(2, 0).repeat(2, 1)
    read = files.to_depth(files.read(out).color, np.uint8).astype(int)
    assert np.abs(read - expected).max() <= (1 if {source, target} <= {".png", ".tif"} else 12)


def test_what_a_format_cannot_hold_is_said_once(tmp_path):
    described(tmp_path / "a.png")
    with pytest.warns(
        UserWarning, match=r"b\.jpg: JPEG has no place for PNG texts and gamma and primaries of the"
    ) as all:
        upscale_file(tmp_path / "a.png", tmp_path / "b.jpg", scale=1)
    assert len(all) == 1


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".tif"])
def test_an_unknown_density_stays_unknown(tmp_path, suffix):
    Image.fromarray(samples(3, np.uint8)).save(tmp_path / f"a{suffix}")
    upscale_file(tmp_path / f"a{suffix}", tmp_path / f"b{suffix}", scale=1)
    with Image.open(tmp_path / f"b{suffix}") as image:
        assert "dpi" not in image.info or suffix == ".tif"
        assert not {282, 283, 296} & set(dict(getattr(image, "tag_v2", {})))


def test_a_thumbnail_in_the_exif_is_dropped(tmp_path):
    exif = Image.Exif()
    exif.load(exif_of(EXIF))
    block = exif.tobytes()[6:]
    thumbnail, end = b"\xff\xd8thumbnail\xff\xd9", len(block)
    entries = ((0x0201, end + 30), (0x0202, len(thumbnail)))
    directory = (2).to_bytes(2, "big") + b"".join(
        tag.to_bytes(2, "big") + b"\0\4\0\0\0\1" + value.to_bytes(4, "big") for tag, value in entries
    )
    count = int.from_bytes(block[8:10], "big")
    block = (
        block[: 10 + 12 * count] + end.to_bytes(4, "big") + block[14 + 12 * count :] + directory + b"\0" * 4 + thumbnail
    )
    Image.fromarray(samples(3, np.uint8)).save(tmp_path / "a.jpg", exif=b"Exif\0\0" + block)
    assert b"thumbnail" in (tmp_path / "a.jpg").read_bytes()
    upscale_file(tmp_path / "a.jpg", tmp_path / "b.jpg", scale=1)
    assert b"thumbnail" not in (tmp_path / "b.jpg").read_bytes()
    with Image.open(tmp_path / "b.jpg") as image:
        assert image.getexif()[0x4746] == 5


@pytest.mark.parametrize("orientation", range(2, 9))
def test_a_large_turned_picture_goes_through_a_file(tmp_path, monkeypatch, orientation):
    monkeypatch.setattr(reading, "_LARGEST_BUFFER", 0)
    Image.fromarray(samples(3, np.uint8)).save(tmp_path / "a.png", exif=exif_of({0x0112: orientation}))
    upscale_file(tmp_path / "a.png", tmp_path / "b.png", scale=1)
    np.testing.assert_array_equal(files.read(tmp_path / "b.png").color, files.read(tmp_path / "a.png").color)
    assert sorted(os.listdir(tmp_path)) == ["a.png", "b.png"]


def test_reduced_pages_are_passed_over(tmp_path):
    rgb, path = samples(3, np.uint16), tmp_path / "a.tif"
    with tifffile.TiffWriter(path) as tiff:
        tiff.write(rgb[::4, ::4].copy(), photometric="rgb", subfiletype=1)
        tiff.write(rgb, photometric="rgb", subfiletype=0)
    np.testing.assert_array_equal(files.read(path).color, rgb)
    with tifffile.TiffWriter(path) as tiff:
        tiff.write(rgb[::4, ::4].copy(), photometric="rgb", subfiletype=1, subifds=1)
        tiff.write(rgb, photometric="rgb", subfiletype=0)
    np.testing.assert_array_equal(files.read(path).color, rgb)


def test_raw_files_and_drawings_are_refused(tmp_path):
    with tifffile.TiffWriter(tmp_path / "camera.tif") as tiff:
        tiff.write(samples(3, np.uint8), photometric="rgb", subifds=1, subfiletype=1)
        tiff.write(samples(1, np.uint16)[..., 0], photometric=32803, subfiletype=0)
    dng = [(50706, 1, 4, bytes([1, 4, 0, 0]), True)]
    tifffile.imwrite(tmp_path / "dng.tif", samples(3, np.uint8), photometric="rgb", extratags=dng)
    (tmp_path / "a.nef").write_bytes((tmp_path / "dng.tif").read_bytes())
    (tmp_path / "b.png").write_bytes(b"\0\0\0\x18ftypcrx \0\0\0\1crx isom")
    for name in ("camera.tif", "dng.tif", "a.nef", "b.png"):
        with pytest.raises(ImageError, match=f"{name} is a camera's raw file: develop it first"):
            files.read(tmp_path / name)
    drawings = (b"%PDF-1.4", b"%!PS-Adobe-3.0 EPSF", b"\xc5\xd0\xd3\xc6", b"<svg/>", b'\n<?xml version="1.0"?><svg>')
    for data in drawings:
        (tmp_path / "c.png").write_bytes(data + bytes(100))
        with pytest.raises(ImageError, match=r"c\.png is a PDF, EPS or SVG drawing"):
            files.read(tmp_path / "c.png")


def test_a_phone_jpeg_with_previews_is_one_picture(tmp_path, recwarn):
    first = Image.fromarray(samples(3, np.uint8))
    first.save(tmp_path / "a.jpg", format="MPO", save_all=True, append_images=[first.resize((8, 8))])
    assert files.read(tmp_path / "a.jpg").color.shape == (H, W, 3)
    assert not [warning for warning in recwarn if "frames" in str(warning.message)]


def test_heic_is_read_or_refused(tmp_path):
    path = tmp_path / "a.heic"
    try:
        import pillow_heif
    except ImportError:
        path.write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(50))
        with pytest.raises(ImageError, match=r"a\.heic is a HEIC picture, which needs .*: pip install pillow-heif"):
            files.read(path)
        return
    pillow_heif.from_pillow(Image.fromarray(samples(3, np.uint8))).save(path, quality=-1)
    assert np.abs(files.read(path).color.astype(int) - samples(3, np.uint8)).max() < 8


@pytest.mark.parametrize("suffix", [".bmp", ".ppm", ".tga", ".jp2", ".ico", ".gif", ".avif"])
def test_other_formats_are_read(tmp_path, suffix):
    image = Image.fromarray(samples(3, np.uint8)[:16, :16])
    image.save(tmp_path / f"a{suffix}", **({"quality": 100} if suffix == ".avif" else {}))
    read = files.read(tmp_path / f"a{suffix}").color
    assert np.abs(read.astype(int) - samples(3, np.uint8)[:16, :16]).max() <= (8 if suffix in (".gif", ".avif") else 0)


def test_a_description_can_be_written_with_any_picture(tmp_path):
    about = Description(exif=b"broken", xmp=b"<x/>", png_chunks=png_chunk(b"tEXt", b"a\0b"), density=(1e9, 1e-9))
    for suffix in (".png", ".jpg", ".tif", ".webp"):
        with pytest.warns(UserWarning) if suffix != ".png" else pytest.MonkeyPatch.context():
            files.write(Picture(samples(3, np.uint8), None, about), tmp_path / f"a{suffix}")
        assert files.read(tmp_path / f"a{suffix}").description.xmp == b"<x/>"


@pytest.mark.timeout(60)
def test_tags_that_share_their_bytes_cost_little(tmp_path):
    """60,000 tags of the EXIF directory that each claim the same 10 MB, and overlapping pages without end."""
    tifffile.imwrite(tmp_path / "a.tif", samples(3, np.uint8), photometric="rgb", extratags=[(0x8768, 4, 1, 0, True)])
    data = bytearray((tmp_path / "a.tif").read_bytes())
    place = data.index(struct.pack("<HHI", 0x8768, 4, 1))
    data[place : place + 12] = struct.pack("<HHII", 0x8769, 4, 1, len(data))
    entry = b"".join(struct.pack("<HHII", tag, 7, 10_000_000, 8) for tag in range(60_000))
    (tmp_path / "a.tif").write_bytes(data + struct.pack("<H", 60_000) + entry + bytes(10_000_000))
    assert files.read(tmp_path / "a.tif").color.shape == (H, W, 3)
    page = struct.pack("<H", 5000) + b"\0\1\3\0\1\0\0\0\1\0\0\0" * 5000
    pages = b"".join(page + (8 + (i + 1) * (len(page) + 4)).to_bytes(4, "little") for i in range(60))
    (tmp_path / "b.tif").write_bytes(b"II*\0\x08\0\0\0" + pages)
    with pytest.raises(ImageError, match="it has more than 262144 tags"):
        files.read(tmp_path / "b.tif")
