"""liif_fast: fused kernels for LIIF, arbitrary-scale super-resolution, and a thin PyTorch model that uses them.

import liif_fast
large = liif_fast.upscale(image, scale=3.7)      # Pillow image, numpy array or tensor in, the same out
model = liif_fast.load("epoch-best.pth")         # the original's, MMagic's or our own checkpoints
rgb = model(inp, coord, cell)                    # the original's interface
liif_fast.patch()                                # or: existing LIIF code, imported before, decodes with the ops
liif_fast.export(model, "model.onnx")            # for programs without PyTorch
out = liif_fast.ops.query(feat, coord, cell, weights, biases)   # the kernels themselves, differentiable
"""

__version__ = "0.1.0"

from liif_fast import ops
from liif_fast.images.upscaling import upscale
from liif_fast.integrations.patching import patch, patched, unpatch
from liif_fast.models import LIIF, MLP, MetaSR
from liif_fast.models.checkpoints import load, save
from liif_fast.models.export import export
from liif_fast.models.registry import make_model, register

__all__ = [
    "LIIF",
    "MLP",
    "MetaSR",
    "__version__",
    "export",
    "load",
    "make_model",
    "ops",
    "patch",
    "patched",
    "register",
    "save",
    "unpatch",
    "upscale",
]
