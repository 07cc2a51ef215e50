"""PyramidNet-272, alpha 200 (Han et al. 2017) with ShakeDrop (Yamada et al. 2019)."""
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.models.parts import Network, Scale, conv, he_init, norm_relu, stem_stride

SPECS = {                      # depth, alpha: what the width grows by over all units
    "pyramidnet272": (272, 200),
    "pyramid272": (272, 200),
}


class ShakeDrop(nn.Module):
    """With probability `p`, for the whole batch, replaces x by x·a and its gradient g by g·b.

    a ~ U(-1, 1) and b ~ U(0, 1) are drawn for every sample. Evaluation multiplies by 1 - p.
    """

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
    """BN-1×1-BN-ReLU-3×3-BN-ReLU-1×1-BN; new channels of the shortcut are zero."""

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


def build(name: str, num_classes: int, image_size: int = 32, *, initial_channels: int = 64,
          dropout: float = 0.0) -> Network:
    """The network `name` of this family; see `common.models.build`."""
    depth, alpha = SPECS[name]
    per_stage = (depth - 2) // 9
    units = 3 * per_stage
    base = channels = initial_channels // 4      # the paper's 16
    stem = nn.Sequential(conv(3, base, 3, stem_stride(image_size)), nn.BatchNorm2d(base))
    stages = []
    for stage in range(3):
        stages.append(nn.Sequential())
        for number in range(per_stage):
            unit = stage * per_stage + number + 1
            width = round(base + alpha * base / 16 * unit / units)
            stride = 2 if stage and not number else 1
            # the probability grows linearly to 0.5
            stages[-1].append(PyramidUnit(channels, width, stride, 0.5 * unit / units))
            channels = 4 * width
    return he_init(Network(stem, stages, nn.Sequential(*norm_relu(channels)), channels,
                           num_classes, dropout))
