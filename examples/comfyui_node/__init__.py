"""ComfyUI nodes for LIIF: any scale, any size. Copy this folder into ComfyUI/custom_nodes and restart ComfyUI.

The Python of ComfyUI needs liif_fast; spandrel belongs to ComfyUI. Put models into ComfyUI/models/upscale_models.
ComfyUI's own nodes "Load Upscale Model" and "Upscale Image (using Model)" then also take LIIF, by a factor of 4.
"Load LIIF" is better than "Load Upscale Model": it reads the normalization in the file, which ComfyUI drops.
"""

from __future__ import annotations

from typing import Any

import comfy.model_management
import comfy.utils
import folder_paths
from spandrel import ModelLoader
from torch import Tensor

import liif_fast
from liif_fast.integrations import spandrel as liif_in_spandrel

liif_in_spandrel.install()

SHIPPED = "the default model of liif_fast"


class LoadLIIF:
    """A LIIF or MetaSR from models/upscale_models, or the default model of liif_fast."""

    CATEGORY = "loaders"
    RETURN_TYPES = ("UPSCALE_MODEL",)
    FUNCTION = "load"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"model_name": ([SHIPPED, *folder_paths.get_filename_list("upscale_models")],)}}

    def load(self, model_name: str) -> tuple[Any]:
        if model_name == SHIPPED:
            return (liif_in_spandrel.LIIFArchitecture().describe(liif_fast.load()),)
        descriptor = ModelLoader().load_from_file(folder_paths.get_full_path_or_raise("upscale_models", model_name))
        return (_checked(descriptor),)


class UpscaleWithLIIF:
    """Images [B, H, W, 3] enlarged by any factor, or to any size; memory is bounded."""

    CATEGORY = "image/upscaling"
    RETURN_TYPES = ("IMAGE",)
    FUNCTION = "upscale"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        side = ("INT", {"default": 0, "min": 0, "max": 65536, "tooltip": "pixels; 0: as the other side or scale asks"})
        return {
            "required": {
                "upscale_model": ("UPSCALE_MODEL",),
                "image": ("IMAGE",),
                "scale": ("FLOAT", {"default": 2.0, "min": 0.1, "max": 30.0, "step": 0.01}),
            },
            "optional": {"width": side, "height": side},
        }

    def upscale(
        self, upscale_model: Any, image: Tensor, scale: float, width: int = 0, height: int = 0
    ) -> tuple[Tensor]:
        rows, cols = image.shape[1:3]
        if width or height:  # one side alone keeps the proportions
            size = (height or max(1, round(rows * width / cols)), width or max(1, round(cols * height / rows)))
        else:
            size = (max(1, round(rows * scale)), max(1, round(cols * scale)))
        bar = comfy.utils.ProgressBar(image.shape[0] * size[0] * size[1])

        def progress(done: int, total: int) -> None:
            comfy.model_management.throw_exception_if_processing_interrupted()
            bar.update_absolute(done, total)

        large = liif_fast.upscale(
            image.movedim(-1, 1).clamp(0, 1),
            size=size,
            model=_checked(upscale_model).model,
            device=comfy.model_management.get_torch_device(),
            progress=progress,
        )
        return (large.movedim(1, -1).contiguous(),)


def _checked(descriptor: Any) -> Any:
    name = descriptor.architecture.name
    if name != liif_in_spandrel.LIIFArchitecture.ID:
        raise ValueError(f"the model is a {name}, not a LIIF: use the node 'Upscale Image (using Model)'")
    return descriptor


NODE_CLASS_MAPPINGS = {"LoadLIIF": LoadLIIF, "UpscaleWithLIIF": UpscaleWithLIIF}
NODE_DISPLAY_NAME_MAPPINGS = {"LoadLIIF": "Load LIIF", "UpscaleWithLIIF": "Upscale Image (LIIF, any scale)"}
