"""ResNeXt-29, 4×24d (Xie et al. 2017) for small images."""
from functools import partial

from torch import nn
from torchvision.models.resnet import Bottleneck

from common.models.parts import (
    Network,
    conv,
    he_init,
    make_stages,
    norm_relu,
    post_act_block,
    stem_stride,
)

SPECS = {                      # groups, width of a group
    "resnext29_4_24": (4, 24),
    "resnext29_4_24_new": (4, 24),               # SAGE's second name for the same network
}


def build(name: str, num_classes: int, image_size: int = 32, *, initial_channels: int = 64,
          dropout: float = 0.0) -> Network:
    """The network `name` of this family; see `common.models.build`."""
    groups, base_width = SPECS[name]
    widths = [initial_channels * 2 ** stage * Bottleneck.expansion for stage in range(3)]
    block = partial(post_act_block, Bottleneck, groups=groups, base_width=base_width)
    stem = nn.Sequential(conv(3, initial_channels, 3, stem_stride(image_size)),
                         *norm_relu(initial_channels))
    network = he_init(Network(stem, make_stages(block, initial_channels, widths, (3, 3, 3)),
                              nn.Identity(), widths[-1], num_classes, dropout))
    nn.init.kaiming_normal_(network.fc.weight)
    nn.init.zeros_(network.fc.bias)
    return network
