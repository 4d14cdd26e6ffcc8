"""Classes of the shape of other people's LIIF code, written here: what `liif_fast.patch` has to find and replace."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from liif_fast.benchmark import original

calls: list[str] = []  # the class of every decode by a class's own code


class PublicMLP(nn.Module):
    """An imnet as in the public code: not our MLP, but with the same `layers`."""

    def __init__(self, in_dim: int, out_dim: int, hidden_list: list[int]) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for width in hidden_list:
            layers += [nn.Linear(in_dim, width), nn.ReLU()]
            in_dim = width
        self.layers = nn.Sequential(*layers, nn.Linear(in_dim, out_dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x.view(-1, x.shape[-1])).view(*x.shape[:-1], -1)


class _Base(nn.Module):
    def __init__(self, local_ensemble: bool = True, feat_unfold: bool = True, cell_decode: bool = True) -> None:
        super().__init__()
        self.local_ensemble, self.feat_unfold, self.cell_decode = local_ensemble, feat_unfold, cell_decode
        in_dim = 4 * (9 if feat_unfold else 1) + 2 + (2 if cell_decode else 0)
        self.encoder = nn.Conv2d(3, 4, 3, padding=1)
        self.imnet: nn.Module | None = PublicMLP(in_dim, 3, [16, 12])

    def _own(self, feat: Tensor, coord: Tensor, cell: Tensor | None) -> Tensor:
        calls.append(type(self).__name__)
        cell = cell if self.cell_decode else None
        switches = {"local_ensemble": self.local_ensemble, "feat_unfold": self.feat_unfold}
        return original.query(feat, coord, cell, self.imnet, **switches)


class Upscaler(_Base):
    """yinboc/liif's LIIF under another name: the features are an attribute."""

    def gen_feat(self, inp: Tensor) -> Tensor:
        self.feat = self.encoder(inp)
        return self.feat

    def query_rgb(self, coord: Tensor, cell: Tensor | None = None) -> Tensor:
        return self._own(self.feat, coord, cell)

    def forward(self, inp: Tensor, coord: Tensor, cell: Tensor) -> Tensor:
        self.gen_feat(inp)
        return self.query_rgb(coord, cell)


class WithNewEncoder(Upscaler):
    """A subclass that leaves query_rgb alone."""

    def gen_feat(self, inp: Tensor) -> Tensor:
        self.feat = self.encoder(inp).relu()
        return self.feat


class Clamped(Upscaler):
    """A subclass with a query_rgb of its own."""

    def query_rgb(self, coord: Tensor, cell: Tensor | None = None) -> Tensor:
        return super().query_rgb(coord, cell).clamp(-0.05, 0.05)


class OnGPU(Upscaler):
    """The public code moves coordinates to a GPU wherever the model is."""

    def query_rgb(self, coord: Tensor, cell: Tensor | None = None) -> Tensor:
        return self._own(self.feat, coord.cuda(), cell)


class Generator(_Base):
    """MMagic's LIIFNet: the features are an argument, and a method decodes them in chunks."""

    def gen_feature(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def query_rgb(self, feature: Tensor, coord: Tensor, cell: Tensor | None = None) -> Tensor:
        return self._own(feature, coord, cell)

    def batched_predict(self, x: Tensor, coord: Tensor, cell: Tensor, chunk: int = 10) -> Tensor:
        with torch.no_grad():
            parts = range(0, coord.shape[1], chunk)
            return torch.cat(
                [self.query_rgb(x, coord[:, at : at + chunk], cell[:, at : at + chunk]) for at in parts], 1
            )

    def forward(self, x: Tensor, coord: Tensor, cell: Tensor, test_mode: bool = False) -> Tensor:
        feature = self.gen_feature(x)
        return (self.batched_predict if test_mode else self.query_rgb)(feature, coord, cell)


class EDSRGenerator(Generator):
    """The class of which MMagic makes models."""

    def gen_feature(self, x: Tensor) -> Tensor:
        return self.encoder(x)


class Wrapped(nn.Module):
    """A model with a LIIF inside."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = EDSRGenerator()


# Classes of LIIF's shape that compute something else. The comparison has to find out.


class TwiceTheCell(Upscaler):
    def query_rgb(self, coord: Tensor, cell: Tensor | None = None) -> Tensor:
        return self._own(self.feat, coord, None if cell is None else cell * 2)


class Detached(Upscaler):
    def query_rgb(self, coord: Tensor, cell: Tensor | None = None) -> Tensor:
        return self._own(self.feat.detach() * 0.5 + self.feat * 0.5, coord, cell)


class WithResidual(Upscaler):
    def gen_feat(self, inp: Tensor) -> Tensor:
        self.inp = inp
        return super().gen_feat(inp)

    def query_rgb(self, coord: Tensor, cell: Tensor | None = None) -> Tensor:
        return self._own(self.feat, coord, cell) + self.inp.mean()


# Classes that are no LIIF, whatever their names say.


class LIIF(nn.Module):
    def __init__(self, local_ensemble: bool = True, feat_unfold: bool = True, cell_decode: bool = True) -> None:
        super().__init__()

    def query_rgb(self, points: Tensor) -> Tensor:
        return points


class Field(nn.Module):
    def query_rgb(self, coord: Tensor, cell: Tensor) -> Tensor:
        return coord
