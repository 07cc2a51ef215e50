"""PyramidNet-272 (Han et al. 2017) with ShakeDrop (Yamada et al. 2019); Shake-Shake 26 (Gastaldi
2017), plain and ResNeXt."""
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.models.parts import Network, conv, he_init, make_stages, norm_relu, stem

PYRAMID = {"pyramidnet272": (272, 200), "pyramid272": (272, 200)}   # depth; growth of the width
# Width of the first stage's branches (64 initial channels), ResNeXt?
SHAKE = {f"shakeshake26_2x{width}d": (width, False) for width in (32, 64, 96, 112)} | {
    "shakeshake26_2x96d_next": (256, True)}


class Scale(torch.autograd.Function):
    """Scale.apply(x, a, b) returns x·a; backward multiplies the gradient by b instead of a."""

    @staticmethod
    def forward(ctx, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(b)
        return x * a

    @staticmethod
    def backward(ctx, grad: Tensor):
        return grad * ctx.saved_tensors[0], None, None


class ShakeDrop(nn.Module):
    """Training: with probability p, of the whole batch, x·a, and the gradient times b, a ~ U(-1, 1)
    and b ~ U(0, 1) for each sample. Evaluation: x·(1 - p)."""

    def __init__(self, p: float):
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x * (1 - self.p)
        keep = torch.rand((), device=x.device) >= self.p
        a, b = torch.rand(2, len(x), 1, 1, 1, device=x.device)
        a, b = (torch.where(keep, 1, scale).to(x.dtype) for scale in (2 * a - 1, b))
        return Scale.apply(x, a, b)


class PyramidUnit(nn.Module):
    """Bottleneck BN-1×1-BN-ReLU-3×3-BN-ReLU-1×1-BN with a zero-padded shortcut."""

    def __init__(self, in_channels: int, width: int, stride: int, p: float):
        super().__init__()
        self.stride, self.new_channels = stride, 4 * width - in_channels
        self.convs = nn.Sequential(
            nn.BatchNorm2d(in_channels), conv(in_channels, width, 1),
            *norm_relu(width), conv(width, width, 3, stride),
            *norm_relu(width), conv(width, 4 * width, 1), nn.BatchNorm2d(4 * width),
            ShakeDrop(p))

    def forward(self, x: Tensor) -> Tensor:
        out = self.convs(x)
        if self.stride == 2:
            x = F.avg_pool2d(x, 2, ceil_mode=True)
        return out + F.pad(x, (0, 0, 0, 0, 0, self.new_channels))


def pyramid(name, num_classes, image_size, channels, dropout) -> Network:
    """Return a PyramidNet; the probabilities of ShakeDrop grow linearly to 0.5."""
    depth, alpha = PYRAMID[name]
    per_stage = (depth - 2) // 9
    base = channels = channels // 4              # the paper's 16
    begin = nn.Sequential(stem(base, image_size), nn.BatchNorm2d(base))
    stages = [nn.Sequential() for _ in range(3)]
    for unit in range(3 * per_stage):
        stage, number = divmod(unit, per_stage)
        share = (unit + 1) / (3 * per_stage)
        width = round(base + alpha * base / 16 * share)
        stride = 2 if stage and not number else 1
        stages[stage].append(PyramidUnit(channels, width, stride, 0.5 * share))
        channels = 4 * width
    return he_init(Network(begin, stages, nn.Sequential(*norm_relu(channels)), channels,
                           num_classes, dropout), zero_bias=False)


class Shortcut(nn.Module):
    """Concatenated 1×1 convolutions of the input and of the input shifted by a pixel, then BN."""

    def __init__(self, in_channels: int, out_channels: int, stride: int):
        super().__init__()
        self.convs = nn.ModuleList(conv(in_channels, out_channels // 2, 1, stride)
                                   for _ in range(2))
        self.norm = nn.BatchNorm2d(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(x)
        first, second = self.convs
        return self.norm(torch.cat([first(x), second(F.pad(x, (-1, 1, -1, 1)))], 1))


def make_branch(in_channels: int, out_channels: int, stride: int, resnext: bool) -> nn.Sequential:
    """Return ReLU-3×3-BN-ReLU-3×3-BN, or ResNeXt's bottleneck of four groups without first ReLU."""
    if resnext:
        layers = [conv(in_channels, out_channels, 1), *norm_relu(out_channels),
                  conv(out_channels, out_channels, 3, stride, groups=4)]
    else:
        layers = [nn.ReLU(), conv(in_channels, out_channels, 3, stride)]
    return nn.Sequential(*layers, *norm_relu(out_channels),
                         conv(out_channels, out_channels, 1 if resnext else 3),
                         nn.BatchNorm2d(out_channels))


class ShakeBlock(nn.Module):
    """x + a·f(x) + (1 - a)·g(x): a ~ U(0, 1) for each sample, anew for the gradient; else 1/2."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, resnext: bool = False):
        super().__init__()
        self.branches = nn.ModuleList(make_branch(in_channels, out_channels, stride, resnext)
                                      for _ in range(2))
        self.same = stride == 1 and in_channels == out_channels
        self.shortcut = None
        if not (self.same and resnext):
            # the plain original has unused shortcuts, too: frozen here, so that counts agree
            self.shortcut = Shortcut(in_channels, out_channels, stride)
            self.shortcut.requires_grad_(not self.same)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.same else self.shortcut(x)
        f, g = (branch(x) for branch in self.branches)
        if not self.training:
            return shortcut + (f + g) / 2
        a, b = torch.rand(2, len(x), 1, 1, 1, device=x.device).to(f.dtype)
        return shortcut + Scale.apply(f, a, b) + Scale.apply(g, 1 - a, 1 - b)


def shake(name, num_classes, image_size, channels, dropout) -> Network:
    """Return a Shake-Shake network."""
    width, resnext = SHAKE[name]
    width = width * channels // 64
    stem_width = channels if resnext else channels // 4
    widths, depths = [width, 2 * width, 4 * width], [2 if resnext else 4] * 3
    return he_init(Network(
        stem(stem_width, image_size, bias=True),
        make_stages(partial(ShakeBlock, resnext=resnext), stem_width, widths, depths),
        nn.ReLU(), widths[-1], num_classes, dropout))
