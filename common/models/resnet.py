"""ResNets: pre-activation and post-activation (He et al. 2016), wide (Zagoruyko & Komodakis 2016),
ResNeXt (Xie et al. 2017)."""
from functools import partial

from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from common.errors import RunError
from common.models import parts
from common.models.parts import Network, PreActBlock, conv, he_init, make_stages, norm_relu

DEPTHS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3),
          152: (3, 8, 36, 3)}           # blocks per stage
PREACT = {f"preactresnet{n}": (n >= 50, depths) for n, depths in DEPTHS.items()}   # bottlenecks?
POSTACT = {                             # block, blocks per stage, groups, width of a group
    **{f"resnet{n}": (Bottleneck if n >= 50 else BasicBlock, depths, 1, 64)
       for n, depths in (DEPTHS | {200: (3, 24, 36, 3)}).items()},
    "resnext50_32x4d": (Bottleneck, DEPTHS[50], 32, 4),
    "resnext101_32x4d": (Bottleneck, DEPTHS[101], 32, 4),
    **dict.fromkeys(["resnext29_4_24", "resnext29_4_24_new"],       # SAGE has two names for it
                    (Bottleneck, (3, 3, 3), 4, 24))}
WIDE = {                       # depth, widening factor, biases?, momentum of the last norm
    "wrn16_8": (16, 8, True, 0.9),
    "wrn28_2": (28, 2, True, 0.9),
    "wrn28_10": (28, 10, True, 0.9),
    "wresnet28_10": (28, 10, True, 0.1),
    "wresnet40_2": (40, 2, True, 0.1),
    "wideresnet28": (28, 10, False, 0.1),
    "wrn28_8": (28, 8, False, 0.1),
}


def preact(name, num_classes, image_size, channels, dropout) -> Network:
    """Return a pre-activation ResNet without a norm after the last block."""
    bottleneck, depths = PREACT[name]
    widths = [channels * 2 ** stage * (4 if bottleneck else 1) for stage in range(4)]
    return Network(
        parts.stem(channels, image_size),
        make_stages(partial(PreActBlock, bottleneck=bottleneck), channels, widths, depths),
        nn.Identity(), widths[-1], num_classes, dropout)


def postact(name, num_classes, image_size, channels, dropout) -> nn.Module:
    """Return torchvision's ResNet or ResNeXt; below 128 pixels, its blocks behind a 3×3 stem with
    PyTorch's default initialisation (ResNeXt-29: at any size, He initialisation)."""
    block, depths, groups, width = POSTACT[name]
    if image_size >= 128 and len(depths) == 4:
        if channels != 64:
            raise RunError(f"{name} for {image_size} pixels has --initial_channels 64")
        network = ResNet(block, depths, num_classes, groups=groups, width_per_group=width)
        if dropout:
            network.fc = nn.Sequential(nn.Dropout(dropout), network.fc)
        return network
    widths = [channels * 2 ** stage * block.expansion for stage in range(len(depths))]
    stem = nn.Sequential(parts.stem(channels, image_size), *norm_relu(channels))
    block = partial(parts.post_act_block, block, groups=groups, base_width=width)
    network = Network(stem, make_stages(block, channels, widths, depths), nn.Identity(),
                      widths[-1], num_classes, dropout)
    if len(depths) == 3:
        he_init(network)
        nn.init.kaiming_normal_(network.fc.weight)
    return network


class BiasedBlock(nn.Module):
    """Pre-activation block, (BN, ReLU, 3×3 convolution with bias) twice; stride in the second."""

    def __init__(self, in_channels: int, out_channels: int, stride: int):
        super().__init__()
        self.convs = nn.Sequential(
            *norm_relu(in_channels), conv(in_channels, out_channels, 3, bias=True),
            *norm_relu(out_channels), conv(out_channels, out_channels, 3, stride, bias=True))
        same = stride == 1 and in_channels == out_channels
        self.shortcut = (nn.Identity() if same
                         else conv(in_channels, out_channels, 1, stride, bias=True))

    def forward(self, x: Tensor) -> Tensor:
        return self.convs(x) + self.shortcut(x)


def wide(name, num_classes, image_size, channels, dropout) -> Network:
    """Return a Wide ResNet: of `BiasedBlock`, default initialisation (SAGE, ResizeMix), or of
    `PreActBlock`, He initialisation (Soft Augmentation, SAMix)."""
    depth, factor, biased, momentum = WIDE[name]
    base = channels // 4                         # the paper's 16
    widths = [base * factor * 2 ** stage for stage in range(3)]
    network = Network(
        parts.stem(base, image_size, biased),
        make_stages(BiasedBlock if biased else PreActBlock, base, widths, [(depth - 4) // 6] * 3),
        nn.Sequential(*norm_relu(widths[-1], momentum)), widths[-1], num_classes, dropout)
    return network if biased else he_init(network)
