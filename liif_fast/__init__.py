"""liif_fast: fused kernels for LIIF, arbitrary-scale super-resolution, behind a thin PyTorch model."""

__version__ = "0.1.0"

from . import ops

__all__ = ["__version__", "ops"]
