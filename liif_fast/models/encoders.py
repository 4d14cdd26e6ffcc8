"""The encoders of the LIIF paper: EDSR, RDN, RCAN. An image [B,n_colors,H,W] becomes features [B,out_dim,H,W].

Attribute names give the state_dict keys of the public implementations. Sizes of parameters and the order of their
creation are also the same; the saved state of an optimizer depends on that order. Besides `forward`, an encoder has
  out_dim   channels of its output,
  n_colors  channels of its input: 3 (RGB, the default), 1 (gray), 4, ...
  scale     its own upsampling: 1 with no_upsampling, otherwise its output is an image of n_colors channels,
  halo      the radius of its receptive field in input pixels, or None if every output depends on the whole image.
A part of an image with `halo` more pixels on each side is encoded exactly as inside the whole image.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from liif_fast.models.registry import register

_RGB = 3
_DIV2K_MEAN = (0.4488, 0.4371, 0.4040)  # RGB means of DIV2K, in [0, 1]


def _conv(in_channels: int, out_channels: int, kernel_size: int = 3) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2)


def _tail_radius(scale: int, radius: int) -> int:
    """The receptive field of the upsampling convolutions, in input pixels.

    There is one convolution before each shuffle and one after the last. Each shuffle makes the grid finer.
    """
    steps = [2] * int(math.log2(scale)) if scale & (scale - 1) == 0 else [scale]
    grid_scale, reach = 1, 0.0
    for step in steps:
        reach += radius / grid_scale
        grid_scale *= step
    return math.ceil(reach + radius / grid_scale)


class _MeanShift(nn.Conv2d):
    """Adds `sign` times the mean RGB. LIIF normalizes its input and never runs this layer; only its keys are needed."""

    def __init__(self, rgb_range: float, sign: int) -> None:
        super().__init__(_RGB, _RGB, kernel_size=1)
        with torch.no_grad():
            self.weight.copy_(torch.eye(_RGB).view(_RGB, _RGB, 1, 1))
            self.bias.copy_(sign * rgb_range * torch.tensor(_DIV2K_MEAN))  # type: ignore[union-attr]
        self.requires_grad_(False)


class _Upsampler(nn.Sequential):
    """Sub-pixel convolutions: powers of two in steps of two, or one step of three."""

    def __init__(self, scale: int, n_feats: int) -> None:
        layers: list[nn.Module] = []
        if scale >= 1 and scale & (scale - 1) == 0:
            for _ in range(int(math.log2(scale))):
                layers += [_conv(n_feats, 4 * n_feats), nn.PixelShuffle(2)]
        elif scale == 3:
            layers += [_conv(n_feats, 9 * n_feats), nn.PixelShuffle(3)]
        else:
            raise ValueError(f"an encoder can upsample by 3 or a power of 2, not by {scale}: use no_upsampling=True")
        super().__init__(*layers)


class _ResBlock(nn.Module):
    """x + res_scale * conv(relu(conv(x)))."""

    def __init__(self, n_feats: int, res_scale: float) -> None:
        super().__init__()
        self.body = nn.Sequential(_conv(n_feats, n_feats), nn.ReLU(True), _conv(n_feats, n_feats))
        self.res_scale = res_scale

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) * self.res_scale + x if self.res_scale != 1 else self.body(x) + x


class _ResidualEncoder(nn.Module):
    """The structure of EDSR and RCAN: head -> body with a skip connection -> optional upsampling tail."""

    def __init__(
        self,
        blocks: Callable[[], list[nn.Module]],
        n_feats: int,
        scale: int,
        no_upsampling: bool,
        rgb_range: float,
        n_colors: int,
    ) -> None:
        super().__init__()
        self.sub_mean = _MeanShift(rgb_range, -1)
        self.add_mean = _MeanShift(rgb_range, 1)
        self.n_colors = n_colors
        self.head = nn.Sequential(_conv(n_colors, n_feats))
        self.body = nn.Sequential(*blocks(), _conv(n_feats, n_feats))
        self.no_upsampling = no_upsampling
        self.scale = 1 if no_upsampling else scale
        self.out_dim = n_feats if no_upsampling else n_colors
        if not no_upsampling:
            self.tail = nn.Sequential(_Upsampler(scale, n_feats), _conv(n_feats, n_colors))

    def forward(self, x: Tensor) -> Tensor:
        """x [B,n_colors,H,W] -> [B,out_dim,H*scale,W*scale]."""
        x = self.head(x)
        x = self.body(x) + x
        return x if self.no_upsampling else self.tail(x)


@register("edsr-baseline")
class EDSR(_ResidualEncoder):
    """Residual blocks without batch normalization (Lim et al., "Enhanced Deep Residual Networks", 2017).

    n_resblocks: residual blocks; n_feats: channels; res_scale: factor on every block's residual.
    scale: upsampling by 3 or a power of 2, unless no_upsampling.
    rgb_range: highest pixel value, only for the initial values of sub_mean and add_mean. n_colors: image channels.
    """

    def __init__(
        self,
        n_resblocks: int = 16,
        n_feats: int = 64,
        res_scale: float = 1,
        scale: int = 2,
        no_upsampling: bool = False,
        rgb_range: float = 1,
        n_colors: int = 3,
    ) -> None:
        super().__init__(
            lambda: [_ResBlock(n_feats, res_scale) for _ in range(n_resblocks)],
            n_feats,
            scale,
            no_upsampling,
            rgb_range,
            n_colors,
        )
        self.halo = 2 + 2 * n_resblocks + (0 if no_upsampling else _tail_radius(scale, 1))


register("edsr")(partial(EDSR, n_resblocks=32, n_feats=256, res_scale=0.1))  # the paper's full size


class _DenseLayer(nn.Module):
    """Appends `growth` new channels to its input."""

    def __init__(self, in_channels: int, growth: int, kernel_size: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(_conv(in_channels, growth, kernel_size), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat((x, self.conv(x)), 1)


class _ResidualDenseBlock(nn.Module):
    """Dense layers, then a 1x1 convolution back to the input's width, plus the input."""

    def __init__(self, width: int, growth: int, n_layers: int, kernel_size: int) -> None:
        super().__init__()
        self.convs = nn.Sequential(
            *(_DenseLayer(width + layer * growth, growth, kernel_size) for layer in range(n_layers))
        )
        self.LFF = _conv(width + n_layers * growth, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.LFF(self.convs(x)) + x


RDN_CONFIGS = {"A": (20, 6, 32), "B": (16, 8, 64)}  # blocks, layers of a block, growth


@register("rdn")
class RDN(nn.Module):
    """Residual dense network (Zhang et al., "Residual Dense Network for Image Super-Resolution", 2018).

    G0: channels between blocks; RDNkSize: odd kernel size.
    RDNconfig: 'A' (20 blocks of 6 layers, growth 32) or 'B' (16 blocks of 8 layers, growth 64).
    scale: upsampling by 2, 3 or 4, unless no_upsampling. n_colors: image channels.
    """

    def __init__(
        self,
        G0: int = 64,
        RDNkSize: int = 3,
        RDNconfig: str = "B",
        scale: int = 2,
        no_upsampling: bool = False,
        n_colors: int = 3,
    ) -> None:
        super().__init__()
        if RDNconfig not in RDN_CONFIGS:
            raise ValueError(f"RDNconfig is 'A' or 'B', not {RDNconfig!r}")
        n_blocks, n_layers, growth = RDN_CONFIGS[RDNconfig]
        self.no_upsampling = no_upsampling
        self.scale = 1 if no_upsampling else scale
        self.n_colors = n_colors
        self.out_dim = G0 if no_upsampling else n_colors
        self.SFENet1 = _conv(n_colors, G0, RDNkSize)
        self.SFENet2 = _conv(G0, G0, RDNkSize)
        self.RDBs = nn.ModuleList(_ResidualDenseBlock(G0, growth, n_layers, RDNkSize) for _ in range(n_blocks))
        self.GFF = nn.Sequential(_conv(n_blocks * G0, G0, 1), _conv(G0, G0, RDNkSize))
        radius = RDNkSize // 2
        self.halo = radius * (3 + n_blocks * n_layers)
        if not no_upsampling:
            self.UPNet = self._make_upsampling(G0, growth, RDNkSize, scale, n_colors)
            self.halo += _tail_radius(scale, radius)

    @staticmethod
    def _make_upsampling(width: int, growth: int, kernel_size: int, scale: int, n_colors: int) -> nn.Sequential:
        if scale not in (2, 3, 4):
            raise ValueError(f"rdn can upsample by 2, 3 or 4, not by {scale}: use no_upsampling=True")
        layers: list[nn.Module] = []
        channels = width
        for step in (2, 2) if scale == 4 else (scale,):
            layers += [_conv(channels, growth * step**2, kernel_size), nn.PixelShuffle(step)]
            channels = growth
        return nn.Sequential(*layers, _conv(growth, n_colors, kernel_size))

    def forward(self, x: Tensor) -> Tensor:
        """x [B,n_colors,H,W] -> [B,out_dim,H*scale,W*scale]."""
        shallow = self.SFENet1(x)
        x = self.SFENet2(shallow)
        outputs = []
        for block in self.RDBs:
            x = block(x)
            outputs.append(x)
        x = self.GFF(torch.cat(outputs, 1)) + shallow
        return x if self.no_upsampling else self.UPNet(x)


class _ChannelAttention(nn.Module):
    """Each channel times a factor in (0, 1), computed from the means of all channels over the whole image."""

    def __init__(self, n_feats: int, reduction: int) -> None:
        super().__init__()
        self.avg_pool = nn.AdaptiveAvgPool2d(1)
        self.conv_du = nn.Sequential(
            _conv(n_feats, n_feats // reduction, 1),
            nn.ReLU(True),
            _conv(n_feats // reduction, n_feats, 1),
            nn.Sigmoid(),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x * self.conv_du(self.avg_pool(x))


class _AttentionBlock(nn.Module):
    """x + attention(conv(relu(conv(x))))."""

    def __init__(self, n_feats: int, reduction: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            _conv(n_feats, n_feats), nn.ReLU(True), _conv(n_feats, n_feats), _ChannelAttention(n_feats, reduction)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) + x


class _ResidualGroup(nn.Module):
    """Attention blocks and a convolution, plus the input."""

    def __init__(self, n_resblocks: int, n_feats: int, reduction: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *(_AttentionBlock(n_feats, reduction) for _ in range(n_resblocks)), _conv(n_feats, n_feats)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) + x


@register("rcan")
class RCAN(_ResidualEncoder):
    """Residual groups with channel attention (Zhang et al., "Very Deep Residual Channel Attention Networks", 2018).

    n_resgroups: groups; n_resblocks: blocks in a group; n_feats: channels; n_colors: image channels.
    reduction: channels / hidden channels of the attention.
    The attention averages over the whole image, so no halo lets a part be encoded exactly.
    """

    halo = None

    def __init__(
        self,
        n_resgroups: int = 10,
        n_resblocks: int = 20,
        n_feats: int = 64,
        reduction: int = 16,
        scale: int = 2,
        no_upsampling: bool = False,
        rgb_range: float = 1,
        n_colors: int = 3,
    ) -> None:
        if not 1 <= reduction <= n_feats:
            raise ValueError(f"rcan's reduction must lie between 1 and n_feats = {n_feats}, not be {reduction}")
        super().__init__(
            lambda: [_ResidualGroup(n_resblocks, n_feats, reduction) for _ in range(n_resgroups)],
            n_feats,
            scale,
            no_upsampling,
            rgb_range,
            n_colors,
        )
