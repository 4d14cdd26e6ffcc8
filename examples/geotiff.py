"""Enlarge a GeoTIFF of any number of bands: python examples/geotiff.py in.tif out.tif SCALE MODEL LOW HIGH

MODEL was trained with data_range [LOW, HIGH]. The result keeps the place on the map, and nodata where there is none.
"""

import sys

import numpy as np
import rasterio

import liif_fast

source, target, scale, model, low, high = sys.argv[1:]
with rasterio.open(source) as file:
    bands, profile, transform = file.read(masked=True), file.profile, file.transform
values = np.ma.filled(bands.astype(np.float32), np.nan).transpose(1, 2, 0)  # [rows, columns, bands], NaN: no value
large = liif_fast.upscale(values, scale=float(scale), model=model, data_range=(float(low), float(high)))
pixel = transform.scale(values.shape[1] / large.shape[1], values.shape[0] / large.shape[0])
profile.update(height=large.shape[0], width=large.shape[1], transform=transform * pixel, dtype="float32")
nodata = profile["nodata"]
with rasterio.open(target, "w", **profile) as file:
    file.write((large if nodata is None else np.nan_to_num(large, nan=nodata)).transpose(2, 0, 1))
