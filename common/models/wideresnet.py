"""Wide ResNet (Zagoruyko & Komodakis 2016), in the two forms that the papers trained.

With biases (SAGE, ResizeMix): stride on a block's second convolution, shortcut from the raw input,
PyTorch's default initialisation. Without (Soft Augmentation, SAMix): the paper's blocks, stride on
the first convolution, shortcut from the activated input, He initialisation.
"""
from torch import Tensor, nn

from common.models.parts import (
    Network,
    PreActBlock,
    conv,
    he_init,
    make_stages,
    norm_relu,
    stem_stride,
)

SPECS = {                      # depth, widening factor, biases?, momentum of the last norm
    "wrn16_8": (16, 8, True, 0.9),
    "wrn28_2": (28, 2, True, 0.9),
    "wrn28_10": (28, 10, True, 0.9),
    "wresnet28_10": (28, 10, True, 0.1),
    "wresnet40_2": (40, 2, True, 0.1),
    "wideresnet28": (28, 10, False, 0.1),
    "wrn28_8": (28, 8, False, 0.1),
}


class BiasedBlock(nn.Module):
    """BN-ReLU-conv3 twice, with bias; the second convolution has the stride."""

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


def build(name: str, num_classes: int, image_size: int = 32, *, initial_channels: int = 64,
          dropout: float = 0.0) -> Network:
    """The network `name` of this family; see `common.models.build`."""
    depth, factor, biased, momentum = SPECS[name]
    base = initial_channels // 4                 # the paper's 16
    widths = [base * factor * 2 ** stage for stage in range(3)]
    network = Network(
        conv(3, base, 3, stem_stride(image_size), bias=biased),
        make_stages(BiasedBlock if biased else PreActBlock, base, widths, [(depth - 4) // 6] * 3),
        nn.Sequential(*norm_relu(widths[-1], momentum)), widths[-1], num_classes, dropout)
    if not biased:
        he_init(network)
        nn.init.zeros_(network.fc.bias)
    return network
