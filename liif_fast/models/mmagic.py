"""Converts LIIF weights without a spec: MMagic's keys become those of the original, and shapes determine the spec."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from liif_fast.models.encoders import RDN_CONFIGS
from liif_fast.utils.normalization import default_data_norm

_PREFIX = "generator."
_RENAMED = [
    (r"conv_first\.", r"encoder.head.0."),
    (r"body\.(\d+)\.conv1\.", r"encoder.body.\1.body.0."),
    (r"body\.(\d+)\.conv2\.", r"encoder.body.\1.body.2."),
    (r"conv_after_body\.", r"encoder.body.{n_resblocks}."),
    (r"sfe([12])\.", r"encoder.SFENet\1."),
    (r"rdbs\.(\d+)\.layers\.(\d+)\.conv\.", r"encoder.RDBs.\1.convs.\2.conv.0."),
    (r"rdbs\.(\d+)\.lff\.", r"encoder.RDBs.\1.LFF."),
    (r"gff\.([01])\.", r"encoder.GFF.\1."),
    (r"imnet\.layers\.", r"imnet.layers."),
    (r"encoder\.", r"encoder."),  # the original's own keys
]
# data_preprocessor in MMagic's configs: EDSR subtracts the mean color of DIV2K, RDN maps [0, 1] to [-1, 1].
_EDSR_NORM = {"sub": [0.4488, 0.4371, 0.4040], "div": [1.0, 1.0, 1.0]}
_RDN_NORM = {"sub": [0.5, 0.5, 0.5], "div": [0.5, 0.5, 0.5]}


class NotLIIFError(ValueError):
    """A state_dict of neither LIIFEDSRNet nor LIIFRDNNet; the message does not name the file."""


def convert(
    state_dict: Mapping[str, Tensor],
) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, dict[str, list[float]]]]:
    """(spec, weights, data_norm) of a LIIFEDSRNet or LIIFRDNNet, or of the original's LIIF on EDSR or RDN.

    state_dict: with or without the prefix 'generator.', or 'module.' before it. A moving average (generator_ema),
        losses and preprocessors in it are ignored.
    Shapes do not show local_ensemble and the res_scale of EDSR. The first is assumed to be on. The second is assumed to
    be 0.1 for the full-size EDSR (32 blocks of 256 channels) and 1 otherwise, as in the paper.
    Raises NotLIIFError for weights of another network.
    """
    weights = _renamed(state_dict)
    is_original = any(key.startswith("encoder.") for key in state_dict)
    first, layers = _imnet_shapes(weights)
    if "encoder.head.0.weight" in weights:
        encoder_spec, width = _edsr(weights)
        norm = _EDSR_NORM
    elif "encoder.SFENet1.weight" in weights:
        encoder_spec, width = _rdn(weights)
        norm = _RDN_NORM
    else:
        raise NotLIIFError("its state_dict has neither conv_first (EDSR) nor sfe1 (RDN), so it is no LIIF of MMagic")
    flags = {
        (unfold, cell): width * (9 if unfold else 1) + 2 + (2 if cell else 0)
        for unfold in (True, False)
        for cell in (True, False)
    }
    fitting = [choice for choice, in_dim in flags.items() if in_dim == first]
    if len(fitting) != 1:
        raise NotLIIFError(
            f"its imnet takes {first} inputs, which no choice of feat_unfold and cell_decode gives on {width} features"
        )
    feat_unfold, cell_decode = fitting[0]
    imnet_spec = {"name": "mlp", "args": {"out_dim": layers[-1], "hidden_list": layers[:-1]}}
    args = {
        "encoder_spec": encoder_spec,
        "imnet_spec": imnet_spec,
        "local_ensemble": True,
        "feat_unfold": feat_unfold,
        "cell_decode": cell_decode,
    }
    data_norm = default_data_norm() if is_original else {"inp": dict(norm), "gt": dict(norm)}
    return {"name": "liif", "args": args}, weights, data_norm


def _renamed(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    keys = {key.removeprefix("module."): key for key in state_dict}
    if any(key.startswith(_PREFIX) for key in keys):
        keys = {key.removeprefix(_PREFIX): old for key, old in keys.items() if key.startswith(_PREFIX)}
    blocks = [int(found.group(1)) for key in keys if (found := re.match(r"body\.(\d+)\.conv1\.", key))]
    weights = {}
    for key, old in keys.items():
        for pattern, new in _RENAMED:
            renamed, count = re.subn(f"^{pattern}", new, key)
            if count:
                weights[renamed.replace("{n_resblocks}", str(max(blocks, default=-1) + 1))] = state_dict[old]
                break
    return weights


def _imnet_shapes(weights: Mapping[str, Tensor]) -> tuple[int, list[int]]:
    """(in_dim, widths of all layers' outputs)."""
    found = {}
    for key, tensor in weights.items():
        if (match := re.fullmatch(r"imnet\.layers\.(\d+)\.weight", key)) and tensor.dim() == 2:
            found[int(match.group(1))] = tensor.shape
    if not found:
        raise NotLIIFError("its state_dict has no imnet.layers, so it is no LIIF")
    shapes = [found[index] for index in sorted(found)]
    return shapes[0][1], [shape[0] for shape in shapes]


def _count(weights: Mapping[str, Tensor], pattern: str) -> int:
    return 1 + max((int(found.group(1)) for key in weights if (found := re.match(pattern, key))), default=-1)


def _edsr(weights: dict[str, Tensor]) -> tuple[dict[str, Any], int]:
    width, n_colors = weights["encoder.head.0.weight"].shape[:2]
    n_resblocks = _count(weights, r"encoder\.body\.(\d+)\.body\.")
    full_size = (n_resblocks, width) == (32, 256)
    args = {"n_resblocks": n_resblocks, "n_feats": width, "res_scale": 0.1 if full_size else 1, "no_upsampling": True}
    if n_colors != 3:
        args["n_colors"] = n_colors
    return {"name": "edsr" if full_size else "edsr-baseline", "args": args}, width


def _rdn(weights: Mapping[str, Tensor]) -> tuple[dict[str, Any], int]:
    first = weights["encoder.SFENet1.weight"]
    width, kernel_size = first.shape[0], first.shape[-1]
    n_blocks = _count(weights, r"encoder\.RDBs\.(\d+)\.")
    n_layers = _count(weights, r"encoder\.RDBs\.0\.convs\.(\d+)\.")
    layer = weights.get("encoder.RDBs.0.convs.0.conv.0.weight")
    found = (n_blocks, n_layers, 0 if layer is None else layer.shape[0])
    for name, config in RDN_CONFIGS.items():
        if config == found:
            args = {"G0": width, "RDNkSize": kernel_size, "RDNconfig": name, "no_upsampling": True}
            return {"name": "rdn", "args": args}, width
    raise NotLIIFError(f"its RDN has (blocks, layers, growth) = {found}, but rdn has the configurations {RDN_CONFIGS}")
