"""Pre-activation ResNet (He et al. 2016) for small images, without a norm after the last block."""
from functools import partial

from torch import nn

from common.models.parts import Network, PreActBlock, conv, make_stages, stem_stride

SPECS = {                      # bottleneck blocks?, blocks per stage
    "preactresnet18": (False, (2, 2, 2, 2)),
    "preactresnet34": (False, (3, 4, 6, 3)),
    "preactresnet50": (True, (3, 4, 6, 3)),
    "preactresnet101": (True, (3, 4, 23, 3)),
    "preactresnet152": (True, (3, 8, 36, 3)),
}


def build(name: str, num_classes: int, image_size: int = 32, *, initial_channels: int = 64,
          dropout: float = 0.0) -> Network:
    """The network `name` of this family; see `common.models.build`."""
    bottleneck, depths = SPECS[name]
    widths = [initial_channels * 2 ** stage * (4 if bottleneck else 1) for stage in range(4)]
    return Network(
        conv(3, initial_channels, 3, stem_stride(image_size)),
        make_stages(partial(PreActBlock, bottleneck=bottleneck), initial_channels, widths, depths),
        nn.Identity(), widths[-1], num_classes, dropout)
