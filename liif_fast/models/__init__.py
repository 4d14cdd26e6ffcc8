"""LIIF and MetaSR as PyTorch modules, their encoders, and the checkpoints from which they are loaded."""

from liif_fast.models import encoders  # registers the encoders' names
from liif_fast.models.base import MLP, linear_layers
from liif_fast.models.liif import LIIF
from liif_fast.models.metasr import MetaSR
from liif_fast.models.registry import make_model, register
from liif_fast.utils.normalization import default_data_norm

__all__ = ["LIIF", "MLP", "MetaSR", "default_data_norm", "encoders", "linear_layers", "make_model", "register"]
