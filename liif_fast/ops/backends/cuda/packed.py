"""The packed weights of recent decodes, used again while a latent map is."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from ...inputs import DecodeInputs

_MOST = 4  # packed imnets, of about half a megabyte each


class PackedWeights:
    """Packed weights by latent map, storage and version of the layers, operands and stream.

    PyTorch does not count changes of a tensor through `.data` or by a fused optimizer. After such a change the latent
    map must be computed again as well, since it contains the first layer, and a new map gets new packed weights. A weak
    reference to a storage keeps its address from being used again, so an address names one storage.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._found: dict[Hashable, tuple[Tensor, list[StorageWeakRef]]] = {}

    def get(self, inputs: DecodeInputs, policy: object, pack: Callable[[], Tensor]) -> Tensor:
        """The packed weights of a decode, from `pack` where they are not known.

        During the capture of a CUDA graph they are packed in the graph, whose replays then read the current weights.
        """
        layers = [inputs.weight_geometry, *inputs.weights, *inputs.biases]
        on_gpu = inputs.latent_map.is_cuda
        if any(layer.is_inference() for layer in layers) or (on_gpu and torch.cuda.is_current_stream_capturing()):
            return pack()
        stream = torch.cuda.current_stream(inputs.latent_map.device).cuda_stream if on_gpu else 0
        storages = [StorageWeakRef(tensor.untyped_storage()) for tensor in (inputs.latent_map, *layers)]
        versions = [(layer.storage_offset(), layer.stride(), layer.dtype, layer._version) for layer in layers]
        # The map's own place in its storage does not matter: only a new map must get a new key.
        shapes = tuple(layer.shape for layer in layers)
        key = (*(storage.cdata for storage in storages), *versions, shapes, policy, inputs.latent_map.device, stream)
        with self._lock:
            if key in self._found:
                return self._found[key][0]
        packed = pack()
        with self._lock:
            while len(self._found) >= _MOST:
                del self._found[next(iter(self._found))]
            self._found[key] = packed, storages
        return packed


PACKED = PackedWeights()
