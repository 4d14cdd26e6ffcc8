"""Picture files: read as a viewer shows them, written so that they can be read back, refused with a reason."""

import os
import zlib
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image, ImageCms, ImageOps, TiffImagePlugin

from liif_fast.images import files, writing
from liif_fast.images.headers import PNG_SIGNATURE, png_chunk
from liif_fast.images.picture import Description, ImageError, Picture, from_pil, to_depth, to_pil
from liif_fast.utils import memory

H, W = 23, 37
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
GRAY_PROFILE = SRGB[:16] + b"GRAY" + SRGB[20:]  # only the color space in its header is read


def samples(channels, dtype, seed=0):
    """A smooth ramp with noise, so that lossy formats stay close and every row and column differs."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[0:H, 0:W]
    base = (rows[..., None] / H * 0.6 + columns[..., None] / W * 0.3) + rng.random((1, 1, channels)) * 0.1
    top = 1.0 if np.dtype(dtype).kind == "f" else np.iinfo(dtype).max
    return (base * top).astype(dtype)


def picture(channels, dtype, **kept):
    values = samples(channels, dtype)
    alpha = np.ascontiguousarray(values[..., -1]) if channels in (2, 4) else None
    return Picture(np.ascontiguousarray(values[..., : 3 if channels > 2 else 1]), alpha, Description(**kept))


def exif_of(tags):
    exif = Image.Exif()
    for tag, value in tags.items():
        exif[tag] = value
    return exif.tobytes()


def png_of(raw, width, height, color_type, interlaced=0, extra=()):
    header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([16, color_type, 0, 0, interlaced])
    chunks = ((b"IHDR", header), *extra, (b"IDAT", zlib.compress(raw)), (b"IEND", b""))
    return PNG_SIGNATURE + b"".join(png_chunk(name, data) for name, data in chunks)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize("suffix", [".png", ".tif", ".TIFF"])
def test_lossless_formats_return_what_was_written(tmp_path, suffix, channels, dtype):
    original = picture(channels, dtype, icc_profile=SRGB if channels > 2 else GRAY_PROFILE)
    path = tmp_path / f"a{suffix}"
    files.write(original, path)
    back = files.read(path)
    stored = np.uint16 if suffix == ".png" and dtype == np.float32 else dtype
    np.testing.assert_array_equal(back.color, to_depth(original.color, stored))
    if channels in (2, 4):
        np.testing.assert_array_equal(back.alpha, to_depth(original.alpha, stored))
    else:
        assert back.alpha is None
    assert back.description == original.description
    assert (back.height, back.width, back.channels) == (H, W, channels)
    assert os.listdir(tmp_path) == [path.name]


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
@pytest.mark.parametrize(
    ("suffix", "channels", "quality"),
    [(".jpg", 1, None), (".JPEG", 3, 90), (".webp", 3, None), (".webp", 4, 90), (".webp", 1, 100), (".webp", 2, 100)],
)
def test_lossy_formats_stay_close(tmp_path, suffix, channels, quality, dtype):
    original = picture(channels, dtype, icc_profile=SRGB if channels > 2 else None)
    path = tmp_path / f"a{suffix}"
    files.write(original, path, quality=quality)
    back = files.read(path)
    expected = to_depth(original.color, np.uint8).astype(int)
    assert back.color.shape[2] == (1 if suffix == ".jpg" else 3)
    assert np.abs(back.color.astype(int) - expected).max() <= (0 if quality == 100 else 12)
    if channels in (2, 4):
        np.testing.assert_array_equal(back.alpha, to_depth(original.alpha, np.uint8))
    assert back.description == original.description


def test_quality_makes_larger_files(tmp_path):
    noise = Picture(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    for suffix in (".jpg", ".webp"):
        sizes = []
        for quality in (10, 60, 95):
            files.write(noise, tmp_path / f"a{suffix}", quality=quality)
            sizes.append((tmp_path / f"a{suffix}").stat().st_size)
        assert sizes == sorted(sizes)
        assert sizes[0] < sizes[-1] / 2


@pytest.mark.parametrize(
    ("suffix", "orientation"), [*((".png", number) for number in range(1, 9)), (".jpg", 6), (".webp", 5), (".tif", 8)]
)
def test_exif_orientation_is_applied_and_dropped(tmp_path, suffix, orientation):
    plain = Image.fromarray(samples(3, np.uint8))
    exif = exif_of({0x0112: orientation, 0x010F: "Camera", 0x8769: {0x9003: "2024:01:02 03:04:05", 0xA002: W}})
    options = {"lossless": True} if suffix == ".webp" else {}
    plain.save(tmp_path / f"a{suffix}", exif=exif, **options)
    read = files.read(tmp_path / f"a{suffix}")
    with Image.open(tmp_path / f"a{suffix}") as stored:
        expected = np.asarray(ImageOps.exif_transpose(stored))
    np.testing.assert_array_equal(read.color, expected)
    assert read.color.shape[:2] == ((W, H) if orientation > 4 else (H, W))

    for target in ("b.jpg", "b.png", "b.webp", "b.tif"):
        files.write(read, tmp_path / target)
        with Image.open(tmp_path / target) as written:
            kept = written.getexif()
            assert kept.get(0x0112, 1) == 1
            assert kept[0x010F] == "Camera"
            assert kept.get_ifd(0x8769)[0x9003] == "2024:01:02 03:04:05"
            assert kept.get_ifd(0x8769)[0xA002] == read.width


def test_orientation_of_deep_files(tmp_path):
    values = samples(3, np.uint16)
    raw = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    turned = (b"eXIf", exif_of({0x0112: 6}).removeprefix(b"Exif\0\0"))
    (tmp_path / "a.png").write_bytes(png_of(raw, W, H, 2, extra=[turned]))
    tifffile.imwrite(tmp_path / "a.tif", values, photometric="rgb", extratags=[(274, 3, 1, 6, True)])
    for name in ("a.png", "a.tif"):
        np.testing.assert_array_equal(files.read(tmp_path / name).color, np.rot90(values, -1))


def saved(tmp_path, pil, suffix=".png", **options):
    pil.save(tmp_path / f"a{suffix}", **options)
    return files.read(tmp_path / f"a{suffix}")


def test_palette_images_become_rgb(tmp_path):
    rgb = Image.fromarray(samples(3, np.uint8))
    palette = rgb.quantize(16)
    read = saved(tmp_path, palette)
    np.testing.assert_array_equal(read.color, np.asarray(palette.convert("RGB")))
    assert read.alpha is None
    read = saved(tmp_path, palette, transparency=3)
    np.testing.assert_array_equal(read.alpha == 0, np.asarray(palette) == 3)
    assert set(np.unique(read.alpha)) <= {0, 255}
    assert saved(tmp_path, palette, ".gif").color.shape == (H, W, 3)


def test_one_bit_and_transparent_colors(tmp_path):
    black_white = np.asarray(samples(1, np.uint8)[..., 0] > 100)
    read = saved(tmp_path, Image.fromarray(black_white))
    np.testing.assert_array_equal(read.color[..., 0], black_white * np.uint8(255))
    gray = samples(1, np.uint8)[..., 0]
    read = saved(tmp_path, Image.fromarray(gray), transparency=int(gray[3, 4]))
    np.testing.assert_array_equal(read.alpha == 0, gray == gray[3, 4])
    rgb = samples(3, np.uint8)
    read = saved(tmp_path, Image.fromarray(rgb), transparency=tuple(int(v) for v in rgb[3, 4]))
    np.testing.assert_array_equal(read.alpha == 0, (rgb == rgb[3, 4]).all(-1))


def test_cmyk_uses_its_profile_and_drops_it(tmp_path):
    inks = [(0, 0, 0, 0), (255, 0, 0, 0), (0, 255, 0, 0), (0, 0, 255, 0), (0, 0, 0, 255)]
    seen = [(255, 255, 255), (0, 160, 225), (225, 0, 120), (255, 240, 0), (35, 30, 30)]  # coated paper
    cmyk = Image.frombytes("CMYK", (5, 1), bytes(sum(inks, ())))
    for suffix in (".tif", ".jpg"):
        read = saved(tmp_path, cmyk.resize((40, 8), Image.Resampling.NEAREST), suffix, quality=95)
        assert np.abs(read.color[4, 4::8].astype(int) - seen).max() < 30, read.color[4, 4::8]
    unusable = SRGB[:16] + b"CMYK" + SRGB[20:]
    read = saved(tmp_path, cmyk, ".tif", icc_profile=unusable)
    assert read.color.shape == (1, 5, 3)
    assert read.description.icc_profile is None


def test_lab_profile_is_converted(tmp_path):
    lab_profile = ImageCms.createProfile("LAB")
    rgb = Image.fromarray(samples(3, np.uint8))
    lab = ImageCms.profileToProfile(rgb, ImageCms.createProfile("sRGB"), lab_profile, outputMode="LAB")
    read = saved(tmp_path, lab, ".tif", icc_profile=ImageCms.ImageCmsProfile(lab_profile).tobytes())
    assert np.abs(read.color.astype(int) - np.asarray(rgb)).max() <= 8
    assert read.description.icc_profile is None


def test_profile_of_another_color_space_is_dropped(tmp_path):
    assert (
        saved(tmp_path, Image.fromarray(samples(1, np.uint8)[..., 0]), ".jpg", icc_profile=SRGB).description.icc_profile
        is None
    )
    assert (
        saved(tmp_path, Image.fromarray(samples(3, np.uint8)), ".jpg", icc_profile=SRGB).description.icc_profile == SRGB
    )


def test_pillow_modes_round_trip():
    for channels, mode in ((1, "L"), (2, "LA"), (3, "RGB"), (4, "RGBA")):
        pil = to_pil(picture(channels, np.uint8))
        assert pil.mode == mode
        np.testing.assert_array_equal(np.asarray(pil).reshape(H, W, channels), samples(channels, np.uint8))
    deep = Image.fromarray(samples(1, np.uint16)[..., 0])
    assert to_pil(from_pil(deep)).mode == deep.mode == "I;16"
    wide = deep.convert("I")
    np.testing.assert_array_equal(from_pil(wide).color, samples(1, np.uint16))
    floating = Image.fromarray(samples(1, np.float32)[..., 0])
    assert to_pil(from_pil(floating)).mode == "F"
    premultiplied = to_pil(picture(4, np.uint8)).convert("RGBa")
    assert np.abs(from_pil(premultiplied).alpha.astype(int) - samples(4, np.uint8)[..., 3]).max() == 0


def test_pillow_samples_out_of_range_are_named():
    with pytest.raises(ImageError, match=r"0\.\.65535, but holds 0\.\.70000"):
        from_pil(Image.fromarray(np.array([[0, 70000]], np.int32)))
    with pytest.raises(ImageError, match=r"numbers in \[0, 1\], but holds 0\.\.255"):
        from_pil(Image.fromarray(np.array([[0, 255]], np.float32)))
    with pytest.raises(ImageError, match="nan"):
        from_pil(Image.fromarray(np.array([[0, np.nan]], np.float32)))


def test_depth_conversions():
    every8, every16 = np.arange(256, dtype=np.uint8)[:, None], np.arange(65536, dtype=np.uint16)[:, None]
    np.testing.assert_array_equal(to_depth(every8, np.uint16), every8.astype(np.uint16) * 257)
    np.testing.assert_array_equal(to_depth(every16, np.uint8)[:, 0], (every16[:, 0].astype(int) + 128) // 257)
    for every in (every8, every16):
        np.testing.assert_array_equal(to_depth(to_depth(every, np.float32), every.dtype), every)
    assert to_depth(np.array([[-3.0, 7.0]], np.float32), np.uint16).tolist() == [[0, 65535]]


def broken_files(folder: Path) -> list[Path]:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    for suffix in (".png", ".jpg", ".webp", ".tif"):
        noise.save(folder / "whole", format=Image.registered_extensions()[suffix])
        data = (folder / "whole").read_bytes()
        (folder / f"cut{suffix}").write_bytes(data[: len(data) // 2])
    files.write(picture(3, np.uint16), folder / "whole.png")
    data = bytearray((folder / "whole.png").read_bytes())
    (folder / "cut16.png").write_bytes(data[: len(data) // 2])
    data[len(data) // 2] ^= 1
    (folder / "flipped16.png").write_bytes(data)
    (folder / "empty.png").write_bytes(b"")
    (folder / "text.png").write_text("not an image")
    (folder / "head.tif").write_bytes(b"II*\0\xff\xff\xff\xff")
    (folder / "nopixels.png").write_bytes(png_of(b"", 9, 9, 2))
    (folder / "unknownfilter.png").write_bytes(png_of(bytes([9] + [0] * 6), 1, 1, 2))
    return [path for path in folder.iterdir() if path.stem != "whole"]


def test_broken_files_get_one_sentence(tmp_path):
    paths = broken_files(tmp_path)
    assert len(paths) == 11
    for path in paths:
        with pytest.raises(ImageError) as caught:
            files.read(path)
        message = str(caught.value)
        assert str(path) in message and "\n" not in message and message.endswith("."), message


def test_missing_files_and_folders(tmp_path):
    with pytest.raises(ImageError, match=r"nothere\.png does not exist"):
        files.read(tmp_path / "nothere.png")
    with pytest.raises(ImageError, match="is a folder, not an image file"):
        files.read(tmp_path)


def test_a_huge_announced_picture_is_refused_before_decoding(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "available", lambda: 1_000_000)
    (tmp_path / "huge.png").write_bytes(png_of(bytes(300 * 2401), 400, 300, 2))
    Image.new("RGB", (400, 300)).save(tmp_path / "huge.jpg")
    tifffile.imwrite(tmp_path / "huge.tif", np.zeros((300, 400, 3), np.uint16), photometric="rgb")
    needs = r"400x300 pixels\) needs about {} MB of memory, but 1 MB are"
    for suffix, needed in (("png", r"2\.88"), ("jpg", r"1\.44"), ("tif", r"2\.88")):
        with pytest.raises(memory.NotEnoughMemory, match=needs.format(needed)):
            files.read(tmp_path / f"huge.{suffix}")


def test_targets_that_cannot_be_written(tmp_path):
    small = picture(3, np.uint8)
    (tmp_path / "b.png").mkdir()
    for name, message in (
        ("a.xyz", r"unknown extension '\.xyz': name the output with one of \.jpeg, \.jpg, \.png"),
        ("a", "unknown extension ''"),
        ("nowhere/a.png", r"the folder .*nowhere does not exist"),
        ("b.png", "it is a folder"),
    ):
        with pytest.raises(ImageError, match=message):
            files.write(small, tmp_path / name)
    for quality in (0, 101, -5):
        with pytest.raises(ImageError, match=f"quality is {quality}, but must be between 1 and 100"):
            files.check_target(tmp_path / "a.jpg", small, quality=quality)
    with pytest.raises(ImageError, match="WebP holds at most 16383 pixels a side, not 10x20000"):
        files.check_target(tmp_path / "a.webp", small, (20000, 10))
    with pytest.raises(ImageError, match="JPEG holds at most 65500"):
        files.check_target(tmp_path / "a.jpg", small, (10, 70000))
    files.check_target(tmp_path / "a.png", small, (20000, 70000))


def test_jpeg_refuses_alpha_unless_opaque(tmp_path):
    with pytest.raises(ImageError, match="JPEG has no alpha channel; use PNG, WebP or TIFF"):
        files.write(picture(4, np.uint8), tmp_path / "a.jpg")
    for dtype, opaque in ((np.uint8, 255), (np.uint16, 65535), (np.float32, 1)):
        whole = picture(4, dtype)
        whole.alpha[:] = opaque
        files.write(whole, tmp_path / "a.jpg")
        assert files.read(tmp_path / "a.jpg").alpha is None


def test_unwritable_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write everywhere, so permissions cannot show it
    with pytest.raises(ImageError, match="no permission to write in the folder"):
        files.check_target(tmp_path / "a.png", picture(3, np.uint8))


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, MemoryError, OSError])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, interruption):
    path = tmp_path / "a.png"
    path.write_bytes(b"old")

    def fail(saver, data):
        saver._file.write(b"half")
        raise interruption("no space left")

    monkeypatch.setattr(writing._Saver, "_edited", fail)
    with pytest.raises(ImageError if interruption is OSError else interruption, match="no space left"):
        files.write(picture(3, np.uint8), path)
    assert os.listdir(tmp_path) == ["a.png"]
    assert path.read_bytes() == b"old"


def test_exif_that_cannot_be_stored_is_left_out(tmp_path):
    read = saved(tmp_path, Image.fromarray(samples(3, np.uint8)), exif=exif_of({0x010E: "x" * 70000}))
    with pytest.warns(UserWarning, match="JPEG has no place for EXIF tags of the input"):
        files.write(read, tmp_path / "b.jpg")
    assert files.read(tmp_path / "b.jpg").description.exif is None
    files.write(read, tmp_path / "b.png")
    assert files.read(tmp_path / "b.png").description.exif == read.description.exif


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".tif"])
def test_texts_beyond_ascii_survive(tmp_path, suffix):
    exif = exif_of({0x013B: "José 写真".encode()})
    files.write(saved(tmp_path, Image.fromarray(samples(3, np.uint8)), exif=exif), tmp_path / f"b{suffix}")
    with Image.open(tmp_path / f"b{suffix}") as written:  # EXIF texts name no encoding: Pillow shows bytes as Latin-1
        assert written.getexif()[0x013B].encode("latin-1").decode() == "José 写真"


def test_structural_tags_of_a_tiff_are_not_kept_as_exif(tmp_path):
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    tags[305] = "painter"
    Image.fromarray(samples(3, np.uint8)).save(tmp_path / "a.tif", tiffinfo=tags)
    kept = Image.Exif()
    kept.load(files.read(tmp_path / "a.tif").description.exif)
    assert dict(kept) == {305: "painter"}
