"""Shake-Shake 26 (Gastaldi 2017), with plain and with ResNeXt branches."""
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.models.parts import (
    Network,
    Scale,
    conv,
    he_init,
    make_stages,
    norm_relu,
    stem_stride,
)

SPECS = {                      # width of the first stage's branches (64 initial channels), ResNeXt?
    "shakeshake26_2x32d": (32, False),
    "shakeshake26_2x64d": (64, False),
    "shakeshake26_2x96d": (96, False),
    "shakeshake26_2x112d": (112, False),
    "shakeshake26_2x96d_next": (256, True),
}


class Shortcut(nn.Module):
    """Two 1×1 convolutions, one of the input, one of the input shifted by a pixel, side by side."""

    def __init__(self, in_channels: int, out_channels: int, stride: int):
        super().__init__()
        self.stride = stride
        self.convs = nn.ModuleList(conv(in_channels, out_channels // 2, 1) for _ in range(2))
        self.norm = nn.BatchNorm2d(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(x)
        shifted = F.pad(x, (-1, 1, -1, 1))
        halves = [conv(z[:, :, ::self.stride, ::self.stride])
                  for conv, z in zip(self.convs, (x, shifted), strict=True)]
        return self.norm(torch.cat(halves, 1))


def plain_branch(in_channels: int, out_channels: int, stride: int) -> nn.Sequential:
    """ReLU-conv3-BN twice."""
    return nn.Sequential(
        nn.ReLU(), conv(in_channels, out_channels, 3, stride),
        *norm_relu(out_channels), conv(out_channels, out_channels, 3),
        nn.BatchNorm2d(out_channels))


def resnext_branch(in_channels: int, out_channels: int, stride: int) -> nn.Sequential:
    """conv1-BN-ReLU, conv3 in four groups-BN-ReLU, conv1-BN; no ReLU before them."""
    return nn.Sequential(
        conv(in_channels, out_channels, 1),
        *norm_relu(out_channels), conv(out_channels, out_channels, 3, stride, groups=4),
        *norm_relu(out_channels), conv(out_channels, out_channels, 1),
        nn.BatchNorm2d(out_channels))


class ShakeBlock(nn.Module):
    """x + a·f(x) + (1 - a)·g(x): a is drawn for every sample, and another one for the gradient.

    Both are uniform on [0, 1] in training, 1/2 in evaluation.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int, resnext: bool = False):
        super().__init__()
        branch = resnext_branch if resnext else plain_branch
        self.branches = nn.ModuleList(branch(in_channels, out_channels, stride) for _ in range(2))
        self.same = stride == 1 and in_channels == out_channels
        self.shortcut = None
        if not (self.same and resnext):
            # the plain original also holds idle shortcuts: kept, frozen, so that counts agree
            self.shortcut = Shortcut(in_channels, out_channels, stride)
            self.shortcut.requires_grad_(not self.same)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.same else self.shortcut(x)
        f, g = (branch(x) for branch in self.branches)
        if not self.training:
            return shortcut + (f + g) / 2
        a, b = torch.rand(2, len(x), 1, 1, 1, device=x.device).to(f.dtype)
        return shortcut + Scale.apply(f, a, b) + Scale.apply(g, 1 - a, 1 - b)


def build(name: str, num_classes: int, image_size: int = 32, *, initial_channels: int = 64,
          dropout: float = 0.0) -> Network:
    """The network `name` of this family; see `common.models.build`."""
    width, resnext = SPECS[name]
    width = width * initial_channels // 64
    stem_width = initial_channels if resnext else initial_channels // 4
    widths, depths = [width, 2 * width, 4 * width], [2 if resnext else 4] * 3
    network = he_init(Network(
        conv(3, stem_width, 3, stem_stride(image_size), bias=True),
        make_stages(partial(ShakeBlock, resnext=resnext), stem_width, widths, depths),
        nn.ReLU(), widths[-1], num_classes, dropout))
    nn.init.zeros_(network.fc.bias)
    return network
