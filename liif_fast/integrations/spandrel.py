"""LIIF in spandrel, the loader of ComfyUI, chaiNNer and other hosts: `install()`, then `ModelLoader` opens LIIF files.

spandrel's descriptors have one whole factor. The descriptor of a LIIF begins with the factor of `install`; assign its
`scale` to change it. `liif_fast.upscale(image, size=..., model=descriptor.model)` takes any factor.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from liif_fast.images.upscaling import upscale
from liif_fast.models import checkpoints

try:
    import spandrel
except ModuleNotFoundError as error:
    raise ImportError(
        f"liif_fast.integrations.spandrel needs {error.name}: pip install spandrel, which also installs torchvision"
    ) from error

_log = logging.getLogger(__name__)
_PREFIXES = (
    "",
    "generator.",
    "module.generator.",
)  # of the original and ours, of MMagic, and of MMagic's wrapped models
_FIRST_LAYERS = ("encoder.head.0.weight", "encoder.SFENet1.weight", "conv_first.weight", "sfe1.weight")


def install(*, scale: int = 4) -> None:
    """Register LIIF in spandrel's main registry; a second call only changes `scale`.

    scale: the factor with which descriptors begin, from 1.
    `ModelLoader.load_from_file` then reads LIIF files as `liif_fast.load` does, with their spec and normalization.
    A host that passes only weights to `load_from_state_dict`, as ComfyUI does, loses the metadata of .safetensors files
    and the normalization of .pth files; their settings are then assumed, and a warning says so.
    Raises ValueError for another scale.
    """
    if not isinstance(scale, int) or scale < 1:
        raise ValueError(f"scale is {scale!r}, but spandrel needs a whole number from 1")
    LIIFArchitecture.scale = scale
    registry = spandrel.MAIN_REGISTRY
    if LIIFArchitecture.ID in registry:
        return
    before = tuple(support.architecture.id for support in registry)
    registry.add(spandrel.ArchSupport.from_architecture(LIIFArchitecture(), before))
    spandrel.ModelLoader.load_from_file = _loading_liif(spandrel.ModelLoader.load_from_file)


def is_liif(state: Mapping[str, Any]) -> bool:
    """Whether a dictionary that spandrel has read holds LIIF or MetaSR, of ours, the original or MMagic."""
    if {"name", "args", "sd"} <= state.keys():
        return state["name"] in ("liif", "metasr")
    return any(
        f"{prefix}imnet.layers.0.weight" in state and any(f"{prefix}{layer}" in state for layer in _FIRST_LAYERS)
        for prefix in _PREFIXES
    )


class LIIFArchitecture(spandrel.Architecture):
    """spandrel's description of LIIF and MetaSR."""

    ID = "LIIF"
    scale = 4  # of new descriptors

    def __init__(self) -> None:
        super().__init__(id=self.ID, detect=is_liif)

    def load(self, state_dict: Mapping[str, Any]) -> Any:
        """An ImageModelDescriptor of weights without their file; raises `checkpoints.CheckpointError`."""
        model = checkpoints.from_state_dict(state_dict, source="the file that spandrel has read")
        assumed = f"normalization {model.data_norm}"
        if "sd" not in state_dict:
            assumed += f" and spec {model.spec}"
        _log.warning(
            "a LIIF came without the rest of its file, whose %s is assumed; "
            "ModelLoader.load_from_file and liif_fast.load read the file's own",
            assumed,
        )
        return self.describe(model)

    def describe(self, model: nn.Module) -> Any:
        """An ImageModelDescriptor of a LIIF or MetaSR."""
        channels = getattr(model.encoder, "n_colors", 3)
        spec: Any = model.spec
        descriptor: Any = spandrel.ImageModelDescriptor(
            model,
            model.state_dict(),
            architecture=self,
            purpose="SR",
            tags=[spec["name"], spec["args"]["encoder_spec"]["name"]],
            supports_half=True,
            supports_bfloat16=True,
            scale=self.scale,
            input_channels=channels,
            output_channels=channels,
            tiling=spandrel.ModelTiling.INTERNAL,
            call_fn=lambda called, image: _enlarge(called, image, descriptor.scale),
        )
        return descriptor


def _enlarge(model: nn.Module, image: Tensor, scale: int) -> Tensor:
    return upscale(image.clamp(0, 1), scale=scale, model=model)


def _loading_liif(load_from_file: Any) -> Any:
    """`ModelLoader.load_from_file` that reads LIIF files itself, since spandrel drops what is not a weight."""

    def load(self: Any, path: str | Path) -> Any:
        architecture = self.registry.get(LIIFArchitecture.ID)
        if architecture is None:
            return load_from_file(self, path)
        state = self.load_state_dict_from_file(path)
        if not is_liif(state):
            return self.load_from_state_dict(state)
        try:
            model = checkpoints.load(path)
        except checkpoints.MissingSpecError:
            return self.load_from_state_dict(state)
        return architecture.architecture.describe(model).to(self.device)

    load.__doc__ = load_from_file.__doc__
    return load
