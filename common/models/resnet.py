"""ResNet and its bottleneck form (He et al. 2016), stride on the 3×3 convolution, post-activation;
ResNeXt 32×4d and, of three stages, 29 4×24d (Xie et al. 2017).

Up to 64 pixels: torchvision's blocks behind a 3×3 stem, PyTorch's default initialisation. From 128
pixels on: torchvision's whole network, whose state_dict takes pretrained weights (without dropout).
ResNeXt-29 is the former at any size, with He's initialisation.
"""
from functools import partial

from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from common.errors import RunError
from common.models.parts import (
    Network,
    conv,
    he_init,
    make_stages,
    norm_relu,
    post_act_block,
    stem_stride,
)

SPECS = {                      # block, blocks per stage, groups, width of a group
    "resnet18": (BasicBlock, (2, 2, 2, 2), 1, 64),
    "resnet34": (BasicBlock, (3, 4, 6, 3), 1, 64),
    "resnet50": (Bottleneck, (3, 4, 6, 3), 1, 64),
    "resnet101": (Bottleneck, (3, 4, 23, 3), 1, 64),
    "resnet152": (Bottleneck, (3, 8, 36, 3), 1, 64),
    "resnet200": (Bottleneck, (3, 24, 36, 3), 1, 64),
    "resnext50_32x4d": (Bottleneck, (3, 4, 6, 3), 32, 4),
    "resnext101_32x4d": (Bottleneck, (3, 4, 23, 3), 32, 4),
    "resnext29_4_24": (Bottleneck, (3, 3, 3), 4, 24),
    "resnext29_4_24_new": (Bottleneck, (3, 3, 3), 4, 24),    # SAGE's second name for the same
}


def build(name: str, num_classes: int, image_size: int = 32, *, initial_channels: int = 64,
          dropout: float = 0.0) -> nn.Module:
    """The network `name` of this family; see `common.models.build`."""
    block, depths, groups, width = SPECS[name]
    if image_size >= 128 and len(depths) == 4:
        if initial_channels != 64:
            raise RunError(f"{name} for {image_size} pixels has --initial_channels 64")
        network = ResNet(block, depths, num_classes, groups=groups, width_per_group=width)
        if dropout:
            network.fc = nn.Sequential(nn.Dropout(dropout), network.fc)
        return network
    widths = [initial_channels * 2 ** stage * block.expansion for stage in range(len(depths))]
    stem = nn.Sequential(conv(3, initial_channels, 3, stem_stride(image_size)),
                         *norm_relu(initial_channels))
    block = partial(post_act_block, block, groups=groups, base_width=width)
    network = Network(stem, make_stages(block, initial_channels, widths, depths), nn.Identity(),
                      widths[-1], num_classes, dropout)
    if len(depths) == 3:
        he_init(network)
        nn.init.kaiming_normal_(network.fc.weight)
        nn.init.zeros_(network.fc.bias)
    return network
