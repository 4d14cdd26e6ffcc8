"""A decoded picture, and its conversion from and to Pillow images and numpy arrays."""

from __future__ import annotations

import io
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image, ImageCms

_ROWS_PER_STEP = 256  # samples are converted in chunks of rows, so that no full-size float copy is needed


class ImageError(ValueError):
    """An image or file that cannot be read or written; the message is one sentence for the user."""


@dataclass
class Description:
    """Texts and numbers that a file has besides its pixels.

    Attributes:
        icc_profile: the profile of the color samples.
        exif: tags in TIFF layout; the orientation, if there is one, is 1.
        xmp: the XMP packet.
        photoshop: Photoshop's image resources ("8BIM"...), which hold the IPTC texts.
        comment: a JPEG's comment.
        png_chunks: whole chunks of a PNG: texts, gamma, primaries.
        density: pixels per millimeter, (horizontal, vertical).
    """

    icc_profile: bytes | None = None
    exif: bytes | None = None
    xmp: bytes | None = None
    photoshop: bytes | None = None
    comment: bytes | None = None
    png_chunks: bytes = b""
    density: tuple[float, float] | None = None


@dataclass
class Picture:
    """A decoded picture.

    Attributes:
        color: [H, W, 1] (gray) or [H, W, 3] (RGB); uint8, uint16, or float32 in [0, 1].
        alpha: [H, W] of the same dtype, not premultiplied, or None.
        description: color profile, EXIF, texts, density.
    """

    color: np.ndarray
    alpha: np.ndarray | None = None
    description: Description = field(default_factory=Description)

    @property
    def height(self) -> int:
        return int(self.color.shape[0])

    @property
    def width(self) -> int:
        return int(self.color.shape[1])

    @property
    def channels(self) -> int:
        """Samples per pixel, alpha included."""
        return int(self.color.shape[2]) + (self.alpha is not None)

    @property
    def has_alpha(self) -> bool:
        """Whether there is an alpha channel."""
        return self.alpha is not None

    @property
    def dtype(self) -> np.dtype:
        """The dtype of the samples."""
        return self.color.dtype

    @property
    def bit_depth(self) -> int:
        """8, 16 or 32."""
        return self.color.dtype.itemsize * 8

    @property
    def is_opaque(self) -> bool:
        """Whether there is no alpha channel, or one with only its largest value."""
        return self.alpha is None or bool((self.alpha == largest(self.alpha.dtype)).all())

    def samples(self) -> np.ndarray:
        """[H, W, channels], alpha last."""
        return self.read(0, self.height)

    def read(self, top: int, bottom: int) -> np.ndarray:
        """Rows top..bottom - 1 as [bottom - top, W, channels], alpha last; a picture is `Rows` too."""
        rows = slice(top, bottom)
        return self.color[rows] if self.alpha is None else np.dstack([self.color[rows], self.alpha[rows]])

    @classmethod
    def from_samples(cls, samples: np.ndarray, has_alpha: bool, description: Description | None = None) -> Picture:
        """Split [H, W, channels] into color and alpha."""
        alpha = np.ascontiguousarray(samples[..., -1]) if has_alpha else None
        color = np.ascontiguousarray(samples[..., :-1] if has_alpha else samples)
        return cls(color, alpha, description or Description())


def to_picture(image: Any) -> Picture:
    """A Picture, Pillow image or numpy array as a Picture.

    Raises: TypeError for any other type or dtype, ValueError for an array of another shape, ImageError as `from_pil`.
    """
    if isinstance(image, Picture):
        return image
    if isinstance(image, Image.Image):
        return from_pil(image)
    if not isinstance(image, np.ndarray):
        raise TypeError(f"the image must be a Pillow image, a numpy array or a tensor, not {type(image).__name__}.")
    samples = image[..., None] if image.ndim == 2 else image
    if samples.ndim != 3 or samples.shape[2] not in (1, 2, 3, 4) or 0 in samples.shape:
        raise ValueError(f"an array must be [H, W] or [H, W, C] with C = 1, 2, 3 or 4, not {image.shape}.")
    if samples.dtype.kind == "f":
        samples = unit_range(samples)
    elif samples.dtype.kind != "u" or samples.dtype.itemsize > 2:
        raise TypeError(f"an array must be uint8, uint16 or float, not {image.dtype}: convert it first.")
    samples = samples.astype(samples.dtype.newbyteorder("="), copy=False)
    has_alpha = samples.shape[2] in (2, 4)  # views, because the array may be large
    return Picture(samples[..., : samples.shape[2] - has_alpha], samples[..., -1] if has_alpha else None)


def to_input_type(picture: Picture, image: Any) -> Any:
    """The inverse of `to_picture`: the picture as an object of image's type and dtype."""
    if isinstance(image, Picture):
        return picture
    if isinstance(image, Image.Image):
        result = to_pil(picture)
        # Transparency has become an alpha channel.
        result.info = {key: value for key, value in image.info.items() if key != "transparency"}
        if picture.description.icc_profile is None:
            result.info.pop("icc_profile", None)
        return result
    samples = picture.samples()
    return (samples[..., 0] if image.ndim == 2 else samples).astype(image.dtype, copy=False)


def from_pil(image: Image.Image) -> Picture:
    """Convert a Pillow image of any mode, without its EXIF tags.

    1-bit becomes gray; palettes and other color spaces become RGB; transparency of any kind becomes an alpha channel.
    32-bit integers are read as 16-bit samples, floats as numbers in [0, 1]. The orientation is not applied.

    Raises: ImageError for samples outside those ranges.
    """
    image.load()
    profile = image.info.get("icc_profile") or None
    if image.mode.startswith("I;16"):
        samples = np.asarray(image.convert("I") if image.mode != "I;16" else image).astype(np.uint16)
    elif image.mode == "I":
        wide = np.asarray(image)
        if wide.size and (wide.min() < 0 or wide.max() > 65535):
            raise ImageError(f"A 32-bit integer image must hold 0..65535, but holds {wide.min()}..{wide.max()}.")
        samples = wide.astype(np.uint16)
    elif image.mode == "F":
        samples = unit_range(np.asarray(image))
    else:
        image, profile = _to_plain_mode(image, profile)
        samples = np.asarray(image)
    if samples.ndim == 2:
        samples = samples[..., None]
    has_alpha = samples.shape[2] in (2, 4)
    fitting = fitting_profile(profile, samples.shape[2] - has_alpha)
    return Picture.from_samples(samples, has_alpha, Description(icc_profile=fitting))


def to_pil(picture: Picture) -> Image.Image:
    """The picture as a Pillow image: L, LA, RGB or RGBA of 8 bits, I;16 for 16-bit gray, F for float gray.

    Pillow has no other modes with more bits, so 16-bit and float colors are rounded to 8 bits.
    """
    if picture.channels == 1 and picture.bit_depth > 8:
        return Image.fromarray(picture.color[..., 0])
    color = to_depth(picture.color, np.uint8)
    image = Image.fromarray(color[..., 0] if color.shape[2] == 1 else color)
    if picture.alpha is not None:
        image.putalpha(Image.fromarray(to_depth(picture.alpha, np.uint8)))
    return image


def to_depth(samples: np.ndarray, dtype: Any) -> np.ndarray:
    """Samples [H, W, ...] in another of the three depths: 0 stays 0, and the largest value becomes the largest."""
    dtype = np.dtype(dtype)
    if samples.dtype == dtype:
        return samples
    out = np.empty(samples.shape, dtype)
    factor = largest(dtype) / largest(samples.dtype)
    for top in range(0, samples.shape[0], _ROWS_PER_STEP):
        rows = slice(top, top + _ROWS_PER_STEP)
        scaled = samples[rows].astype(np.float32) * np.float32(factor)
        out[rows] = scaled if dtype.kind == "f" else np.rint(np.clip(scaled, 0, largest(dtype)))
    return out


def unit_range(samples: np.ndarray) -> np.ndarray:
    """Float samples as float32, checked to be in [0, 1]; an excess of up to 1e-3 is clipped.

    Raises: ImageError with the range of the samples.
    """
    if samples.size == 0:
        return samples.astype(np.float32)
    low, high = float(samples.min()), float(samples.max())
    if not (low >= -1e-3 and high <= 1 + 1e-3):  # also true for NaN
        raise ImageError(f"A float image must hold numbers in [0, 1], but holds {low:g}..{high:g}: rescale it first.")
    return np.clip(samples, 0, 1, dtype=np.float32, casting="same_kind")


def fitting_profile(profile: bytes | None, colors: int) -> bytes | None:
    """The profile if it is one for so many color channels, 1 (gray) or 3 (RGB), else None."""
    return profile if profile and profile[16:20] == (b"GRAY" if colors == 1 else b"RGB ") else None


def largest(dtype: np.dtype) -> float:
    """The sample value of white, or of an opaque alpha."""
    return 1.0 if dtype.kind == "f" else float(np.iinfo(dtype).max)


def _to_plain_mode(image: Image.Image, profile: bytes | None) -> tuple[Image.Image, bytes | None]:
    """Convert any 8-bit Pillow image to L, LA, RGB or RGBA."""
    transparent = "transparency" in image.info or image.mode in ("LA", "La", "PA", "RGBA", "RGBa")
    if image.mode in ("1", "L", "LA", "La"):
        if image.mode == "1":
            image = image.convert("L")
        return image.convert("LA" if transparent else "L"), profile
    if profile is not None and image.mode in ("CMYK", "LAB"):
        try:
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            converted = ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
        except (ImageCms.PyCMSError, OSError):
            converted = None  # the profile does not fit the image: convert without it
        if converted is not None:
            return converted, None
    return image.convert("RGBA" if transparent else "RGB"), profile
