"""One training step: forward, L1 loss, backward, optimizer and averaged weights, with all switches for its speed."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import itertools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from liif_fast.data import Item
from liif_fast.utils.normalization import Norm, normalizations

AUTOCAST_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclasses.dataclass(frozen=True)
class StepOptions:
    """The switches of a step, named as in a configuration; all are off by default.

    autocast: 'bf16' or 'fp16' (with a scaled loss). channels_last: use that memory format in the encoder.
    compile_encoder: run the encoder through torch.compile. cuda_graphs: replay the encoder from a CUDA graph.
    clip_grad: largest norm of the gradient. accumulate: number of chunks in which a batch is computed, to save memory.
    ema: decay of the averaged weights per step.
    """

    autocast: str | None = None
    channels_last: bool = False
    compile_encoder: bool = False
    cuda_graphs: bool = False
    clip_grad: float | None = None
    accumulate: int = 1
    ema: float | None = None

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> StepOptions:
        """The options that a configuration sets; null means off."""
        names = [field.name for field in dataclasses.fields(cls)]
        return cls(**{name: config[name] for name in names if config.get(name) is not None})


class AveragedModel:
    """A copy of a model, `model`, in eval mode, whose weights are the running average of the trained weights."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model = copy.deepcopy(model).eval()
        self.decay = decay

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Add the weights after step number `step`, counted from 1."""
        decay = min(self.decay, step / (step + 9))  # smaller at first, so that the initial weights soon do not count
        ours, theirs = ([*each.parameters()] for each in (self.model, model))
        torch._foreach_lerp_(ours, theirs, 1 - decay)  # type: ignore[arg-type]
        for mean, buffer in zip(self.model.buffers(), model.buffers(), strict=True):
            mean.copy_(buffer)


class Stepper:
    """Trains a model, one batch per step.

    model: LIIF, MetaSR or another module with forward(inp, coord, cell), on its device, in train mode.
    optimizer: of the parameters. data_norm: {'inp': {'sub', 'div'}, 'gt': {'sub', 'div'}}, for colors in [0, 1].
    ddp: average gradients over the processes of torch.distributed.
    Raises ValueError for a switch that does not work with this model or device.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        options: StepOptions,
        data_norm: Norm,
        *,
        ddp: bool = False,
    ) -> None:
        self.model, self.optimizer, self.options = model, optimizer, options
        self.device = next(model.parameters()).device
        self.steps = 0
        self._inp_norm, self._gt_norm = normalizations(data_norm, self.device)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=options.autocast == "fp16")
        self._check_switches(ddp)
        if options.channels_last:
            self._encoder.to(memory_format=torch.channels_last)
        self.average = AveragedModel(model, options.ema) if options.ema is not None else None
        if options.compile_encoder:
            self._encoder.compile()  # in place, which keeps the names of the state_dict
        self._graphed = False
        self._forward: nn.Module = model
        if ddp:
            self._forward = DistributedDataParallel(
                model, device_ids=[self.device] if self.device.type == "cuda" else None
            )

    @property
    def _encoder(self) -> Any:
        return getattr(self.model, "encoder", None)

    def _check_switches(self, ddp: bool) -> None:
        options = self.options
        for switch in ("channels_last", "compile_encoder", "cuda_graphs"):
            if getattr(options, switch) and not isinstance(self._encoder, nn.Module):
                raise ValueError(f"{switch} needs a model with an encoder, and {type(self.model).__name__} has none")
        if options.cuda_graphs and (self.device.type != "cuda" or ddp or options.compile_encoder):
            found = "several processes" if ddp else "compile_encoder" if options.compile_encoder else self.device.type
            raise ValueError(f"cuda_graphs needs one GPU without compile_encoder, not {found}: leave it out")

    def step(self, batch: Item) -> Tensor:
        """One step on a batch {'inp' [B,C,h,w], 'coord' [B,Q,2], 'cell' [B,Q,2], 'gt' [B,Q,C]}, colors in [0, 1].

        A gt of NaN is a value that does not count. Returns the detached loss on the device, without waiting for it.
        """
        batch = {key: value.to(self.device, non_blocking=True) for key, value in batch.items()}
        self.optimizer.zero_grad(set_to_none=True)
        slices = _slices(batch["inp"].shape[0], self.options.accumulate)
        chunks = [{key: value[each] for key, value in batch.items()} for each in slices]
        values = (~batch["gt"].isnan()).sum().clamp(min=1)
        losses = []
        for number, chunk in enumerate(chunks, start=1):
            with self._without_sync(number < len(chunks)):
                loss = self._errors(chunk) / values
                self.scaler.scale(loss).backward()
            losses.append(loss.detach())
        if self.options.clip_grad is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), self.options.clip_grad)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.steps += 1
        if self.average is not None:
            self.average.update(self.model, self.steps)
        return torch.stack(losses).sum()

    def _errors(self, batch: Item) -> Tensor:
        """The sum of the absolute errors."""
        inp = self._inp_norm.normalize(batch["inp"])
        if self.options.channels_last:
            inp = inp.contiguous(memory_format=torch.channels_last)
        dtype = AUTOCAST_DTYPES.get(self.options.autocast or "")
        # With autocast's cache a recorded graph would read weights that were cast in an earlier step.
        keep = not self.options.cuda_graphs
        with torch.autocast(self.device.type, dtype=dtype, enabled=dtype is not None, cache_enabled=keep):
            if self.options.cuda_graphs and not self._graphed:
                self._graph_encoder(inp)
            pred = self._forward(inp, batch["coord"], batch["cell"])
        target = self._gt_norm.normalize(batch["gt"], channel=-1)
        target = torch.where(target.isnan(), pred.detach().float(), target)  # an error of 0, with a gradient of 0
        return (pred.float() - target).abs().sum()

    def _without_sync(self, enabled: bool) -> contextlib.AbstractContextManager[Any]:
        """Keep DDP from averaging gradients before the last chunk."""
        if enabled and isinstance(self._forward, DistributedDataParallel):
            return self._forward.no_sync()
        return contextlib.nullcontext()

    def _graph_encoder(self, inp: Tensor) -> None:
        """Record the encoder's forward and backward for batches of this shape; other batches run without the graph.

        Not yet run on a GPU.
        """
        encoder = self._encoder
        plain, shape = encoder.forward, inp.shape
        torch.cuda.make_graphed_callables(encoder, (inp,))
        recorded = encoder.forward
        encoder.forward = lambda x: (recorded if x.shape == shape and encoder.training else plain)(x)
        self._graphed = True


def _slices(count: int, chunks: int) -> list[slice]:
    """Slices of `count` items into `chunks` nearly equal chunks, none of them empty."""
    edges = [count * chunk // chunks for chunk in range(chunks + 1)]
    return [slice(low, high) for low, high in itertools.pairwise(edges) if high > low]
