"""Photographs as training and test items: folders of images, wrappers that crop, shrink and sample them, loaders.

Names, arguments and semantics are those of the original's YAML files; additional arguments are off by default.
Reading order: pictures.py, arrays.py, folders.py, wrappers.py, numbering.py, loader.py. Images keep their files' dtype
in memory. Every random decision about an item depends only on the item's number and on the seed.
"""

from liif_fast.data.arrays import read_array
from liif_fast.data.errors import explaining_killed_workers, naming
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
from liif_fast.data.wrappers import SRImplicitDownsampled, SRImplicitPaired, SRImplicitUniformVaried

__all__ = [
    "ENERGY_BLOCK",
    "ImageFolder",
    "Item",
    "Loader",
    "PairedImageFolders",
    "SRImplicitDownsampled",
    "SRImplicitPaired",
    "SRImplicitUniformVaried",
    "build",
    "dataset_class",
    "explaining_killed_workers",
    "gradient_energy",
    "list_images",
    "make_dataset",
    "make_loader",
    "naming",
    "read_array",
    "read_pixels",
    "read_rgb",
    "register",
    "registered",
    "resize_bicubic",
    "shrink_whole",
    "to_tensor",
]
