"""Enlarge the slices of a NIfTI volume: python examples/nifti.py in.nii.gz out.nii.gz SCALE MODEL LOW HIGH

MODEL has one channel and was trained with data_range [LOW, HIGH]. Each slice of the last axis is enlarged by itself.
"""

import sys

import nibabel
import numpy as np

import liif_fast

source, target, scale, path, low, high = sys.argv[1:]
volume = nibabel.load(source)
slices = np.moveaxis(volume.get_fdata(dtype=np.float32), 2, 0)  # scaled by the header to its unit, such as Hounsfield
model, data_range = liif_fast.load(path), (float(low), float(high))
large = np.stack(
    [liif_fast.upscale(each, scale=float(scale), model=model, data_range=data_range) for each in slices], -1
)
step = [old / new for old, new in zip(volume.shape[:3], large.shape)]  # of a new voxel, in old ones
affine = volume.affine @ np.diag([*step, 1])
affine[:3, 3] += volume.affine[:3, :3] @ [(each - 1) / 2 for each in step]  # the border stays, the first center moves
nibabel.save(nibabel.Nifti1Image(large, affine), target)
