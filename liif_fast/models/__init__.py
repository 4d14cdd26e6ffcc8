"""LIIF and MetaSR as PyTorch modules, their encoders, and the checkpoints they are read from."""

from liif_fast.models.liif import LIIF, MLP, MetaSR, default_data_norm, linear_layers
from liif_fast.models.registry import make_model, register

__all__ = ["LIIF", "MLP", "MetaSR", "default_data_norm", "linear_layers", "make_model", "register"]
