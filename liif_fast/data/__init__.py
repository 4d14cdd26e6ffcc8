"""Photographs as training and test items: folders of images, wrappers that cut, shrink and sample them, loaders.

Names, arguments and semantics are those of the original's YAML files; what is ours is optional and off by default.
pictures.py -> folders.py -> wrappers.py -> loader.py; with `loader: device`, resize.py -> device.py instead of workers.
Images stay 8-bit in memory. Every random decision about an item comes from its number and the seed.
"""

from liif_fast.data.folders import ImageFolder, PairedImageFolders
from liif_fast.data.loader import Loader, make_loader
from liif_fast.data.pictures import (
    ENERGY_BLOCK,
    Item,
    gradient_energy,
    list_images,
    read_pixels,
    read_rgb,
    resize_bicubic,
    shrink_whole,
    to_tensor,
)
from liif_fast.data.registry import build, dataset_class, make_dataset, register, registered
from liif_fast.data.wrappers import Crop, SRImplicitDownsampled, SRImplicitPaired, SRImplicitUniformVaried

__all__ = [
    "ENERGY_BLOCK",
    "Crop",
    "ImageFolder",
    "Item",
    "Loader",
    "PairedImageFolders",
    "SRImplicitDownsampled",
    "SRImplicitPaired",
    "SRImplicitUniformVaried",
    "build",
    "dataset_class",
    "gradient_energy",
    "list_images",
    "make_dataset",
    "make_loader",
    "read_pixels",
    "read_rgb",
    "register",
    "registered",
    "resize_bicubic",
    "shrink_whole",
    "to_tensor",
]
