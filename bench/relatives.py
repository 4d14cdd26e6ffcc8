"""Times whole models of LIIF's relatives with decoders of plain PyTorch and around the ops.

`python -m bench.relatives [--device cuda]`: LTE (CVPR 2022), SRNO (CVPR 2023) and LMF (CVPR 2024, LM-LIIF) around
`gather` and `ensemble`, from the formulas of the papers, with the published sizes. Around `decode`: a guided upsampler
of depth with the MLP of JIIF (ACM MM 2021), a downscaler of climate data with a topography, and an unfolding of 5x5.
All have EDSR-baseline. Inference enlarges 64x64 to 256x256; a training step
has crops of 48x48 with 2304 samples each, and Adam. Both decoders of a relative have the same parameters and give the
same results; only the formulation differs. They take turns, so the ratios come from one run. The result is saved next
to those of bench.run.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench import results
from bench.loader import SPEC
from bench.turns import parser, start, take_turns
from liif_fast import ops
from liif_fast.benchmark import original
from liif_fast.benchmark.problem import CHANNELS, OUTS
from liif_fast.benchmark.timing import Clock, in_words
from liif_fast.models import make_model
from liif_fast.utils import tables

LOOPS = {"inference": "inference, 64x64 to 256x256", "training": "training step, 4 crops"}
SIZE, SCALE, BATCH, CROP, SAMPLES = 64, 4, 4, 48, 2304


def mlp(*widths: int) -> nn.Sequential:
    """Linear layers of these widths with ReLU between them."""
    layers = [part for pair in itertools.pairwise(widths) for part in (nn.Linear(*pair), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


def corners(maps: list[Tensor], coord: Tensor) -> Iterator[tuple[list[Tensor], Tensor]]:
    """Of every corner the nearest latents of each map [B,Q,C] and the relative coordinate [B,Q,2]."""
    batch, _, height, width = maps[0].shape
    centers = original.make_coord(height, width, coord).permute(2, 0, 1).unsqueeze(0).expand(batch, -1, -1, -1)
    shape = coord.new_tensor([height, width])
    for row_side in (-1, 1):
        for col_side in (-1, 1):
            moved = coord + (coord.new_tensor([row_side, col_side]) / shape + 1e-6)
            grid = moved.clamp_(-1 + 1e-6, 1 - 1e-6).flip(-1).unsqueeze(1)
            sampled = [
                F.grid_sample(each, grid, mode="nearest", align_corners=False)[:, :, 0].transpose(1, 2)
                for each in (*maps, centers)
            ]
            yield sampled[:-1], (coord - sampled[-1]) * shape


def area(rel_coord: Tensor) -> Tensor:
    """[B,Q] of [B,Q,2]."""
    return rel_coord.prod(-1).abs() + 1e-9


class Decoder(nn.Module):
    """A decoder of features [B,C,H,W] at coord and cell [B,Q,2] to [B,Q,3].

    chunk: queries of one call in inference, plain (the published number) and around the ops; 0 is all of them.
    """

    around_ops = False
    chunk: tuple[int, int]

    def maps(self, feat: Tensor, cell: Tensor) -> Tensor:
        """The map [B,K,H,W] that `plain` and `with_ops` read."""
        return feat

    def plain(self, maps: Tensor, coord: Tensor, rel_cell: Tensor) -> Tensor:
        raise NotImplementedError

    def with_ops(self, maps: Tensor, coord: Tensor, cell: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, feat: Tensor, coord: Tensor, cell: Tensor) -> Tensor:
        maps = self.maps(feat, cell)
        if torch.is_grad_enabled():
            if not self.around_ops:
                return self.plain(maps, coord, cell * coord.new_tensor(feat.shape[2:]))
            # One crop at a time: the system clears fresh pages of larger tensors at every step.
            return torch.cat([self.with_ops(*each) for each in zip(maps.split(1), coord.split(1), cell.split(1))])
        step = self.chunk[self.around_ops] or coord.shape[1]
        parts = zip(coord.split(step, 1), cell.split(step, 1))
        if self.around_ops:
            return torch.cat([self.with_ops(maps, *each) for each in parts], 1)
        size = coord.new_tensor(feat.shape[2:])
        return torch.cat([self.plain(maps, points, cells * size) for points, cells in parts], 1)


class LTE(Decoder):
    """Amplitudes times waves of predicted frequencies, decoded by an imnet and blended by area."""

    chunk = (original.CHUNK, 2048)
    width = 256

    def __init__(self) -> None:
        super().__init__()
        self.amplitude_and_frequency = nn.Conv2d(CHANNELS, 2 * self.width, 3, padding=1)
        self.phase = nn.Linear(2, self.width // 2, bias=False)
        self.imnet = mlp(self.width, 256, 256, 256, OUTS)

    def maps(self, feat: Tensor, cell: Tensor) -> Tensor:
        conv = self.amplitude_and_frequency
        if not self.around_ops:
            return conv(feat)
        # Rows' frequencies before columns': vectors of one factor, where pairs of factors would be slow.
        order = torch.arange(self.width, 2 * self.width).view(-1, 2).T.flatten()
        weight, bias = (torch.cat([each[: self.width], each[order]]) for each in conv.parameters())
        return F.conv2d(feat, weight, bias, padding=1)

    def predict(self, amplitude: Tensor, angle: Tensor) -> Tensor:
        return self.imnet(amplitude * torch.cat([angle.cos(), angle.sin()], -1))

    def plain(self, maps: Tensor, coord: Tensor, rel_cell: Tensor) -> Tensor:
        preds, areas, phase = [], [], self.phase(rel_cell)
        for (amplitude, frequency), rel_coord in corners(list(maps.chunk(2, 1)), coord):
            angle = (frequency.unflatten(-1, (-1, 2)) * rel_coord.unsqueeze(-2)).sum(-1) + phase
            preds.append(self.predict(amplitude, torch.pi * angle))
            areas.append(area(rel_coord))
        return original.blend(preds, areas)

    def with_ops(self, maps: Tensor, coord: Tensor, cell: Tensor) -> Tensor:
        x, area_weight = ops.gather(maps, coord, cell, feat_unfold=False)
        half = self.width // 2
        amplitude, of_row, of_col, rel_coord, rel_cell = x.split([self.width, half, half, 2, 2], -1)
        row, col = (torch.pi * rel_coord).split(1, -1)
        phase = self.phase(torch.pi * rel_cell[:, :, :1])
        angle = torch.addcmul(torch.addcmul(phase, of_row, row), of_col, col)
        return ops.ensemble(self.predict(amplitude, angle), area_weight)


class _Norm(nn.Module):
    """A normalization of every head's channels."""

    def __init__(self, heads: int, channels: int) -> None:
        super().__init__()
        self.weight, self.bias = (nn.Parameter(fill(heads, 1, channels)) for fill in (torch.ones, torch.zeros))

    def forward(self, x: Tensor) -> Tensor:
        x = x - x.mean(-1, keepdim=True)
        deviation = (x.square().sum(-1, keepdim=True) / (x.shape[-1] - 1)).sqrt()  # four times as fast as std
        return self.weight * (x / (deviation + 1e-5)) + self.bias


class _Attention(nn.Module):
    """Galerkin attention between all queries of a call, [B,Q,C] -> [B,Q,C]."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.in_proj, self.out_proj = nn.Linear(width, 3 * width), mlp(width, width, width)
        self.out_proj[1] = nn.GELU()
        self.norms = nn.ModuleList(_Norm(heads, width // heads) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.in_proj(x).unflatten(-1, (self.heads, -1)).transpose(1, 2).chunk(3, -1)
        k, v = (norm(each) for norm, each in zip(self.norms, (k, v)))
        mixed = q @ (k.transpose(-2, -1) @ v / x.shape[1])
        return self.out_proj(mixed.transpose(1, 2).flatten(2) + x) + x


class SRNO(Decoder):
    """The four weighted latents and their relative coordinates, through two Galerkin attentions."""

    chunk = (0, 0)  # the attentions are between all queries

    def __init__(self, width: int = 256, heads: int = 16) -> None:
        super().__init__()
        self.lift = nn.Linear(4 * (CHANNELS + 2) + 2, width)
        self.attentions = nn.Sequential(_Attention(width, heads), _Attention(width, heads))
        self.project = mlp(width, 256, OUTS)
        self.project[1] = nn.GELU()

    def plain(self, maps: Tensor, coord: Tensor, rel_cell: Tensor) -> Tensor:
        latents, rel_coords = zip(*((latent, rel_coord) for (latent,), rel_coord in corners([maps], coord)))
        areas = [area(each) for each in rel_coords]
        total = torch.stack(areas).sum(0)
        weighted = [latent * (each / total).unsqueeze(-1) for latent, each in zip(latents, reversed(areas))]
        return self.project(self.attentions(self.lift(torch.cat([*rel_coords, *weighted, rel_cell], -1))))

    def with_ops(self, maps: Tensor, coord: Tensor, cell: Tensor) -> Tensor:
        x, area_weight = ops.gather(maps, coord, cell, feat_unfold=False)
        x[..., :CHANNELS].mul_(area_weight.detach().unsqueeze(-1))
        # The first layer's columns in the order of x. Every corner holds the cell; the first one's is read.
        of_coord, of_latent, of_cell = self.lift.weight.split([8, 4 * CHANNELS, 2], 1)
        of_cell = F.pad(of_cell.unsqueeze(1), (0, 0, 0, 3))
        weight = torch.cat([of_latent.unflatten(1, (4, -1)), of_coord.unflatten(1, (4, -1)), of_cell], -1)
        lifted = F.linear(x.flatten(2), weight.flatten(1), self.lift.bias)
        return self.project(self.attentions(lifted))


class LMF(Decoder):
    """A wide MLP of every latent predicts the scales and shifts of a narrow MLP of every query."""

    chunk = (0, 2048)
    width, depth = 16, 6

    def __init__(self) -> None:
        super().__init__()
        self.modulations = 2 * self.depth * self.width
        self.latent_mlp = mlp(9 * CHANNELS + 2, 208, self.modulations + self.width)
        self.render_mlp = mlp(self.width + 4, *[self.width] * self.depth, OUTS)

    def maps(self, feat: Tensor, cell: Tensor) -> Tensor:
        latents = original.unfold(feat).flatten(2).transpose(1, 2)
        rel_cell = cell[:, :1] * cell.new_tensor(feat.shape[2:])
        x = torch.cat([latents, rel_cell.expand(-1, latents.shape[1], -1)], -1)
        out = self.latent_mlp(x)
        if self.around_ops:  # 1 + scale, once for every latent
            out = out + F.pad(out.new_ones(self.modulations // 2), (0, out.shape[-1] - self.modulations // 2))
        return out.transpose(1, 2).unflatten(2, feat.shape[2:])

    def predict(self, x: Tensor, modulations: Sequence[Tensor]) -> Tensor:
        *hidden, last = (layer for layer in self.render_mlp if isinstance(layer, nn.Linear))
        for layer, scale, shift in zip(hidden, modulations[: self.depth], modulations[self.depth :]):
            x = layer(x)
            x = (torch.addcmul(shift, x, scale) if self.around_ops else x * (scale + 1) + shift).relu_()
        return last(x)

    def plain(self, maps: Tensor, coord: Tensor, rel_cell: Tensor) -> Tensor:
        preds, areas = [], []
        both = list(maps.split([self.modulations, self.width], 1))
        for (modulations, latent), rel_coord in corners(both, coord):
            x = torch.cat([latent, rel_coord, rel_cell], -1)
            preds.append(self.predict(x, modulations.split(self.width, -1)))
            areas.append(area(rel_coord))
        return original.blend(preds, areas)

    def with_ops(self, maps: Tensor, coord: Tensor, cell: Tensor) -> Tensor:
        x, area_weight = ops.gather(maps, coord, cell, feat_unfold=False)
        *modulations, x = x.split([self.width] * 2 * self.depth + [self.width + 4], -1)
        return ops.ensemble(self.predict(x, modulations), area_weight)


class General(Decoder):
    """LIIF's blend of an MLP that reads latents, coordinates and cells, and more of each latent or each query.

    The latents are unfolded `unfold` x `unfold`. A topography is one more channel of them; a guide is a map of finer
    resolution, interpolated at every query.
    """

    chunk = (original.CHUNK, 4096)
    hidden: tuple[int, ...] = (256, 256, 256, 256)
    unfold, topography, guide = 1, 0, 0  # the last two: channels

    def __init__(self) -> None:
        super().__init__()
        self.latents = CHANNELS * self.unfold**2 + self.topography
        self.imnet = mlp(self.latents + 4 + self.guide, *self.hidden, OUTS)
        self.ground = nn.Parameter(torch.rand(1, self.topography, 16, 16)) if self.topography else None
        self.guide_map = nn.Parameter(torch.rand(1, self.guide, 96, 96) - 0.5) if self.guide else None

    def maps(self, feat: Tensor, cell: Tensor) -> Tensor:
        margin = self.unfold // 2
        if not self.around_ops:
            unfolded = F.unfold(feat, self.unfold, padding=margin).unflatten(2, feat.shape[2:])
            return torch.cat([unfolded, *self._ground(feat)], 1)
        of_feat, of_ground = (
            self.imnet[0].weight[:, : self.latents].split([self.latents - self.topography, self.topography], 1)
        )
        out = F.conv2d(feat, of_feat.unflatten(1, (-1, self.unfold, self.unfold)), padding=margin)
        return sum((F.conv2d(each, of_ground[..., None, None]) for each in self._ground(feat)), out)

    def _ground(self, feat: Tensor) -> list[Tensor]:
        if self.ground is None:
            return []
        resized = F.interpolate(self.ground, feat.shape[2:], mode="bilinear", align_corners=False)
        return [resized.expand(feat.shape[0], -1, -1, -1)]

    def _guide(self, coord: Tensor) -> Tensor:
        """[B, Q, guide]."""
        maps = self.guide_map.expand(coord.shape[0], -1, -1, -1)
        return F.grid_sample(maps, coord.flip(-1).unsqueeze(1), align_corners=False)[:, :, 0].transpose(1, 2)

    def plain(self, maps: Tensor, coord: Tensor, rel_cell: Tensor) -> Tensor:
        preds, areas = [], []
        guide = [] if self.guide_map is None else [self._guide(coord)]
        for (latent,), rel_coord in corners([maps], coord):
            preds.append(self.imnet(torch.cat([latent, rel_coord, rel_cell, *guide], -1)))
            areas.append(area(rel_coord))
        return original.blend(preds, areas)

    def with_ops(self, maps: Tensor, coord: Tensor, cell: Tensor) -> Tensor:
        first, *others = (layer for layer in self.imnet if isinstance(layer, nn.Linear))
        _, geometry, of_guide = first.weight.split([self.latents, 4, self.guide], 1)
        term = None if self.guide_map is None else F.linear(self._guide(coord), of_guide)
        weights, biases = [layer.weight for layer in others], [layer.bias for layer in (first, *others)]
        latent_map = maps.permute(0, 2, 3, 1)
        return ops.decode(latent_map, geometry, weights, biases, coord=coord, cell=cell, query_term=term)


class GuidedDepth(General):
    hidden, guide = (1024, 512, 256, 128), 128


class Climate(General):
    topography = 1


class Unfolding5x5(General):
    unfold = 5


# By the name of the result file.
GROUPS: dict[str, dict[str, type[Decoder]]] = {
    "relatives": {"LTE": LTE, "SRNO": SRNO, "LMF": LMF},
    "relatives-decode": {
        "guided depth": GuidedDepth,
        "climate with topography": Climate,
        "5x5 unfolding": Unfolding5x5,
    },
}
OPS = {"relatives": "gather and ensemble", "relatives-decode": "ops.decode"}
RELATIVES = {name: decoder for group in GROUPS.values() for name, decoder in group.items()}
ADD_INPUT = ("LTE", "SRNO")  # to their decodes they add the input, enlarged bilinearly


class Model(nn.Module):
    """EDSR-baseline and a relative's decoder: inp [B,3,H,W], coord and cell [B,Q,2] -> [B,Q,3]."""

    def __init__(self, relative: str) -> None:
        super().__init__()
        liif: Any = make_model(SPEC)
        self.encoder, self.decoder, self.adds_input = liif.encoder, RELATIVES[relative](), relative in ADD_INPUT

    def forward(self, inp: Tensor, coord: Tensor, cell: Tensor) -> Tensor:
        out = self.decoder(self.encoder(inp), coord, cell)
        if not self.adds_input:
            return out
        grid = coord.flip(-1).unsqueeze(1)
        enlarged = F.grid_sample(inp, grid, mode="bilinear", padding_mode="border", align_corners=False)
        return out + enlarged[:, :, 0].transpose(1, 2)


def make_loops(relative: str, around_ops: bool, device: torch.device) -> dict[str, Callable[[], Any]]:
    """Both loops of a relative, on the same weights and inputs every time, by their names in LOOPS."""
    torch.manual_seed(0)
    model = Model(relative).to(device)
    model.decoder.around_ops = around_ops
    trained = copy.deepcopy(model)
    optimizer = torch.optim.Adam(trained.parameters(), lr=1e-4)
    inp, size = torch.rand(1, 3, SIZE, SIZE, device=device), SIZE * SCALE
    coord = original.make_coord(size, size, inp).view(1, -1, 2)
    cell = original.make_cell(size, size, coord)
    crops = torch.rand(BATCH, 3, CROP, CROP, device=device)
    points = torch.rand(BATCH, SAMPLES, 2, device=device) * 2 - 1
    cells = torch.rand(BATCH, 1, 2, device=device).expand(points.shape) / CROP
    truth = torch.rand(BATCH, SAMPLES, 3, device=device)

    def inference() -> Tensor:
        with torch.no_grad():
            return model(inp, coord, cell)

    def training() -> Tensor:
        loss = (trained(crops, points, cells) - truth).abs().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach()

    return {"inference": inference, "training": training}


def measure(clock: Clock, rounds: int, name: str, relatives: list[str]) -> dict[str, Any]:
    """Seconds of both loops of every relative, plain and around the ops, as a result to be saved under a name."""
    result = results.begin(name, clock.device.type, "bench.relatives")
    runs = {
        f"{relative}: {loop}: {code}": run
        for relative in relatives
        for code in ("plain", "ops")
        for loop, run in make_loops(relative, code == "ops", clock.device).items()
    }
    return {**result, **take_turns(clock, runs, rounds, lambda name: f"{name.rpartition(': ')[0]}: plain")}


def table(result: dict[str, Any]) -> str:
    """One row per relative and loop: the time in plain PyTorch, the time around the ops, the ratio."""
    rows = []
    for relative in RELATIVES:
        for loop, label in LOOPS.items():
            found = [result["entries"].get(f"{relative}: {loop}: {code}") for code in ("plain", "ops")]
            if all(entry and "seconds" in entry for entry in found):
                seconds = [in_words(entry["seconds"]["median"]) for entry in found]
                rows.append([f"{relative}, {label}", *seconds, f"{found[1]['speedup']['median']:.2f}x"])
    return tables.markdown(["EDSR-baseline, float32", "plain PyTorch", OPS[result["name"]], "speedup"], rows)


def main(arguments: list[str] | None = None) -> None:
    options = parser("relatives", __doc__)
    options.add_argument("--only", nargs="+", choices=RELATIVES, default=list(RELATIVES))
    args = options.parse_args(arguments)
    clock, rounds = start(args)
    for name, group in GROUPS.items():
        if relatives := [relative for relative in group if relative in args.only]:
            result = measure(clock, rounds, name, relatives)
            print(table(result))
            print(results.save(result, args.results))


if __name__ == "__main__":
    main()
