"""ResNet and its bottleneck form (He et al. 2016), stride on the 3×3 convolution, post-activation;
ResNeXt 32×4d (Xie et al. 2017).

Up to 64 pixels: torchvision's blocks behind a 3×3 stem, PyTorch's default initialisation. From 128
pixels on: torchvision's whole network, whose state_dict takes pretrained weights (without dropout).
"""
from functools import partial

from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from common.models.parts import (
    Network,
    conv,
    make_stages,
    norm_relu,
    post_act_block,
    stem_stride,
)

SPECS = {                      # block, blocks per stage
    "resnet18": (BasicBlock, (2, 2, 2, 2)),
    "resnet34": (BasicBlock, (3, 4, 6, 3)),
    "resnet50": (Bottleneck, (3, 4, 6, 3)),
    "resnet101": (Bottleneck, (3, 4, 23, 3)),
    "resnet152": (Bottleneck, (3, 8, 36, 3)),
    "resnet200": (Bottleneck, (3, 24, 36, 3)),
    "resnext50_32x4d": (Bottleneck, (3, 4, 6, 3)),
    "resnext101_32x4d": (Bottleneck, (3, 4, 23, 3)),
}


def build(name: str, num_classes: int, image_size: int = 32, *, initial_channels: int = 64,
          dropout: float = 0.0) -> nn.Module:
    """The network `name` of this family; see `common.models.build`."""
    block, depths = SPECS[name]
    groups, width = (32, 4) if "32x4d" in name else (1, 64)
    if image_size >= 128:
        if initial_channels != 64:
            raise ValueError(f"{name} for {image_size} pixels has 64 initial channels")
        network = ResNet(block, depths, num_classes, groups=groups, width_per_group=width)
        if dropout:
            network.fc = nn.Sequential(nn.Dropout(dropout), network.fc)
        return network
    widths = [initial_channels * 2 ** stage * block.expansion for stage in range(4)]
    stem = nn.Sequential(conv(3, initial_channels, 3, stem_stride(image_size)),
                         *norm_relu(initial_channels))
    if groups > 1:
        block = partial(post_act_block, block, groups=groups, base_width=width)
    else:
        block = partial(post_act_block, block)
    stages = make_stages(block, initial_channels, widths, depths)
    return Network(stem, stages, nn.Identity(), widths[-1], num_classes, dropout)
